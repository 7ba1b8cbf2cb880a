"""Defines the interface of every source, and the cancel token that ends a wait for one."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Protocol, Self

from cachd.errors import Cancelled
from cachd.model import Extent, File, Manifest, Ref


class Body(Protocol):
    """The bytes of one extent of one file, in order. A context manager; any thread may call `abort`."""

    def readinto(self, view: memoryview) -> int:
        """Read the next bytes into `view` and return their number, which is 0 only at the end of the extent.

        It may be less than `len(view)`: at the end, or before a failure that the next call then raises.
        Raises Unavailable when the source breaks off or stalls, Changed when the file has changed.
        """
        ...

    def abort(self) -> None:
        """Make a `readinto` that blocks in another thread return or raise at once."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class Abortable(Protocol):
    """Anything whose blocked calls a cancel can end."""

    def abort(self) -> None: ...


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
        """Abort every wait; a later one raises Cancelled."""
        with self._lock:  # held throughout, so that no descriptor is closed, and reused, during its abort
            self._is_cancelled = True
            for each in self._waited_for:
                each.abort()

    def abort(self) -> None:
        """Cancel. It makes a token Abortable, so that one token can cancel another."""
        self.cancel()


class _Reached:
    """The context of `CancelToken.reaches`. A class, as a generator would cost more at every request."""

    __slots__ = ("_cancel_token", "_waited_for")

    def __init__(self, cancel_token: CancelToken, waited_for: Abortable) -> None:
        self._cancel_token, self._waited_for = cancel_token, waited_for

    def __enter__(self) -> None:
        self._cancel_token.begin(self._waited_for)

    def __exit__(self, *exception: object) -> None:
        self._cancel_token.end(self._waited_for)


class NoRanges(Exception):
    """The origin answered a request for a part of a file with the complete file."""


class Source(Protocol):
    """A source of models. Its calls block. Safe to use from many threads."""

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """Pin a ref to one revision and list its files.

        `cancel_token` ends the requests when it is cancelled, and counts the answers.
        Raises NotFound, Forbidden, Invalid, Changed or Unavailable; after a cancel one of these or Cancelled.
        """
        ...

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Body:
        """Request an extent of a file that `resolve` listed, and return its body, which the caller closes.

        `cancel_token` ends the request, not the body. Raises NoRanges when the source sends only complete
        files (then ask for the complete file), Changed when the file is not the listed one any more,
        NotFound, Forbidden, Invalid, Unavailable or Cancelled.
        """
        ...

    def anew(self) -> None:
        """Forget signed URLs and drop idle connections: after wrong bytes, the next ones come another way."""
        ...
