"""Opens the files of a model for a preflight, within a budget of files, bytes and tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, BinaryIO, Protocol

from cachd.errors import Invalid, Leased
from cachd.foreign import Limit, load_json
from cachd.model import File, Manifest
from cachd.model.finding import Finding, Level
from cachd.preflight.codes import Code
from cachd.store.content import ContentStore

MAX_FILES = 20_000  # opened in one preflight
MAX_BYTES = 128 << 20  # of documents, indexes and headers
MAX_TOKENS = 4_000_000  # of JSON; a model of 200,000 tensors has some 2,800,000
_MAX_OF_ONE_CODE = 20
_DOCUMENT = Limit(size_bytes=2 << 20, tokens=100_000, depth=32)
# Python writes these, and reads them, but they are no JSON. Mamba's config.json has one.
_NOT_NUMBERS = re.compile(rb"(?<=[\s:,\[])(?:-?Infinity|NaN)(?=[\s,\]}])")


class Contents(Protocol):
    """The files of a model. `sizes`: the bytes of each by its path."""

    sizes: Mapping[str, int]

    def opened(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A context with one file, open for reading and seeking. Raises OSError, or CachdError."""


class StoredContents:
    """The files of a manifest whose blobs are in the store."""

    def __init__(self, manifest: Manifest, content: ContentStore) -> None:
        self.sizes: Mapping[str, int] = {file.path: file.size for file in manifest.files}
        self._files: Mapping[str, File] = {file.path: file for file in manifest.files}
        self._content = content

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        """Raises DiskFailed, Leased or Unavailable."""
        with self._content.reads.reading(), self._content.opened(self._files[path]) as opened:
            yield opened


class UnreadError(Exception):
    """A file was not examined, because the budget is used up or the file cannot be read now."""


class NotADocumentError(Exception):
    """A JSON file cannot be used. Its text says why."""


class Examined:
    """A model under examination: its files, what may still be read of them, and what was found."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.paths = sorted(contents.sizes)
        self.present = frozenset(self.paths)
        self._files, self._bytes, self.tokens = MAX_FILES, MAX_BYTES, MAX_TOKENS
        self._findings: list[Finding] = []
        self._counts: Counter[tuple[str, Level]] = Counter()
        self._unread: list[str] = []

    @contextmanager
    def opened(self, path: str, *, reads: int) -> Iterator[BinaryIO]:
        """A context with a file of which at most `reads` bytes are read.

        Raises UnreadError. A file on which a pod holds a lease counts as read: it was examined before.
        """
        self._files -= 1
        self._bytes -= min(reads, self.contents.sizes[path])
        if self._files < 0 or self._bytes < 0 or self.tokens <= 0:
            self._unread.append(path)
            raise UnreadError
        try:
            with self.contents.opened(path) as opened:
                yield opened
        except Leased as error:
            raise UnreadError from error
        except UnreadError:
            self._unread.append(path)
            raise

    def unread(self, path: str) -> None:
        """Note that a file was not examined in full."""
        self._unread.append(path)

    def document(self, path: str) -> Any:
        """The value of a JSON file of the model; None if there is none. Raises NotADocumentError."""
        if path not in self.present:
            return None
        size, most = self.contents.sizes[path], _DOCUMENT.size_bytes
        if size > most:
            raise NotADocumentError(f"it has {size} bytes, and a preflight reads at most {most}")
        try:
            with self.opened(path, reads=most) as opened:
                content = _NOT_NUMBERS.sub(b"0", opened.read(most))
            return load_json(content, path, _DOCUMENT)
        except UnreadError:
            return None
        except ValueError as error:
            raise NotADocumentError("it is not JSON") from error
        except Invalid as error:
            raise NotADocumentError(error.detail) from error

    def mapping(self, path: str) -> dict[str, Any] | None:
        """As `document`, for a file that must be a JSON object. Raises NotADocumentError."""
        found = self.document(path)
        if found is not None and not isinstance(found, dict):
            raise NotADocumentError("it is not a JSON object")
        return found

    def found(
        self, code: Code, level: Level, detail: str, file: str = "", hint: str = "", **numbers: int
    ) -> None:
        """Add a finding. Of one code and level, twenty are kept and the others counted."""
        self._counts[code, level] += 1
        if self._counts[code, level] <= _MAX_OF_ONE_CODE:
            self._findings.append(Finding(code.value, level, detail, file, hint, tuple(numbers.items())))

    def findings(self) -> tuple[Finding, ...]:
        """All findings, in the order of the codes."""
        if self._unread:
            some = ", ".join(f"{path!r:.100}" for path in self._unread[:3])
            self.found(
                Code.not_examined,
                Level.warning,
                f"{len(self._unread)} files were not examined, such as {some}",
                hint="pull fewer forms of the weights (weights, --weights)",
                files=len(self._unread),
            )
        more = [
            Finding(code, level, f"{count - _MAX_OF_ONE_CODE} more", numbers=(("findings", count),))
            for (code, level), count in self._counts.items()
            if count > _MAX_OF_ONE_CODE
        ]
        order = list(Code)
        return tuple(sorted([*self._findings, *more], key=lambda each: order.index(Code(each.code))))
