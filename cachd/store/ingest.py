"""The resumable write of one blob.

    ingest/<algorithm>-<hex>/
        data         the file at its full size. Parts are written in place, in any order. Blocks are allocated
                     as bytes arrive: a size that a source only claims takes no disk space
        about.json   which blob this is, and the source that all bytes came from (null: several sources)
        received     one line per part and progress: "<start> <stop> <hash of the bytes between>"
        journal      the same lines, written after their bytes are synced
        owners       the names whose pulls need the blob (content.py)

`received` survives a crash of the daemon, because the kernel still has the written bytes. It is never synced
and costs one write per few mebibytes. `journal` survives a crash of the node: a line is written only after
its bytes are on the disk.

A resume trusts a line only if the bytes still have its hash. Bytes that only `received` lists are then
written again: the kernel reports a failed write to one sync only (man 2 fsync), perhaps to one of the crashed
process. Written again, they are covered by the next sync.

sha256 needs the bytes in order. Bytes that arrive at the hashed offset are hashed at once; the rest are read
back from the page cache later. The CRC of a file is combined from the CRCs of its parts, which are computed
as the bytes arrive. A file without a digest has part hashes only. In these two cases, only bytes that no part
hash covers are read back.

    begun --write*, received*--> complete --follow*--> hashed --commit--> blob
      | ^                                                 | |
      | +-------forget: some parts are fetched again------+ +--discard--> gone
      +--close--> kept, resumed by the next begin
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import Cancelled, DiskFailed, Leased, NoSpace, Unavailable
from cachd.kernel import durable
from cachd.model import Digest, Extent, File
from cachd.policy.parts import Received
from cachd.store.digests import NO_SHA256, Hasher, PartHash, checksum, in_order

log = structlog.get_logger(__name__)

READ_BYTES = 1 << 20
_LONGEST_JOURNAL_BYTES = 64 << 20  # a part takes about sixty bytes
_FOLLOWED_BYTES = 64 << 20  # hashed per call of `follow`, at most
_NUMBER = re.compile(r"[0-9]{1,18}")


class Ingest:
    """One blob being written.

    Many threads may call `write`, `received`, `keep` and `finish` at once, for disjoint parts. Only one
    thread at a time may call `follow` or `take`. The caller closes the ingest after all others have left it.

    `is_of_one_source`: all bytes came from the file's own source.

    Any method may raise NoSpace when the disk is full, Unavailable when too many files are open, and
    DiskFailed when the disk fails otherwise.
    """

    def __init__(self, directory: Path, file: File, check: Callable[[], None] = lambda: None) -> None:
        """Begin or resume. `check` is called while existing bytes are read back. When it raises Cancelled,
        the existing bytes stay for the next resume."""
        self.file = file
        self.directory = directory
        self._check = check
        self._lock = threading.Lock()
        self._received = Received()
        self._unsynced: dict[PartHash, str] = {}  # lines that the journal lacks
        self._is_due = self._journalling = False  # a part has finished; a thread writes the journal
        self._is_broken = False  # a sync has failed
        self._journal: int | None = None
        self._checksum = checksum(file.digest)
        self._hasher = in_order(file.digest, file.size) if file.digest and not self._checksum else None
        self._sha256_hasher = self._new_sha256_hasher()
        self.is_of_one_source = True
        self._describing = threading.Lock()  # one thread at a time writes about.json
        self._hashed = 0
        self._parts: dict[PartHash, Extent] = {}  # the extent that each hash covers
        with durable.disk_errors(directory):
            directory.mkdir(mode=0o700, exist_ok=True)
            if durable.is_regular(directory / "data"):
                os.chmod(directory / "data", 0o600)  # read-only if the daemon crashed between seal and rename
            self._data = durable.open_file(directory / "data", os.O_RDWR | os.O_CREAT)
            try:
                self._resume()
                durable.set_size(self._data, file.size)
            except Leased:
                self.close()  # the existing bytes may be intact, and can be read later
                raise
            except OSError as error:
                if error.errno in durable.SCARCE:
                    self.close()
                else:
                    self.discard()
                raise
            except Cancelled:
                self.close()
                raise
            except BaseException:
                self.discard()
                raise
        self.resumed = self._received.bytes

    # --- progress ---

    @property
    def is_whole(self) -> bool:
        """Whether every byte has been received."""
        return self.prefix == self.file.size

    @property
    def is_hashed(self) -> bool:
        return self._hashed == self.file.size

    @property
    def behind(self) -> int:
        """Bytes that `follow` can hash now."""
        prefix = self.prefix
        return prefix - self._hashed if self._hasher or prefix == self.file.size else 0

    @property
    def prefix(self) -> int:
        """Bytes from the start of the file that are here without a gap."""
        with self._lock:
            return self._received.prefix

    def gaps(self) -> list[Extent]:
        """The extents still to be fetched."""
        with self._lock:
            return list(self._received.gaps(self.file.size))

    @property
    def allocated(self) -> int:
        """Bytes of disk that the data occupies."""
        return os.fstat(self._data).st_blocks * 512

    # --- streams ---

    def comes_from(self, file: File) -> None:
        """Note that the next bytes come from the source of `file`. To be called before they are written.

        With bytes of two sources, the ingest proves for neither that it has the file.
        """
        if file.base == self.file.base:
            return
        with self._describing:  # held while it is written: before that, no byte of another source may be
            if self.is_of_one_source:
                self.is_of_one_source = False
                with durable.disk_errors(self.directory):
                    durable.write_file(self.directory / "about.json", self._about(), mode=0o600)

    def allocate(self, extent: Extent) -> None:
        """Allocate disk blocks for an extent, so that a full disk fails here and not at a later write."""
        with durable.disk_errors(self.directory):
            durable.preallocate(self._data, extent.start, extent.size)

    def write(self, offset: int, view: memoryview) -> None:
        with durable.disk_errors(self.directory):
            durable.write_at(self._data, view, offset)

    def received(self, extent: Extent) -> None:
        """Count bytes just written as received. Without `keep`, a crash of the daemon loses them."""
        with self._lock:
            self._received.add(extent)

    def part_hash(self) -> PartHash:
        """A new part hash: the caller feeds it the part's bytes in order, then passes it to `finish`."""
        return PartHash(self._checksum)

    def keep(self, extent: Extent, hashed: PartHash) -> None:
        """Let the received bytes of a part, which `hashed` covers exactly, survive a crash of the daemon.

        Call it again, with the same `hashed`, when more of the part has arrived.
        """
        line = _line(extent, hashed)
        with self._lock:
            self._parts[hashed], self._unsynced[hashed] = extent, line
        with suppress(Unavailable, NoSpace), durable.disk_errors(self.directory):  # the next call tries again
            durable.append_note(self.directory / "received", line)

    def finish(self, part: Extent, hashed: PartHash) -> None:
        """Let a complete part, and what was kept of other parts, survive a crash of the node.

        One thread syncs for all parts that finish meanwhile. A failed sync is final: the kernel reports the
        error once, and the next sync may succeed although bytes are lost (man 2 fsync). So after a failed
        sync this raises DiskFailed and writes no journal line. A file of one part is synced by its commit.
        """
        self.keep(part, hashed)
        with self._lock:
            if self._is_broken:
                raise DiskFailed(f"{self.directory}: an earlier sync failed", errno=errno.EIO)
            if part.size == self.file.size:
                return
            self._is_due = True
            if self._journalling:
                return
            self._journalling = True
        self._write_journal()

    def _write_journal(self) -> None:
        try:
            while lines := self._take_unsynced():
                with durable.disk_errors(self.directory):
                    durable.sync(self._data)  # first: the journal must not list bytes that a crash can lose
                    durable.append(self._open_journal(), "".join(lines))
                log.debug("part made durable", path=self.file.path, parts=len(lines))
        except Unavailable:  # no free descriptor for the journal: these parts only survive in `received`
            with self._lock:
                self._journalling = False
        except BaseException:
            with self._lock:
                self._journalling, self._is_broken = False, True
            raise

    def _take_unsynced(self) -> list[str]:
        """The journal lines of all that was kept since the last sync; none if no part has finished since."""
        with self._lock:
            self._journalling, self._is_due = self._is_due, False
            if not self._journalling:
                return []
            lines, self._unsynced = self._unsynced, {}
            return list(lines.values())

    def _open_journal(self) -> int:
        if self._journal is None:
            with self._describing:
                durable.write_file(self.directory / "about.json", self._about(), mode=0o600)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._journal = durable.open_file(self.directory / "journal", flags)
            for directory in (self.directory, self.directory.parent):
                durable.sync_directory(directory)  # without a durable name the journal may be lost
            size = os.fstat(self._journal).st_size
            if size and os.pread(self._journal, 1, size - 1) != b"\n":
                durable.append(self._journal, "\n")  # end a torn line, or it would spoil the next one
        return self._journal

    # --- the digest ---

    def follow(self, buffer: memoryview) -> None:
        """Hash the bytes that are `behind`, reading them back through `buffer`.

        If the digest needs the bytes in order, one call hashes at most 64 MiB, so that a caller who loops can
        stop soon.
        """
        if self._hasher is None:
            if self.is_whole:
                self._tile(buffer)
                self._hashed = self.file.size
            return
        stop = min(self.prefix, self._hashed + _FOLLOWED_BYTES)
        while self._hashed < stop:
            view = buffer[: min(len(buffer), stop - self._hashed)]
            self._read(view, self._hashed)
            self.take(view)

    def takes_from(self, offset: int) -> bool:
        """Whether the digest needs the bytes in order and the next one it needs is at `offset`."""
        return self._hasher is not None and self._hashed == offset

    def take(self, view: memoryview) -> None:
        """Hash bytes that have just arrived at the hashed offset, while they are in the processor's cache.

        The caller must be the one thread that may call `follow`.
        """
        if self._hasher is not None:
            self._hasher.update(view)
            if self._sha256_hasher:
                self._sha256_hasher.update(view)
            self._hashed += len(view)

    def _new_sha256_hasher(self) -> Hasher | None:
        """A hasher for the sha256 of a file whose source states a git-sha1; None for any other file.

        A CRC is far faster than sha256, which would slow the pull down: a scrub computes the sha256 later.
        """
        has_git_sha1 = self.file.digest is not None and self.file.digest.algorithm == "git-sha1"
        return in_order(NO_SHA256, self.file.size) if has_git_sha1 else None

    @property
    def sha256(self) -> Digest | None:
        """The sha256 of a hashed file, if it was computed in addition to the digest of its manifest."""
        return self._sha256_hasher.digest() if self._sha256_hasher else None

    def read_sha256(self) -> Digest:
        """The sha256 of a hashed file, computed by reading the data back."""
        hasher, buffer = in_order(NO_SHA256, self.file.size), memoryview(bytearray(READ_BYTES))
        for at in range(0, self.file.size, READ_BYTES):
            view = buffer[: min(READ_BYTES, self.file.size - at)]
            self._read(view, at)
            hasher.update(view)
        return hasher.digest()

    def digest(self) -> Digest | None:
        """The digest of a hashed file by the algorithm of its manifest; None when the manifest has no digest.

        Raises ValueError before the file is hashed.
        """
        if not self.is_hashed:
            raise ValueError(
                f"{self.file.path}: digest asked for at {self._hashed} of {self.file.size} bytes"
            )
        if self._hasher:
            return self._hasher.digest()
        if self._checksum:
            return self._checksum.joined((h.checksum, part.size) for part, h in self._in_order())
        return None

    @property
    def agrees(self) -> bool:
        """Whether a hashed file has the digest of its manifest; True when the manifest has no digest."""
        return self.file.digest in (None, self.digest())

    @property
    def parts(self) -> frozenset[Extent]:
        """The extents that have a part hash."""
        with self._lock:
            return frozenset(self._parts.values())

    def spoiled(self, buffer: memoryview) -> frozenset[Extent]:
        """The parts of a hashed file whose bytes on disk are not the bytes that were received."""
        return frozenset(p for p, h in self._in_order() if self._hash(p, buffer).hexdigest != h.hexdigest)

    def forget(self, parts: frozenset[Extent]) -> None:
        """Mark these parts as missing, so that they are fetched again. Only the other parts stay received.

        No other thread may use the ingest meanwhile.
        """
        with self._lock:
            self._parts = {hashed: part for hashed, part in self._parts.items() if part not in parts}
            self._unsynced.clear()
            self._received = Received()
            for part in self._parts.values():
                self._received.add(part)
        self._hashed = 0
        if self._hasher and self.file.digest:
            self._hasher = in_order(self.file.digest, self.file.size)
            self._sha256_hasher = self._new_sha256_hasher()
        with durable.disk_errors(self.directory):
            if self._journal is not None:
                os.close(self._journal)
                self._journal = None
            durable.remove(self.directory / "received")
            durable.sync(self._data)
            durable.write_file(self.directory / "journal", self.part_lines().encode(), mode=0o600)

    def part_lines(self) -> str:
        """The part hashes of a hashed file as journal lines. No part overlaps another.

        They cover the complete file, unless its digest needs the bytes in order: then they may leave gaps.
        """
        return "".join(_line(part, hashed) for part, hashed in self._tiles().items())

    def _in_order(self) -> list[tuple[Extent, PartHash]]:
        with self._lock:
            found = [(part, hashed) for hashed, part in self._parts.items()]
        return sorted(found, key=lambda item: item[0].start)

    def _tiles(self) -> dict[Extent, PartHash]:
        """The parts that overlap no other. Where two streams wrote, neither hash is sure to be the disk's."""
        tiles: dict[Extent, PartHash] = {}
        reached = 0
        for part, hashed in self._in_order():
            if part.start >= reached:
                tiles[part] = hashed
            else:
                tiles = {p: h for p, h in tiles.items() if p.stop <= part.start}
            reached = max(reached, part.stop)
        return tiles

    def _tile(self, buffer: memoryview) -> None:
        """Make the part hashes cover every byte once: read back what no part covers, or two parts do."""
        covered, tiles = Received(), self._tiles()
        for part in tiles:
            covered.add(part)
        for gap in covered.gaps(self.file.size):
            tiles[gap] = self._hash(gap, buffer)
        with self._lock:
            self._parts = {hashed: part for part, hashed in tiles.items()}

    def _read(self, view: memoryview, offset: int) -> int:
        with durable.disk_errors(self.directory):
            got = 0
            while got < len(view):
                n = os.preadv(self._data, [view[got:]], offset + got)
                if not n:
                    raise DiskFailed(f"{self.directory}: data ends at {offset + got}", code="disk_failed")
                got += n
        return got

    # --- repair ---

    def salvage(self, damaged: Path) -> None:
        """Copy missing parts from a damaged blob: those that still have their recorded hash.

        The damaged blob is not changed. A part that the disk cannot read counts as damaged.
        """
        buffer = memoryview(bytearray(READ_BYTES))
        fd = durable.open_file(damaged, os.O_RDONLY)
        try:
            here = self.parts
            for part, expected in read_parts(parts_of(damaged), self.file.size):
                if part in here:
                    continue
                with suppress(OSError):
                    hashed = self._copy(fd, part, buffer)
                    if hashed is not None and hashed.hexdigest == expected:
                        self._trust_unsynced(part, hashed)
        finally:
            os.close(fd)
        self.is_of_one_source = False
        self._is_due = bool(self._unsynced)
        self._write_journal()
        self.resumed = self._received.bytes

    def _copy(self, fd: int, part: Extent, buffer: memoryview) -> PartHash | None:
        """Copy a part from the file `fd`. Returns its hash, or None if that file is short. Raises OSError."""
        hashed, offset = self.part_hash(), part.start
        while offset < part.stop:
            got = os.preadv(fd, [buffer[: part.stop - offset]], offset)
            if not got:
                return None
            hashed.update(buffer[:got])
            self.write(offset, buffer[:got])
            offset += got
        return hashed

    # --- the end ---

    def seal(self) -> Path:
        """Make the data read-only and durable. Returns its path."""
        with durable.disk_errors(self.directory):
            durable.seal(self._data)
        return self.directory / "data"

    def close(self) -> None:
        """Close the ingest; its files stay for the next begin. Closing twice is fine."""
        for name in ("_data", "_journal"):
            fd = getattr(self, name, None)
            if fd is not None and fd >= 0:
                os.close(fd)
            setattr(self, name, -1 if name == "_data" else None)

    def discard(self) -> None:
        """Close the ingest and delete its directory."""
        self.close()
        with durable.disk_errors(self.directory):
            durable.remove_tree(self.directory)

    # --- resume ---

    def _resume(self) -> None:
        """Trust each line whose bytes still have its hash. Write the bytes again that were not synced."""
        about, received, journal = (self.directory / name for name in ("about.json", "received", "journal"))
        earlier = _read_about(about, self.file)
        if earlier is None:
            for path in (received, journal, about):
                durable.remove(path)
            durable.write_note(about, self._about())
            return
        self.is_of_one_source = earlier.get("base") == self.file.base
        if not self.is_of_one_source:
            durable.write_note(about, self._about())
        lines: dict[int, list[tuple[int, str]]] = {}  # (stop, hash) by start
        synced: dict[int, int] = {}  # where the journal's longest extent stops, by start
        for path in (received, journal):
            for part, expected in read_parts(path, self.file.size):
                lines.setdefault(part.start, []).append((part.stop, expected))
                if path == journal:
                    synced[part.start] = max(part.stop, synced.get(part.start, 0))
        buffer = memoryview(bytearray(READ_BYTES))
        for start in sorted(lines):
            self._resume_from(start, sorted(lines[start]), synced.get(start, start), buffer)
        if received.exists():
            durable.append_note(received, "\n")  # end a torn line, or it would spoil the next one

    def _resume_from(self, start: int, lines: list[tuple[int, str]], synced: int, buffer: memoryview) -> None:
        """Of several extents that begin at `start`, trust the longest whose bytes have its line's hash.

        Bytes that cannot be read back count as missing. `synced`: the bytes before it are in the journal.
        """
        hashed, reached = self.part_hash(), start
        longest: tuple[Extent, PartHash] | None = None
        with suppress(DiskFailed):
            for stop, expected in lines:
                self._hash_on(hashed, reached, stop, buffer)
                reached = stop
                if hashed.hexdigest == expected:
                    longest = Extent(start, stop), hashed.copy()
        if longest is None:
            return
        part, hashed = longest
        if part.stop <= synced:
            self._received.add(part)
            self._parts[hashed] = part
            return
        with suppress(DiskFailed):
            self._write_again(synced, part.stop, buffer)
            self._trust_unsynced(part, hashed)

    def _write_again(self, start: int, stop: int, buffer: memoryview) -> None:
        while start < stop:
            view = buffer[: min(len(buffer), stop - start)]
            self._read(view, start)
            self.write(start, view)
            start += len(view)

    def _trust_unsynced(self, part: Extent, hashed: PartHash) -> None:
        """Count a part that is on disk, but not synced yet, as received."""
        self._received.add(part)
        self._parts[hashed], self._unsynced[hashed] = part, _line(part, hashed)

    def _about(self) -> bytes:
        file = self.file
        about = {
            "origin": file.origin,
            "size": file.size,
            "blob": str(file.blob),
            "validator": file.validator,
            "base": file.base if self.is_of_one_source else None,
        }
        return json.dumps(about, indent=1).encode()

    def _hash(self, part: Extent, buffer: memoryview) -> PartHash:
        """The hash of a part's bytes on disk."""
        hashed = self.part_hash()
        self._hash_on(hashed, part.start, part.stop, buffer)
        return hashed

    def _hash_on(self, hashed: PartHash, start: int, stop: int, buffer: memoryview) -> None:
        while start < stop:
            self._check()
            view = buffer[: min(len(buffer), stop - start)]
            self._read(view, start)
            hashed.update(view)
            start += len(view)


