"""The journal of an ingest: records which parts have arrived, so that a resume need not fetch them again.

    ingest/<algorithm>-<hex>-<size>/
        received     a line for each part and progress, as in part_lines.py
        journal      the same lines, written after their bytes are synced

`received` survives a crash of the daemon, because the kernel still has the written bytes. It is never synced
and costs one write per few mebibytes. `journal` survives a crash of the node: a line is written only after
its bytes are on the disk.

A line is a claim: a resume trusts it only if the bytes still have its hash (recovery.py).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from cachd.errors import DiskFailed, NoSpace, Unavailable
from cachd.kernel import durable
from cachd.model import Extent, File
from cachd.store.digests import PartHash
from cachd.store.ingest.about import About
from cachd.store.ingest.data_file import DataFile
from cachd.store.ingest.part_lines import line_of, read_parts

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded:
    """The lines for the extents that begin at `start`.

    `lines`: (stop, hash) of each, the shortest first. The journal has the bytes before `synced_stop`.
    """

    start: int
    lines: tuple[tuple[int, str], ...]
    synced_stop: int


class Journal:
    """The journal of one ingest, whose bytes are in `data`. Safe from any thread.

        open --keep--> noted --sync--> durable
               (any failure of a sync) --> broken: `sync` raises DiskFailed from then on

    Methods raise NoSpace, Unavailable or DiskFailed; only `begin`, `recorded` and `end_torn_line` raise
    OSError and Leased instead.
    """

    def __init__(
        self,
        directory: Path,
        file: File,
        data: DataFile,
        about: About,
        synced: Callable[[Sequence[Extent]], None] = lambda _parts: None,
    ) -> None:
        """`synced` is called with the parts that a sync has made durable."""
        self._directory, self._file, self._data, self._about = directory, file, data, about
        self._received, self._path = directory / "received", directory / "journal"
        self._lock = threading.Lock()
        self._notes = durable.Notes(self._received)
        self._unsynced: dict[PartHash, tuple[str, Extent]] = {}  # lines that the journal lacks
        self._synced = synced
        self._is_due = self._is_syncing = False  # a part has finished; a thread syncs
        self._is_broken = False
        self._fd: int | None = None

    def begin(self) -> None:
        """Remove the lines of an earlier run, because they are about other bytes."""
        self._notes.close()
        for path in (self._received, self._path):
            durable.remove(path)
        self._about.begin()

    def recorded(self) -> Iterator[Recorded]:
        """What an earlier run recorded, in order."""
        lines: dict[int, list[tuple[int, str]]] = {}
        synced: dict[int, int] = {}
        for path in (self._received, self._path):
            for part, expected in read_parts(path, self._file.size):
                lines.setdefault(part.start, []).append((part.stop, expected))
                if path == self._path:
                    synced[part.start] = max(part.stop, synced.get(part.start, part.stop))
        for start in sorted(lines):
            yield Recorded(start, tuple(sorted(lines[start])), synced.get(start, start))

    def end_torn_line(self) -> None:
        """End a line that a crash has cut off, so that it does not spoil the next one."""
        if self._received.exists():
            self._notes.append("\n")

    def keep(self, part: Extent, hashed: PartHash) -> None:
        """Let a part's bytes, which are written, survive a crash of the daemon.

        When this is not possible now, it does nothing: the next `keep` of the part tries again.
        """
        line = self.add_unsynced(part, hashed)
        with suppress(Unavailable, NoSpace), durable.disk_errors(self._directory), self._lock:
            self._notes.append(line)

    def add_unsynced(self, part: Extent, hashed: PartHash) -> str:
        """Let the next `sync` include a part. Returns its line."""
        line = line_of(part, hashed)
        with self._lock:
            self._unsynced[hashed] = line, part
        return line

    def sync(self) -> None:
        """Let all parts that were kept until now survive a crash of the node.

        One thread syncs for all that call this meanwhile; the others return at once. If another thread
        discards the ingest meanwhile, because its digest is wrong, nothing needs to survive.
        """
        with self._lock:
            if self._is_broken:
                raise DiskFailed(f"{self._directory}: an earlier sync failed", errno=errno.EIO)
            self._is_due = True
            if self._is_syncing:
                return
            self._is_syncing = True
        try:
            while unsynced := self._take_unsynced():
                self._data.sync()  # first: the journal must not list bytes that a crash can lose
                with durable.disk_errors(self._directory):
                    durable.append(self._opened(), "".join([line for line, _ in unsynced]))
                log.debug("part made durable", path=self._file.path, parts=len(unsynced))
                self._synced([part for _, part in unsynced])
        except Unavailable:  # no free descriptor for the journal: these parts only survive in `received`
            with self._lock:
                self._is_syncing = False
        except BaseException:
            with self._lock:
                self._is_syncing, self._is_broken = False, True
            if self._directory.exists():
                raise
            log.debug("ingest discarded during a sync", path=self._file.path)

    def _take_unsynced(self) -> list[tuple[str, Extent]]:
        """The lines and parts of all that was kept since the last sync; none without a `sync` since then."""
        with self._lock:
            self._is_syncing, self._is_due = self._is_due, False
            if not self._is_syncing:
                return []
            unsynced, self._unsynced = self._unsynced, {}
            if not unsynced:
                self._is_syncing = False
            return list(unsynced.values())

    def _opened(self) -> int:
        if self._fd is None:
            self._about.write()
            self._fd = durable.open_file(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            for directory in (self._directory, self._directory.parent):
                durable.sync_directory(directory)  # without a durable name the journal may be lost
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                durable.append(self._fd, "\n")  # end a torn line, or it would spoil the next one
        return self._fd

    def rewrite(self, lines: str) -> None:
        """Replace all lines with `lines`, whose bytes are written. No other thread may use it meanwhile."""
        self._unsynced.clear()
        self.close()
        with durable.disk_errors(self._directory):
            durable.remove(self._received)
        self._data.sync()  # first, as in `sync`
        with durable.disk_errors(self._directory):
            durable.write_file(self._path, lines.encode(), mode=0o600)

    def close(self) -> None:
        """Close the files; they stay on the disk. The next `keep` and the next `sync` open them again."""
        self._notes.close()
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
