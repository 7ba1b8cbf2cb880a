"""Remembers, for each shared blob, which sources have proven that they have its content.

    .cachd/proven    one line per proof: "<sha256 of the source's base> <blob>"

A source is known by its base: a ref without the revision.

A blob named by its sha256 can serve every source that lists this digest. But a source can list a digest
without having the content. So a source may use a shared blob only after it has sent the complete content, or
random samples of it (transfer/proof.py).

A proof stays valid after its model is removed, but not after its blob is. Lines are not synced. If a power
loss removes a line, the source must prove again, unless a manifest of this source has the blob
(transfer/pull.py). The sweep drops the lines of removed blobs: a start must not wait for a look at each blob.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import structlog

from cachd.errors import CachdError, Leased
from cachd.kernel import durable
from cachd.model import Digest, File

log = structlog.get_logger(__name__)

_MAX_TRIES = 3
_MAX_LINES = 500_000  # at start, only so many lines at the end of the file are read


class Proven:
    """The proofs of all sources, kept across restarts. Safe from any thread.

    `is_here`: whether a blob is on disk. `trusts_claims`: no source needs a proof.
    """

    def __init__(self, path: Path, is_here: Callable[[Digest], bool], *, trusts_claims: bool = False) -> None:
        self._path, self._is_here, self._trusts_claims = path, is_here, trusts_claims
        self._lock = threading.Lock()
        self._unfinished: dict[Digest, int] = {}  # how many proofs have begun, by blob
        self._notes = durable.Notes(path)
        self._pulls = 0  # running pulls, which may add proofs
        self._proven: dict[str, set[str]] = {}  # sources by blob
        lines = self._read()
        for line in lines or ():
            source, _, blob = line.partition(" ")
            self._proven.setdefault(blob, set()).add(source)
        if lines == []:
            self._rewrite()  # removes a file without lines

    def has(self, file: File) -> bool:
        """Whether the file's source may use the blob without a further proof.

        A private blob came from this very source. The Hub checks its listings itself: only somebody who has
        uploaded an LFS file, or may read it, can list it.
        """
        if file.is_private or file.base.startswith("hf://") or self._trusts_claims:
            return True
        sources = self._proven.get(str(file.blob))
        return sources is not None and _source(file.base) in sources

    def begin_proof(self, file: File) -> bool:
        """Count a proof that begins, and return whether samples are enough for it.

        After 3 unfinished proofs of this blob, by any source, the complete file is needed. Otherwise somebody
        who has only a part of the blob could try until all samples lie in this part.
        """
        with self._lock:
            begun = self._unfinished[file.blob] = self._unfinished.get(file.blob, 0) + 1
            return begun <= _MAX_TRIES

    def add(self, file: File) -> None:
        """Remember that the file's source has proven to have the blob."""
        if self.has(file):
            return
        source = _source(file.base)
        with self._lock:
            self._proven.setdefault(str(file.blob), set()).add(source)
            with suppress(OSError, Leased):  # a lost line is proven again
                self._notes.append(f"{_line(source, file.blob)}\n")
            if not self._pulls:
                self._notes.close()
            if left := self._unfinished.pop(file.blob, 1) - 1:
                self._unfinished[file.blob] = left

    @contextmanager
    def during_pull(self) -> Iterator[None]:
        """Keep the file of lines open: a pull of many small files adds one line for each file."""
        with self._lock:
            self._pulls += 1
        try:
            yield
        finally:
            with self._lock:
                self._pulls -= 1
                if not self._pulls:
                    self._notes.close()

    def forget(self, blob: Digest) -> None:
        """Forget all proofs of a blob that was removed."""
        with self._lock:
            was_there = self._proven.pop(str(blob), None)
            if was_there and not self._proven:
                self._rewrite()

    def drop_stale(self) -> None:
        """Drop the lines of blobs that are not here."""
        stale = [blob for blob in list(self._proven) if not self._is_there(blob)]
        with self._lock:
            for blob in stale:
                if not self._is_there(blob):  # a pull may have brought it meanwhile
                    self._proven.pop(blob, None)
            if stale:
                self._rewrite()

    def _is_there(self, blob: str) -> bool:
        with suppress(CachdError):  # a torn line
            return self._is_here(Digest.parse(blob))
        return False

    def _read(self) -> list[str] | None:
        """The lines of the file; None when it cannot be read, and then it stays for the next start."""
        try:
            with open(durable.open_file(self._path, os.O_RDONLY), "rb") as opened:
                lines = deque(opened, _MAX_LINES)
            return [line.decode("ascii", "replace").rstrip("\n") for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, Leased) as error:
            log.warning("proofs of sources not read", reason=repr(error))
            return None

    def _rewrite(self) -> None:
        self._notes.close()  # the path gets a new file
        with suppress(CachdError), durable.disk_errors(self._path):
            lines = sorted(_line(each, blob) for blob, sources in self._proven.items() for each in sources)
            if lines:
                durable.write_file(self._path, "".join(f"{line}\n" for line in lines).encode(), mode=0o600)
            else:
                durable.remove(self._path)


def _line(source: str, blob: object) -> str:
    return f"{source} {blob}"


@lru_cache(maxsize=64)
def _source(base: str) -> str:
    return hashlib.sha256(base.encode()).hexdigest()