def _line(part: Extent, hashed: PartHash) -> str:
    return f"{part.start} {part.stop} {hashed.hexdigest}\n"


def _read_about(path: Path, file: File) -> dict[str, object] | None:
    """The about.json of an earlier run, if it describes the file's blob with the file's size; else None."""
    try:
        about = durable.read_document(path)
        return dict(about) if about["blob"] == str(file.blob) and about["size"] == file.size else None
    except (FileNotFoundError, files.TooLong, ValueError, TypeError, KeyError, RecursionError):
        return None


def parts_of(blob: Path) -> Path:
    """The path of a blob's part hashes. A blob with a digest that arrived as one part has none."""
    return blob.with_name(blob.name + ".parts")


def read_parts(journal: Path, size: int) -> Iterable[tuple[Extent, str]]:
    """The (extent, hash) of each valid line of a journal; none when there is no journal or it is too long."""
    try:
        written = durable.read_file(journal, at_most=_LONGEST_JOURNAL_BYTES)
    except (FileNotFoundError, files.TooLong):
        return
    for line in io.BytesIO(written):
        words = line.decode("ascii", "replace").rstrip("\r\n").split(" ")
        if len(words) == 3 and all(_NUMBER.fullmatch(word) for word in words[:2]):
            start, stop = int(words[0]), int(words[1])
            if start < stop <= size:
                yield Extent(start, stop), words[2]
