"""Reads headers of a model that is not here from its source, within a budget of requests, bytes and time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from cachd.errors import CachdError
from cachd.model import Extent, File, Manifest
from cachd.preflight.contents import UnreadError
from cachd.sources.cancel import CancelToken
from cachd.sources.source import NoRanges, Source

MAX_REQUESTS = 500  # a model of 160 shards needs some 170
MAX_BYTES = 64 << 20
_FIRST_BYTES, _LARGEST_BYTES = 64 << 10, 4 << 20  # of one request: each in a row asks for twice as much
_COMPLETE_BYTES = 2 << 20  # up to so many, a file is read completely where the source sends no part of it


class SourceContents:
    """The files of a manifest at their source. The bytes are not verified: only a pull does that.

    Reads that exceed the budget raise UnreadError, and so do all reads once `cancel_token` is cancelled.
    """

    def __init__(self, manifest: Manifest, source: Source, cancel_token: CancelToken) -> None:
        self.sizes: Mapping[str, int] = {file.path: file.size for file in manifest.files}
        self._files: Mapping[str, File] = {file.path: file for file in manifest.files}
        self._source, self._cancel_token = source, cancel_token
        self.requests, self.bytes = 0, 0
        self._heads: dict[str, bytes] = {}

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        """Raises nothing itself. Reads raise UnreadError, and as `Source.open` and its body do."""
        with io.BufferedReader(_Ranges(self, self._files[path]), _FIRST_BYTES) as opened:
            yield cast(BinaryIO, opened)

    def fetch(self, file: File, start: int, size: int) -> bytes:
        """At most `size` bytes of a file, fewer only at its end. Raises as reads of `opened`."""
        head = self._heads.get(file.path, b"")
        if start < len(head):
            return head[start:]
        extent = Extent(start, min(start + size, file.size))
        try:
            found = self._received(file, extent)
        except CachdError as error:
            if self._cancel_token.is_cancelled:
                raise UnreadError from error
            raise
        if start == 0:
            self._heads.setdefault(file.path, found)
        return found

    def _received(self, file: File, extent: Extent) -> bytes:
        try:
            return self._receive(file, extent)
        except NoRanges:
            if file.size > _COMPLETE_BYTES:
                raise UnreadError from None
            self._heads[file.path] = complete = self._receive(file, Extent(0, file.size))
            return complete[extent.start : extent.stop]

    def _receive(self, file: File, extent: Extent) -> bytes:
        is_spent = self.requests >= MAX_REQUESTS or self.bytes + extent.size > MAX_BYTES
        if is_spent or self._cancel_token.is_cancelled:
            raise UnreadError
        self.requests += 1
        self.bytes += extent.size
        content, received = bytearray(extent.size), 0
        with (
            self._source.open(file, extent, self._cancel_token) as body,
            self._cancel_token.reaches(body),
            memoryview(content) as view,
        ):
            while received < len(view) and (count := body.readinto(view[received:])):
                received += count
                self._cancel_token.count()
        return bytes(content[:received])


class _Ranges(io.RawIOBase):
    """One file at its source, read by ranges."""

    def __init__(self, contents: SourceContents, file: File) -> None:
        self._contents, self._file = contents, file
        self._at, self._start, self._window = 0, 0, b""
        self._next_bytes = _FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._file.size:
            return 0
        if not self._start <= self._at < self._start + len(self._window):
            self._window = self._contents.fetch(self._file, self._at, self._next_bytes)
            self._start = self._at
            self._next_bytes = min(2 * self._next_bytes, _LARGEST_BYTES)
        begin = self._at - self._start
        found = self._window[begin : begin + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
