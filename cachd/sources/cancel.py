"""The cancel token: it lets one thread end the waits of other threads for a source."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Protocol

from cachd.errors import Cancelled


class Abortable(Protocol):
    """Anything whose blocked calls a cancel can end."""

    def abort(self) -> None:
        """Make the calls that are blocked now return or raise at once."""
        ...


class CancelToken:
    """Lets one thread end, at once, every wait of other threads for a source.

    It also counts what the source has answered, so its owner can notice that it makes no progress.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waited_for: set[Abortable] = set()
        self._is_cancelled = False
        self._answered = 0

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    @property
    def is_awaited(self) -> bool:
        """Whether a thread is in a wait that a cancel would abort."""
        return bool(self._waited_for)

    @property
    def answered(self) -> int:
        """How many requests were answered, entries listed and blocks of a listing received, in all."""
        return self._answered

    def count(self, answered: int = 1) -> None:
        """Add to `answered`."""
        with self._lock:
            self._answered += answered

    def check(self) -> None:
        """Raises Cancelled once the token is cancelled."""
        if self._is_cancelled:
            raise Cancelled("cancelled during a request to the source")

    def reaches(self, waited_for: Abortable) -> AbstractContextManager[None]:
        """A context in which a cancel aborts `waited_for`. Entering it raises Cancelled after a cancel.

        After leaving it the caller may close what `waited_for` holds: no abort can reach it any more.
        """
        return _Reached(self, waited_for)

    def wait(self, seconds: float) -> None:
        """Wait for so long. Raises Cancelled as soon as the token is cancelled."""
        waiting = _Waiting()
        with self.reaches(waiting):
            waiting.is_over.wait(seconds)
        self.check()

    def cancel(self) -> None:
        """Abort every wait; a later one raises Cancelled."""
        with self._lock:  # held throughout, so that no descriptor is closed, and reused, during its abort
            self._is_cancelled = True
            for each in self._waited_for:
                each.abort()

    def abort(self) -> None:
        """Cancel. It makes a token Abortable, so that one token can cancel another."""
        self.cancel()


class _Waiting:
    def __init__(self) -> None:
        self.is_over = threading.Event()

    def abort(self) -> None:
        self.is_over.set()


class _Reached:
    """The context of `CancelToken.reaches`. A class, as a generator would cost more at every request."""

    __slots__ = ("_cancel_token", "_waited_for")

    def __init__(self, cancel_token: CancelToken, waited_for: Abortable) -> None:
        self._cancel_token, self._waited_for = cancel_token, waited_for

    def __enter__(self) -> None:
        token = self._cancel_token
        with token._lock:
            if token._is_cancelled:
                token.check()
            token._waited_for.add(self._waited_for)

    def __exit__(self, *exception: object) -> None:
        token = self._cancel_token
        with token._lock:
            token._waited_for.discard(self._waited_for)
