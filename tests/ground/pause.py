"""Stops a thread before one of its steps, so that a test can act at that very moment, in every run.

    with paused_before(durable.move, lambda: store.evict(manifest)) as evicting:
        ...                     # the other thread stands where it is about to call durable.move
    evicting.result()           # it has gone on, and has ended

The other thread is traced (sys.settrace), and waits in the trace: no function is replaced.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import structlog

PATIENCE_SECONDS = 60.0
T = TypeVar("T")


@contextmanager
def paused_before(
    step: Callable[..., Any], work: Callable[[], T], *, within: Callable[..., Any] | None = None
) -> Iterator[Future[T]]:
    """Run `work` in a thread that stops before its first call of `step` until the block ends.

    `within`: the function that must make the call; None for any. Fails if `work` ends without the call.
    """
    code = inspect.unwrap(step).__code__
    caller = None if within is None else inspect.unwrap(within).__code__
    stands, over, go_on = threading.Event(), threading.Event(), threading.Event()

    def trace(frame: FrameType, _event: str, _argument: object) -> None:
        if frame.f_code is not code or stands.is_set():
            return
        if caller is None or (frame.f_back is not None and frame.f_back.f_code is caller):
            stands.set()
            over.set()
            go_on.wait(PATIENCE_SECONDS)

    def traced() -> T:
        sys.settrace(trace)
        try:
            return work()
        finally:
            sys.settrace(None)

    with ThreadPoolExecutor(1) as other:
        running = other.submit(traced)
        running.add_done_callback(lambda _: over.set())
        try:
            assert over.wait(PATIENCE_SECONDS), f"it neither called {step.__qualname__} nor ended"
            assert stands.is_set(), f"it ended without {step.__qualname__}: {running.exception()!r}"
            yield running
        finally:
            go_on.set()


@contextmanager
def at_event(event: str, act: Callable[[], object]) -> Iterator[threading.Event]:
    """In the block, the first thread that logs `event` runs `act`. The yielded event is set just before."""
    before, done = structlog.get_config(), threading.Event()

    def look(_logger: object, _method: str, entry: dict[str, Any]) -> dict[str, Any]:
        if entry.get("event") == event and not done.is_set():
            done.set()
            act()
        return entry

    structlog.configure(
        **{
            **before,
            "processors": [look, *before["processors"]],
            "wrapper_class": structlog.make_filtering_bound_logger(0),
            "cache_logger_on_first_use": False,
        }
    )
    try:
        yield done
    finally:
        structlog.configure(**before)
