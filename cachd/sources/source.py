"""What every source can do."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Protocol, Self

from cachd.errors import Cancelled
from cachd.model import Extent, File, Manifest, Ref


class Body(Protocol):
    """The bytes of one extent of one file, in order. A context manager; `abort` may come from any thread."""

    def readinto(self, view: memoryview) -> int:
        """Fill `view` from the next bytes; how many came: fewer than asked at the end of the extent, or
        before a failure that the next call raises.

        Raises Unavailable when the source breaks off or stalls, Changed when the file moved.
        """
        ...

    def abort(self) -> None:
        """Make a `readinto` that waits in another thread return or raise at once."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class Abortable(Protocol):
    def abort(self) -> None: ...


class CancelToken:
    """A cancel token: one thread ends, at once, whatever other threads wait for at a source.

    It also counts what a source has answered, so that its owner can tell a slow source from one that drips.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waited_for: set[Abortable] = set()
        self._is_cancelled = False
        self._answered = 0

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for what a cut would abort."""
        return bool(self._waited_for)

    @property
    def answered(self) -> int:
        """How many requests were answered, entries listed and blocks of a listing received so far."""
        return self._answered

    def count(self, answered: int = 1) -> None:
        """The source has answered so much more."""
        with self._lock:
            self._answered += answered

    def check(self) -> None:
        """Raises Cancelled after a cut."""
        if self._is_cancelled:
            raise Cancelled("cancelled while its source was asked")

    def reaches(self, waited_for: Abortable) -> AbstractContextManager[None]:
        """While inside, a cut aborts `waited_for`, which may close what it holds after that. Entering it
        raises Cancelled after a cut."""
        return _Reached(self, waited_for)

    def begin(self, waited_for: Abortable) -> None:
        """See `reaches`."""
        with self._lock:
            self.check()
            self._waited_for.add(waited_for)

    def end(self, waited_for: Abortable) -> None:
        """See `reaches`."""
        with self._lock:
            self._waited_for.discard(waited_for)

    def cancel(self) -> None:
        """Abort what is waited for, with the lock: nobody closes a descriptor meanwhile."""
        with self._lock:
            self._is_cancelled = True
            for each in self._waited_for:
                each.abort()

    def abort(self) -> None:
        """A cut may reach another one, which reaches further."""
        self.cancel()


class _Reached:
    """What a cut reaches while it is entered. Once a request: no generator."""

    __slots__ = ("_cancel_token", "_waited_for")

    def __init__(self, cancel_token: CancelToken, waited_for: Abortable) -> None:
        self._cancel_token, self._waited_for = cancel_token, waited_for

    def __enter__(self) -> None:
        self._cancel_token.begin(self._waited_for)

    def __exit__(self, *exception: object) -> None:
        self._cancel_token.end(self._waited_for)


class NoRanges(Exception):
    """The origin answers a request for a part with the whole file."""


class Source(Protocol):
    """One scheme. Blocking, and safe to use from many threads."""

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """Pin a ref to one revision and list its files.

        `cancel_token` ends the requests when it is cancelled, and counts the answers.
        Raises NotFound, Forbidden, Invalid or Unavailable; after a cancel any of these, or Cancelled.
        """
        ...

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Body:
        """Ask for the bytes of an extent of a file that `resolve` listed; `cancel_token` ends the asking.

        Raises NoRanges when only the whole file is to be had (then ask for the whole), Changed when the
        validator moved, and NotFound, Forbidden or Unavailable.
        """
        ...

    def anew(self) -> None:
        """What came was wrong: let go of links and connections, so that the next bytes come another way."""
        ...
