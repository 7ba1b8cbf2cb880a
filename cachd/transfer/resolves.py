"""Resolves refs at their sources within a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from cachd.errors import CachdError, Unavailable
from cachd.kernel import threads
from cachd.model import Manifest, Ref
from cachd.policy.patience import Patience
from cachd.sources.cancel import CancelToken
from cachd.sources.source import Source

log = structlog.get_logger(__name__)

SLOW_SECONDS = 5.0
TOO_SLOW = "resolve_too_slow"
_CHECK_SECONDS = 1.0


class _Running:
    """One running resolve. `slow` is called once when it takes longer than SLOW_SECONDS."""

    def __init__(self, patience: Patience, slow: Callable[[], None], now: float) -> None:
        self.cancel_token, self.began, self.why_ended = CancelToken(), now, ""
        self._patience, self._slow, self._is_slow = patience, slow, False

    def check(self, now: float) -> None:
        """Call `slow` if it is due, and cancel the resolve when the source is too slow."""
        if not self._is_slow and now - self.began >= SLOW_SECONDS:
            self._is_slow = True
            self._slow()
        if why := self._patience.why_not(self.cancel_token.answered, now):
            self.why_ended = why
            self.cancel_token.cancel()


class Resolves:
    """Resolves refs; a thread watches the running ones. Safe from any thread.

    `seconds`: the time that all resolves of one pull may take together; callers pass what is left of it.
    `stall_seconds`: the time that an origin may take for one answer. `failed` is called with each ref that
    could not be resolved.
    """

    def __init__(
        self,
        seconds: float,
        *,
        stall_seconds: float,
        failed: Callable[[Ref, CachdError], None] = lambda _ref, _error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self._stall_seconds, self._clock = seconds, stall_seconds, clock
        self._failed = failed
        self._changed = threading.Condition()
        self._running: set[_Running] = set()
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
        """The ref's current manifest. `slow` is called from another thread after SLOW_SECONDS.

        Raises Cancelled when the token is cancelled, Unavailable (code `resolve_too_slow`) when the source
        takes longer than `seconds` or answers too rarely, and what `Source.resolve` raises.
        """
        now = self._clock()
        running = _Running(Patience(seconds, stall_seconds=self._stall_seconds, now=now), slow, now)
        try:
            with (
                self._watched(running),
                cancel_token.reaches(running.cancel_token),
                threads.given(str(ref)),
            ):
                manifest = source.resolve(ref, running.cancel_token)
        except CachdError as error:
            cancel_token.check()
            if running.why_ended:
                too_slow = _too_slow(ref, running.why_ended)
                self._failed(ref, too_slow)
                raise too_slow from error
            self._failed(ref, error)
            raise
        cancel_token.check()
        return manifest

    @contextmanager
    def ending(self, cancel_token: CancelToken, *, seconds: float) -> Iterator[CancelToken]:
        """A context with a token that is cancelled with `cancel_token`, or when the source is too slow.

        That is after `seconds`, or `stall_seconds` after the token last counted an answer.
        """
        now = self._clock()
        patience = Patience(seconds, stall_seconds=self._stall_seconds, now=now)
        running = _Running(patience, lambda: None, now)
        with self._watched(running), cancel_token.reaches(running.cancel_token):
            yield running.cancel_token

    def close(self) -> None:
        """Join the watching thread. The callers of `resolve` must have cancelled their tokens before."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    @contextmanager
    def _watched(self, running: _Running) -> Iterator[None]:
        with self._changed:
            self._running.add(running)
            if len(self._running) == 1:
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._running.discard(running)

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not (self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                self._changed.wait(_CHECK_SECONDS)
                for each in self._running:  # with the lock, so that `slow` is never called after the end
                    each.check(self._clock())


def _too_slow(ref: Ref, why: str) -> Unavailable:
    log.warning("resolve too slow", ref=str(ref), reason=why)
    return Unavailable(
        f"{ref}: its source is too slow: {why}",
        code=TOO_SLOW,
        hint="retry when the source is faster, or raise resolve_seconds",
    )
