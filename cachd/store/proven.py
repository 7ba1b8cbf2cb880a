"""Which source has proven that it has the content of which shared blob: a line each, "<source> <blob>".

A blob named by its sha256 may serve every source that lists this digest, and whoever lists a digest need not
have its content. So a source gets a shared blob only after it has sent the whole of it, or some of it that it
could not choose (transfer/proof.py).

A line outlives its model, as long as the blob is here. It is never synced: what a loss of power
takes is proven again, or is found in the manifests that the source's own models have.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import structlog

from cachd.errors import CachdError, Leased
from cachd.model import Digest, File
from cachd.store import durable

log = structlog.get_logger(__name__)

_MOST_TRIES = 3
_MOST_LINES = 500_000  # the newest are kept at a start


class Proven:
    """What sources have proven, across restarts. Safe from any thread."""

    def __init__(self, path: Path, is_here: Callable[[Digest], bool], *, trusts_claims: bool = False) -> None:
        self._path, self._trusts_claims = path, trusts_claims
        self._lock = threading.Lock()
        self._begun: Counter[Digest] = Counter()
        self._notes = durable.Notes(path)
        lines = self._read()
        self._proven: dict[Digest, set[str]] = {}  # sources by blob
        for line in lines:
            if (told := _parsed(line)) and is_here(told[1]):
                self._proven.setdefault(told[1], set()).add(told[0])
        if sum(map(len, self._proven.values())) < len(lines) or not lines:
            self._rewrite()

    def has(self, file: File) -> bool:
        """Whether the file's source needs no proof any more that it has the blob, or never does.

        A private blob came from that very source. The Hub itself checks who lists an LFS file: only somebody
        who uploaded it, or may read it, can.
        """
        if file.is_private or file.base.startswith("hf://") or self._trusts_claims:
            return True
        sources = self._proven.get(file.blob)
        return sources is not None and _source(file.base) in sources

    def begins(self, file: File) -> bool:
        """A source begins its proof. Whether samples are enough: not after several that began and failed, as
        they do of who knows a part of the blob and tries until the samples are in it."""
        with self._lock:
            self._begun[file.blob] += 1
            return self._begun[file.blob] <= _MOST_TRIES

    def add(self, file: File) -> None:
        """The file's source has proven it."""
        if self.has(file):
            return
        source = _source(file.base)
        with self._lock:
            self._proven.setdefault(file.blob, set()).add(source)
            with suppress(CachdError), durable.disk_errors(self._path):  # else it is proven again
                self._notes.append(f"{_line(source, file.blob)}\n")
            if self._begun[file.blob] > 1:
                self._begun[file.blob] -= 1
            else:
                del self._begun[file.blob]

    def close(self) -> None:
        """Hold no descriptor until the next `add`."""
        with self._lock:
            self._notes.close()

    def forget(self, blob: Digest) -> None:
        """The blob is gone."""
        with self._lock:
            was_there = self._proven.pop(blob, None)
            if was_there and not self._proven:
                self._rewrite()

    def _read(self) -> list[str]:
        try:
            with open(durable.open_file(self._path, os.O_RDONLY), "rb") as told:
                lines = deque(told, _MOST_LINES)
            return list(dict.fromkeys(line.decode("ascii", "replace").rstrip("\n") for line in lines))
        except FileNotFoundError:
            return []
        except (OSError, Leased) as error:
            log.warning("what sources have proven not read", reason=repr(error))
            return []

    def _rewrite(self) -> None:
        self._notes.close()  # another file takes its place
        with suppress(CachdError), durable.disk_errors(self._path):
            lines = sorted(_line(each, blob) for blob, sources in self._proven.items() for each in sources)
            if lines:
                durable.write_file(self._path, "".join(f"{line}\n" for line in lines).encode(), mode=0o600)
            else:
                durable.remove(self._path)


def _line(source: str, blob: Digest) -> str:
    return f"{source} {blob}"


@lru_cache(maxsize=64)
def _source(base: str) -> str:
    return hashlib.sha256(base.encode()).hexdigest()


def _parsed(line: str) -> tuple[str, Digest] | None:
    """The source and the blob that a line names; None when the line is torn."""
    source, _, blob = line.partition(" ")
    if len(source) != hashlib.sha256().digest_size * 2:
        return None
    with suppress(CachdError):
        return source, Digest.parse(blob)
    return None
