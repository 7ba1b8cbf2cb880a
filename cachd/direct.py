"""Runs one pull, or one resolve, in this process, without a daemon: for an init container or a Job."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars

from cachd.config import Config
from cachd.daemon.logs import configure_logs
from cachd.daemon.parts import assembled
from cachd.daemon.sources import build_sources
from cachd.daemon.store import ALONE, Sharing, place_of, shared_volume
from cachd.daemon.turns import Waited, take_turn
from cachd.errors import CachdError, Corrupt, Invalid, NotFound, TooBig, WaitTimeout
from cachd.kernel import threads
from cachd.model import ModelSpec, Snapshot
from cachd.report.files import resolve_report_without_cache
from cachd.report.models import report_without_store
from cachd.report.progress_log import Seen
from cachd.report.values import as_document
from cachd.sources.cancel import CancelToken
from cachd.store.layout import Layout
from cachd.terminal.amounts import duration_text, size_text
from cachd.terminal.models import Status, waits_text
from cachd.terminal.progress import Update, progress_bars
from cachd.transfer.checks import check_numbers, selected
from cachd.transfer.request import Pull
from cachd.transfer.resolves import Resolves

log = structlog.get_logger(__name__)

_POLL_SECONDS = 0.3
_OF_THE_MODEL = (NotFound, Invalid, TooBig, Corrupt)
_OF_THIS_NODE = ("bad_root", "bad_format", "bad_config", "bad_option")


def pull_here(
    spec: ModelSpec,
    options: Config,
    *,
    seconds: float,
    refresh: bool,
    replace: bool,
    pin: bool,
    force: bool = False,
) -> dict[str, Any]:
    """Pull a model, and return its document once it is ready. Without a terminal, the log shows the progress.

    On a shared volume, one process at a time pulls. If another one pulls this model, that is waited for.

    `refresh`, `replace`: as in `Pulls.start`. `force`: on a shared volume, models may be evicted and deleted
    though other nodes may use them. `seconds`: the longest time to wait; it begins anew when this process was
    fenced. Raises the error that the pull failed with, WaitTimeout, or KeyboardInterrupt (at SIGTERM, too).
    The next pull resumes an interrupted one.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    usual = "warning" if sys.stderr.isatty() else "info"  # a terminal shows a progress bar
    configure_logs(
        options.log_level if "log_level" in options.model_fields_set else usual, options.log_format
    )
    asked = _Asked(spec, seconds, refresh=refresh, replace=replace, pin=pin)
    with bound_contextvars(who="cachd:direct"), progress_bars() as update:
        root = place_of(options)
        if not (volume := shared_volume(options, root, counts_uncertain=True)):
            return _pull(asked, options, ALONE, update)
        say = log.info if options.shared else log.warning  # found by the file system: nobody asked for it
        say("shared volume: one process at a time pulls", root=str(root), shared_by=volume)
        shown = _Shown(asked, update)
        turn = take_turn(
            root, spec, accepts_ready=not (refresh or pin), waits=shown.show, fenced=_start_again
        )
        if isinstance(turn, Snapshot):
            return as_document(report_without_store(Layout(root), turn))
        return _pull_in_term(asked, options, Sharing(turn, force=force), update)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The model and options of the command. `seconds`: the longest time that it may take from now on."""

    spec: ModelSpec = field(kw_only=False)
    seconds: float = field(kw_only=False)
    refresh: bool
    replace: bool
    pin: bool
    clock: Callable[[], float] = time.monotonic
    began: float = field(default_factory=time.monotonic)

    def check_time(self, done: int, total: int) -> None:
        """Raises WaitTimeout when `seconds` have passed."""
        if self.clock() - self.began > self.seconds:
            raise WaitTimeout(
                f"{self.spec.name}: {size_text(done)} of {size_text(total)} are here"
                f" after {duration_text(self.seconds)}",
                hint="run it again: it resumes where it stopped",
            )


def _pull_in_term(asked: _Asked, options: Config, sharing: Sharing, update: Update) -> dict[str, Any]:
    """Pull while this process may write to the shared volume, then let the next process write."""
    term, final = sharing.term, None
    assert term is not None
    try:
        reserve = options.reserve_free
        term.begin(reserve_free=0 if reserve == "auto" else reserve)
        return _pull(asked, options, sharing, update)
    except CachdError as error:
        final = error.as_document() if is_for_all(error) else None
        raise
    finally:
        try:
            term.end(final)
        except (CachdError, OSError) as error:
            log.warning("shared volume not given up: the next process waits longer", reason=str(error))


def is_for_all(error: CachdError) -> bool:
    """Whether a pull of the same model by another process fails, too.

    It is about the source or the model, not about the time, the token, the options or the node of this one.
    """
    return isinstance(error, _OF_THE_MODEL) and error.code not in _OF_THIS_NODE


def _pull(asked: _Asked, options: Config, sharing: Sharing, update: Update) -> dict[str, Any]:
    """Open the root, pull, and return the model's document."""
    spec = asked.spec
    with assembled(options, sharing=sharing) as daemon, _ending_in_time():
        daemon.status.start(daemon.models)
        daemon.progress.start()
        running = daemon.pulls.start(spec, refresh=asked.refresh, replace=asked.replace, pins=asked.pin)
        if running is not None:
            _wait(running, asked, update)
        if asked.pin:
            daemon.store.pins.add(spec.name)
        return as_document(daemon.models.describe(spec.name))


