"""What every source can do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


class Cut:
    """Lets one thread end, at once, whatever other threads wait for at a source."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waited_for: set[Abortable] = set()
        self._is_cut = False

    @contextmanager
    def reaches(self, waited_for: Abortable) -> Iterator[None]:
        """While inside, a cut aborts `waited_for`. Raises Cancelled after one."""
        with self._lock:
            if self._is_cut:
                raise Cancelled("cut before it was asked")
            self._waited_for.add(waited_for)
        try:
            yield
        finally:
            with self._lock:
                self._waited_for.discard(waited_for)

    def cut(self) -> None:
        with self._lock:
            self._is_cut = True
            waited_for = list(self._waited_for)
        for each in waited_for:
            each.abort()


class NoRanges(Exception):
    """The origin answers a request for a part with the whole file."""


class Source(Protocol):
    """One scheme. Blocking, and safe to use from many threads."""

    def resolve(self, ref: Ref) -> Manifest:
        """Pin a ref to one revision and list its files.

        Raises NotFound, Forbidden, Invalid or Unavailable.
        """
        ...

    def open(self, file: File, extent: Extent, cut: Cut) -> Body:
        """Ask for the bytes of an extent of a file that `resolve` listed; `cut` ends the asking.

        Raises NoRanges when only the whole file is to be had (then ask for the whole), Changed when the
        validator moved, and NotFound, Forbidden or Unavailable.
        """
        ...

    def anew(self) -> None:
        """What came was wrong: let go of links and connections, so that the next bytes come another way."""
        ...
