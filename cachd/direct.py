"""Runs one pull in this process, without a daemon: for an init container or a Job."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from types import FrameType
from typing import Any

from structlog.contextvars import bound_contextvars

from cachd import terminal
from cachd.config import Config
from cachd.daemon.logs import configure_logs
from cachd.daemon.parts import assembled
from cachd.errors import WaitTimeout
from cachd.kernel import threads
from cachd.model import ModelSpec
from cachd.report.values import as_document
from cachd.transfer.request import Pull

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
        terminal.progress_bar(spec.name) as update,
    ):
        daemon.status.start(daemon.models)
        daemon.progress.start()
        running = daemon.pulls.start(spec, refresh=refresh, replace=replace, pins=pin)
        if running is not None:
            _wait(running, seconds, update, lambda: clock() - began)
        if pin:
            daemon.store.pins.add(spec.name)
        return as_document(daemon.models.describe(spec.name))


def _wait(
    running: Pull,
    seconds: float,
    update: Callable[[str, int, int], None],
    waited: Callable[[], float],
) -> None:
    """Show the progress until the pull has ended. Raises its error.

    Raises WaitTimeout when `waited()`, the seconds since the command began, exceeds `seconds`.
    """
    progress = running.progress
    while not running.done.done():
        update(progress.state, progress.done, progress.total)
        futures.wait([running.done], timeout=_POLL_SECONDS)
        if waited() > seconds and not running.done.done():
            raise WaitTimeout(
                f"{running.spec.name}: {progress.done} of {progress.total} bytes after {seconds:.0f} s",
                hint="run it again: it resumes where it stopped",
            )
    update(progress.state, progress.done, progress.total)
    if running.error:
        raise running.error


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