def _start_again() -> None:
    """Replace this process, which was fenced, by a new one with the same command.

    None of its threads and open files is left, so nothing that it had begun can write any more. The new
    process waits for its turn.
    """
    signal.alarm(0)  # of `threads.end_in_time`: it would end the new process
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this very command


class _Shown:
    """Shows how far the pull of another process is: in a bar, or in the log."""

    def __init__(self, asked: _Asked, update: Update) -> None:
        self._asked, self._update = asked, update
        self._logged: Seen | None = None

    def show(self, waited: Waited) -> None:
        """Show it once more. Raises WaitTimeout."""
        spec, by = self._asked.spec, f"{waited.writer.who} pulls {waited.writer.name}"
        self._asked.check_time(waited.done, waited.total)
        is_same = waited.writer.name == spec.name
        state = waited.state if is_same else "waiting"
        self._update(Status(spec.name, state, waited.done, waited.total, waited.rate, reason=by))
        now = Seen(self._asked.clock(), f"{waited.writer.number} {state}", None, waited.done, waited.total)
        if self._logged is None or (now.at >= self._logged.at + 1 and now.deserves_a_line(self._logged)):
            self._logged = now
            log.info(
                "another process pulls",
                name=waited.writer.name,
                by=waited.writer.who,
                number=waited.writer.number,
                state=waited.state,
                done_bytes=waited.done,
                size_bytes=waited.total,
                percent=100 * waited.done // waited.total if waited.total else 0,
                bytes_per_second=waited.rate,
            )


def _wait(running: Pull, asked: _Asked, update: Update) -> None:
    """Show the progress until the pull has ended. Raises its error, or WaitTimeout."""
    progress = running.progress
    while not running.done.done():
        update(_status(running))
        futures.wait([running.done], timeout=_POLL_SECONDS)
        if not running.done.done():
            asked.check_time(progress.done, progress.total)
    update(_status(running))
    if running.error:
        raise running.error


def _status(running: Pull) -> Status:
    progress, now = running.progress, running.progress.now
    if running.done.done():
        why = f"{running.error.detail} ({running.error.code})" if running.error else ""
        return Status(running.spec.name, progress.state, now.done, progress.total, reason=why)
    waits = progress.waits(now)
    return Status(
        running.spec.name,
        progress.state,
        now.done,
        progress.total,
        rate=round(progress.rate),
        eta_seconds=progress.eta_seconds(now),
        reason=waits_text(waits.reason.value, waits.until, waits.detail) if waits else "",
    )


def resolve_here(spec: ModelSpec, options: Config, *, seconds: float) -> dict[str, Any]:
    """What a pull of the spec into an empty cache would fetch. Needs no root. Raises CachdError.

    `seconds`: how long the source may take.
    """
    configure_logs("warning", options.log_format)
    sources = build_sources(options)
    resolves = Resolves(seconds, stall_seconds=options.stall_seconds)
    with closing(resolves), _ending_in_time():
        source = sources.of(spec.ref)
        manifest = resolves.resolve(source, spec.ref, CancelToken(), seconds=seconds)
        chosen = selected(manifest, spec, sources.table)
        check_numbers(chosen, manifest, spec)
        return as_document(resolve_report_without_cache(spec, chosen))


@contextmanager
def _ending_in_time() -> Iterator[None]:
    """When an exception leaves the block, let the process end soon, even if a thread of it is blocked."""
    try:
        yield
    except BaseException:
        threads.end_in_time()
        raise


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
