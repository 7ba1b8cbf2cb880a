"""The interface of every source of models. tests/contract_source.py tests each promise on every source."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from cachd.model import Extent, File, Manifest, Ref
from cachd.sources.cancel import CancelToken


class Source(Protocol):
    """A source of models. Its calls block. Safe to use from many threads.

    What a source sends is hostile: it is limited before it is parsed, and errors of libraries become cachd's.
    """

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """Pin a ref to one revision and list its files.

        Each file has its size, an origin without secrets, the digest that the source states, if any, and a
        validator if the bytes at its origin may change. An unchanged ref resolves to an equal manifest.

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


@runtime_checkable
class ForCallers(Protocol):
    """A source that can say whether the owner of another token may read from it."""

    def for_caller(self, token: str | None) -> Source:
        """The source as the owner of this token sees it, or as somebody without a token.

        Its `resolve` raises NotFound or Forbidden also if that person may list files but not download them.
        """
        ...


class Body(Protocol):
    """The bytes of one extent of one file, in order. A context manager; any thread may call `abort`."""

    def readinto(self, view: memoryview, /) -> int:
        """Read the next bytes into `view` and return their number, which is 0 only at the end of the extent.

        It may be less than `len(view)`: at the end, or before a failure that the next call then raises.
        Raises Unavailable when the source breaks off or stalls, Changed when the file has changed.
        """
        ...

    def abort(self) -> None:
        """Make a `readinto` that blocks in another thread return or raise at once."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class NoRanges(Exception):
    """The origin answered a request for a part of a file with the complete file."""
