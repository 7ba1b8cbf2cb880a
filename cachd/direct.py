"""Runs one pull in this process, without a daemon: for an init container or a Job."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cachd import daemon, terminal
from cachd.config import Config
from cachd.errors import WaitTimeout
from cachd.kernel import threads
from cachd.model import ModelSpec
from cachd.report.models import Models
from cachd.report.values import as_document

_POLL_SECONDS = 0.3


def pull_here(asked: Mapping[str, Any], options: Config, seconds: float) -> dict[str, Any]:
    """Pull a model, and return its report as JSON once it is ready.

    `asked` has the fields of POST /v1/models, `seconds` is the longest time to wait. Raises the error that
    the pull failed with, WaitTimeout, or KeyboardInterrupt (at SIGTERM, too). The next pull resumes an
    interrupted one.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    level = options.log_level if "log_level" in options.model_fields_set else "warning"
    daemon.configure_logs(level, options.log_format)
    hub_id, pin = asked["hub_id"], asked["pin"]
    spec = ModelSpec.asked(asked["ref"], asked["name"], asked["include"], asked["exclude"], hub_id=hub_id)
    deadline = time.monotonic() + seconds
    with (
        daemon.assembled(options) as parts,
        _ending_in_time(),
        terminal.progress_bar(spec.name) as update,
    ):
        models = Models(parts.store, parts.pulls, parts.scrubs, parts.warms)
        parts.status.start(models)
        running = parts.pulls.start(spec, refresh=asked["refresh"], replace=asked["replace"], pins=pin)
        while running and not running.done.done():
            progress = running.progress
            update(progress.state, progress.done, progress.total)
            futures.wait([running.done], timeout=_POLL_SECONDS)
            if time.monotonic() > deadline and not running.done.done():
                raise WaitTimeout(
                    f"{spec.name}: {progress.done} of {progress.total} bytes after {seconds:.0f} s",
                    hint="run it again: it resumes where it stopped",
                )
        if running and running.error:
            raise running.error
        if pin:
            parts.store.snapshots.pin(spec.name)
        return as_document(models.describe(spec.name))


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
