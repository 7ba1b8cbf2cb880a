"""What refs are now: sources asked, and ended when they take too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from cachd.errors import CachdError, Unavailable
from cachd.model import Manifest, Ref
from cachd.policy.patience import Patience
from cachd.sources.source import CancelToken, Source
from cachd.transfer import threads
from cachd.transfer.cores import together

log = structlog.get_logger(__name__)

SLOW_SECONDS = 5.0
TOO_SLOW = "resolve_too_slow"
_LOOK_SECONDS = 1.0


class _Asked:
    """A source that is being asked."""

    def __init__(self, patience: Patience, slow: Callable[[], None]) -> None:
        self.cancel_token, self.began, self.why_ended = CancelToken(), time.monotonic(), ""
        self._patience, self._slow, self._is_slow = patience, slow, False

    def look(self, now: float) -> None:
        """Tell once that it is slow, and end it when it is too slow."""
        if not self._is_slow and now - self.began >= SLOW_SECONDS:
            self._is_slow = True
            self._slow()
        if why := self._patience.why_not(self.cancel_token.answered, now):
            self.why_ended = why
            self.cancel_token.cancel()


class Resolves:
    """Asks sources what a ref is, for `seconds` a pull at most. A thread watches. Safe from any thread."""

    def __init__(self, seconds: float, *, stall_seconds: float) -> None:
        self.seconds, self._stall_seconds = seconds, stall_seconds
        self._changed = threading.Condition()
        self._asked: set[_Asked] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="resolve-watch", daemon=True)
        threads.start([self._thread])

    def resolve(
        self,
        source: Source,
        ref: Ref,
        cancel_token: CancelToken,
        *,
        seconds: float,
        slow: Callable[[], None] = lambda: None,
    ) -> Manifest:
        """What the ref is now, found within `seconds`. `slow` is called when it takes long.

        Raises Cancelled after a cut, Unavailable (`resolve_too_slow`) when the source takes too long, or what
        `Source.resolve` does.
        """
        patience = Patience(seconds, stall_seconds=self._stall_seconds, now=time.monotonic())
        asked = _Asked(patience, slow)
        try:
            with (
                self._watched(asked),
                cancel_token.reaches(asked.cancel_token),
                threads.given(str(ref)),
                together.gathered(),
            ):
                manifest = source.resolve(ref, asked.cancel_token)
        except CachdError as error:
            cancel_token.check()
            if asked.why_ended:
                raise _too_slow(ref, asked.why_ended) from error
            raise
        cancel_token.check()
        return manifest

    def close(self) -> None:
        """Those that are asked are cut before by their owners."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    @contextmanager
    def _watched(self, asked: _Asked) -> Iterator[None]:
        with self._changed:
            self._asked.add(asked)
            if len(self._asked) == 1:
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._asked.discard(asked)

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not (self._asked or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                self._changed.wait(_LOOK_SECONDS)
                for each in self._asked:  # with the lock: nobody is told of one that has ended
                    each.look(time.monotonic())


def _too_slow(ref: Ref, why: str) -> Unavailable:
    log.warning("resolve too slow", ref=str(ref), reason=why)
    return Unavailable(
        f"{ref}: its source is too slow: {why}",
        code=TOO_SLOW,
        hint="ask again when it is faster, or raise resolve_seconds",
    )
