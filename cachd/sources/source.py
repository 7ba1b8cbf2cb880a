"""What every source can do."""

from __future__ import annotations

from typing import Protocol, Self

from cachd.model import Extent, File, Manifest, Ref


class Body(Protocol):
    """The bytes of one extent of one file, in order. A context manager; `abort` may come from any thread."""

    def readinto(self, view: memoryview) -> int:
        """Fill `view` from the next bytes; how many came: fewer than asked only at the end of the extent.

        Raises Unavailable when the source breaks off or stalls, Changed when the file moved.
        """
        ...

    def abort(self) -> None:
        """Make a `readinto` that waits in another thread return or raise at once."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class NoRanges(Exception):
    """The origin answers a request for a part with the whole file."""


class Source(Protocol):
    """One scheme. Blocking, and safe to use from many threads."""

    def resolve(self, ref: Ref) -> Manifest:
        """Pin a ref to one revision and list its files.

        Raises NotFound, Forbidden, Invalid or Unavailable.
        """
        ...

    def open(self, file: File, extent: Extent) -> Body:
        """Ask for the bytes of an extent of a file that `resolve` listed.

        Raises NoRanges when only the whole file is to be had (then ask for the whole), Changed when the
        validator moved, and NotFound, Forbidden or Unavailable.
        """
        ...
