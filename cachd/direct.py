"""Runs one pull in this process, without a daemon: for an init container or a Job."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pydantic import ValidationError

from cachd import terminal
from cachd.api.documents import Asked, Models
from cachd.config import Config
from cachd.daemon.logs import configure_logs
from cachd.daemon.parts import assembled
from cachd.errors import Invalid, WaitTimeout
from cachd.findings import key_of, sentence
from cachd.kernel import threads

_POLL_SECONDS = 0.3


def pull_here(asked: Mapping[str, Any], options: Config, seconds: float) -> dict[str, Any]:
    """Pull a model, and return its document once it is ready.

    `asked` has the fields of POST /v1/models, `seconds` is the longest time to wait. Raises the error that
    the pull failed with, WaitTimeout, or KeyboardInterrupt (at SIGTERM, too). The next pull resumes an
    interrupted one.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    level = options.log_level if "log_level" in options.model_fields_set else "warning"
    configure_logs(level, options.log_format)
    try:
        request = Asked.model_validate(asked)
    except ValidationError as error:
        wrong = "; ".join(f"{key_of(fault['loc'])}: {sentence(dict(fault))}" for fault in error.errors())
        raise Invalid(f"the request is wrong: {wrong}", code="invalid_request") from error
    spec = request.spec()
    deadline = time.monotonic() + seconds
    with (
        assembled(options) as parts,
        _ending_in_time(),
        terminal.progress_bar(spec.name) as update,
    ):
        models = Models(parts.store, parts.pulls, parts.scrubs, parts.warms)
        parts.status.start(models)
        running = parts.pulls.start(spec, refresh=request.refresh, replace=request.replace, pins=request.pin)
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
        if request.pin:
            parts.store.snapshots.pin(spec.name)
        return models.describe(spec.name)


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
