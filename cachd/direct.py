"""Runs one pull, or one resolve, in this process, without a daemon: for an init container or a Job."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

from structlog.contextvars import bound_contextvars

from cachd.config import Config
from cachd.daemon.logs import configure_logs
from cachd.daemon.parts import assembled
from cachd.daemon.sources import build_sources
from cachd.errors import WaitTimeout
from cachd.kernel import threads
from cachd.model import ModelSpec
from cachd.report.files import resolve_report_without_cache
from cachd.report.values import as_document
from cachd.sources.cancel import CancelToken
from cachd.terminal.amounts import duration_text, size_text
from cachd.terminal.models import Status, waits_text
from cachd.terminal.progress import Update, progress_bars
from cachd.transfer.checks import check_numbers, selected
from cachd.transfer.request import Pull
from cachd.transfer.resolves import Resolves

_POLL_SECONDS = 0.3


def pull_here(
    spec: ModelSpec,
    options: Config,
    *,
    seconds: float,
    refresh: bool,
    replace: bool,
    pin: bool,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Pull a model, and return its document once it is ready. Without a terminal, the log shows the progress.

    `refresh`, `replace`: as in `Pulls.start`. `seconds`: the longest time to wait. Raises the error that the
    pull failed with, WaitTimeout, or KeyboardInterrupt (at SIGTERM, too). The next pull resumes an
    interrupted one.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    usual = "warning" if sys.stderr.isatty() else "info"  # a terminal shows a progress bar
    configure_logs(
        options.log_level if "log_level" in options.model_fields_set else usual, options.log_format
    )
    began = clock()
    with (
        bound_contextvars(who="cachd:direct"),
        assembled(options) as daemon,
        _ending_in_time(),
        progress_bars() as update,
    ):
        daemon.status.start(daemon.models)
        daemon.progress.start()
        running = daemon.pulls.start(spec, refresh=refresh, replace=replace, pins=pin)
        if running is not None:
            _wait(running, seconds, update, lambda: clock() - began)
        if pin:
            daemon.store.pins.add(spec.name)
        return as_document(daemon.models.describe(spec.name))


def _wait(running: Pull, seconds: float, update: Update, waited: Callable[[], float]) -> None:
    """Show the progress until the pull has ended. Raises its error.

    Raises WaitTimeout when `waited()`, the seconds since the command began, exceeds `seconds`.
    """
    progress = running.progress
    while not running.done.done():
        update(_status(running))
        futures.wait([running.done], timeout=_POLL_SECONDS)
        if waited() > seconds and not running.done.done():
            raise WaitTimeout(
                f"{running.spec.name}: {size_text(progress.done)} of {size_text(progress.total)} are here"
                f" after {duration_text(seconds)}",
                hint="run it again: it resumes where it stopped",
            )
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
