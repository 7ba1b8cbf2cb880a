"""The resumable write of one blob.

    ingest/<algorithm>-<hex>/
        data         the file at its full size; parts are written in place, in any order, and get their blocks
                     as their bytes arrive: what a source claims takes none
        about.json   the file as its manifest describes it
        received     a line for what has come of a part so far: "<start> <stop> <hash of these bytes>"
        journal      the same lines, once their bytes are synced

`received` is for a process that dies: the kernel still has what was written. It is never synced, and costs
one write for every few mebibytes. `journal` is for a machine that dies: a line follows its data to the disk,
never the other way round.

A resume believes a line only if the bytes hash to it. What `received` alone tells of is then written once
more: the kernel reports a write that failed to one sync, which may have been that of the process that died.
So the next sync covers these bytes, too.

A digest that needs the bytes in order (sha256) takes those that land where it is, and follows the others,
read back from the page cache. A checksum that can be joined (CRC) comes from its parts', hashed while they
were received; without any digest the parts' own hashes are all there is. Only what no part's hash covers is
read back for these.

    begun --write*, landed*--> whole --follow*--> hashed --commit--> blob
      | ^                                            | |
      | +----forget: some parts are fetched again----+ +--discard--> gone
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
from cachd.model import Digest, Extent, File
from cachd.policy.parts import Received
from cachd.store import durable
from cachd.store.digests import NO_SHA256, Hasher, PartHash, checksum, in_order

log = structlog.get_logger(__name__)

READ_BYTES = 1 << 20
_LONGEST_JOURNAL_BYTES = 64 << 20  # some sixty bytes a part
_FOLLOWED_BYTES = 64 << 20
_NUMBER = re.compile(r"[0-9]{1,18}")


class Ingest:
    """One blob being written. Streams call `write`, `received` and `finish` from many threads for disjoint
    parts; one thread at a time calls `follow`. Whoever closes it has seen every other thread leave.

    `is_of_one_source`: no other source than the file's own has sent any of the bytes.

    Raises NoSpace when the file system cannot hold the file, Unavailable when too many files are open,
    DiskFailed when the disk refuses otherwise.
    """

    def __init__(self, directory: Path, file: File, check: Callable[[], None] = lambda: None) -> None:
        """`check` may raise Cancelled while what is here is read back: it stays for the next resume."""
        self.file = file
        self.directory = directory
        self._check = check
        self._lock = threading.Lock()
        self._received = Received()
        self._unsynced: dict[PartHash, str] = {}  # lines for the journal
        self._is_due = self._journalling = False
        self._is_broken = False
        self._journal: int | None = None
        self._checksum = checksum(file.digest)
        self._hasher = in_order(file.digest, file.size) if file.digest and not self._checksum else None
        self._own_hasher = self._begin_own()
        self.is_of_one_source = True
        self._hashed = 0
        self._parts: dict[PartHash, Extent] = {}  # what each hash covers
        with durable.disk_errors(directory):
            directory.mkdir(mode=0o700, exist_ok=True)
            if durable.is_regular(directory / "data"):
                os.chmod(directory / "data", 0o600)  # an earlier life ended between its seal and its rename
            self._data = durable.open_file(directory / "data", os.O_RDWR | os.O_CREAT)
            try:
                self._resume()
                durable.set_size(self._data, file.size)
            except Leased:
                self.close()  # what is here is good, and can be read later
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

    # --- what is here ---

    @property
    def is_whole(self) -> bool:
        return self.prefix == self.file.size

    @property
    def is_hashed(self) -> bool:
        return self._hashed == self.file.size

    @property
    def behind(self) -> int:
        """Bytes that `follow` would take in now."""
        prefix = self.prefix
        return prefix - self._hashed if self._hasher or prefix == self.file.size else 0

    @property
    def prefix(self) -> int:
        """Bytes from the start that are here without a gap."""
        with self._lock:
            return self._received.prefix

    def gaps(self) -> list[Extent]:
        """The extents still to be fetched."""
        with self._lock:
            return list(self._received.gaps(self.file.size))

    @property
    def allocated(self) -> int:
        """Bytes of disk that the data takes."""
        return os.fstat(self._data).st_blocks * 512

    # --- streams ---

    def allocate(self, extent: Extent) -> None:
        """Take the blocks of an extent, so that a full disk is met now."""
        with durable.disk_errors(self.directory):
            durable.preallocate(self._data, extent.start, extent.size)

    def write(self, offset: int, view: memoryview) -> None:
        with durable.disk_errors(self.directory):
            durable.write_at(self._data, view, offset)

    def received(self, extent: Extent) -> None:
        """Count bytes just written as here: for this life of the daemon, not yet for the next."""
        with self._lock:
            self._received.add(extent)

    def part_hash(self) -> PartHash:
        """What takes in a part's bytes from its first on, for `finish`."""
        return PartHash(self._checksum)

    def keep(self, extent: Extent, hashed: PartHash) -> None:
        """Make what has come of a part so far survive the process. `hashed` has taken in these bytes alone.

        Called again when more of the part has come, with the same `hashed`.
        """
        line = _line(extent, hashed)
        with self._lock:
            self._parts[hashed], self._unsynced[hashed] = extent, line
        with suppress(Unavailable, NoSpace), durable.disk_errors(self.directory):  # kept the next time
            durable.append_note(self.directory / "received", line)

    def finish(self, part: Extent, hashed: PartHash) -> None:
        """Make a whole part, and what was kept of others, survive the machine.

        One thread syncs for all parts finished meanwhile. A failed sync is final: the kernel tells it once,
        and the next may succeed without the bytes. So no line of the journal is written after one.
        A file of one part is synced by its commit.
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
                    durable.sync(self._data)  # the journal must never promise bytes that are not there
                    durable.append(self._open_journal(), "".join(lines))
                log.debug("part made durable", path=self.file.path, parts=len(lines))
        except Unavailable:  # no descriptor for the journal: these parts are there, for this life
            with self._lock:
                self._journalling = False
        except BaseException:
            with self._lock:
                self._journalling, self._is_broken = False, True
            raise

    def _take_unsynced(self) -> list[str]:
        """Lines for all that was kept since the last sync, if a part was finished since then."""
        with self._lock:
            self._journalling, self._is_due = self._is_due, False
            if not self._journalling:
                return []
            lines, self._unsynced = self._unsynced, {}
            return list(lines.values())

    def _open_journal(self) -> int:
        if self._journal is None:
            durable.write_file(self.directory / "about.json", self._about(), mode=0o600)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._journal = durable.open_file(self.directory / "journal", flags)
            for directory in (self.directory, self.directory.parent):
                durable.sync_directory(directory)  # a line in a file that has lost its name is no use
            size = os.fstat(self._journal).st_size
            if size and os.pread(self._journal, 1, size - 1) != b"\n":
                durable.append(self._journal, "\n")  # a torn line must not swallow the next
        return self._journal

    # --- the digest ---

    def follow(self, buffer: memoryview) -> None:
        """Take in what is `behind`, reading into `buffer` what must be read back; so much of it at most that
        who calls again and again can end it soon."""
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
        """Whether the digest follows the bytes, and `offset` is as far as it is."""
        return self._hasher is not None and self._hashed == offset

    def take(self, view: memoryview) -> None:
        """Take in what has just landed where the digest is, while it is in the processor's cache.

        Instead of `follow`, by whoever would be allowed to call it.
        """
        if self._hasher is not None:
            self._hasher.update(view)
            if self._own_hasher:
                self._own_hasher.update(view)
            self._hashed += len(view)

    def _begin_own(self) -> Hasher | None:
        """What takes the sha256 of a file beside a digest of its source that is as slow and names no content.

        A checksum is far faster: there, the sha256 waits until the blob is read again.
        """
        is_weak = self.file.digest is not None and self.file.digest.algorithm == "git-sha1"
        return in_order(NO_SHA256, self.file.size) if is_weak else None

    @property
    def sha256(self) -> Digest | None:
        """Of a hashed file whose source states another digest, where it was taken along."""
        return self._own_hasher.digest() if self._own_hasher else None

    def read_sha256(self) -> Digest:
        """The same of a hashed file, by reading it again."""
        hasher, buffer = in_order(NO_SHA256, self.file.size), memoryview(bytearray(READ_BYTES))
        for at in range(0, self.file.size, READ_BYTES):
            view = buffer[: min(READ_BYTES, self.file.size - at)]
            self._read(view, at)
            hasher.update(view)
        return hasher.digest()

    def digest(self) -> Digest | None:
        """The digest of the whole file by the algorithm its manifest names, None when it names none."""
        if not self.is_hashed:
            raise ValueError(f"{self.file.path}: digest asked at {self._hashed} of {self.file.size} bytes")
        if self._hasher:
            return self._hasher.digest()
        if self._checksum:
            return self._checksum.joined((h.checksum, part.size) for part, h in self._in_order())
        return None

    @property
    def agrees(self) -> bool:
        """Whether a hashed file has the digest that its manifest names, if it names one."""
        return self.file.digest in (None, self.digest())

    @property
    def parts(self) -> frozenset[Extent]:
        """The extents of a hashed file that have a hash of their own."""
        with self._lock:
            return frozenset(self._parts.values())

    def spoiled(self, buffer: memoryview) -> frozenset[Extent]:
        """The parts of a hashed file whose bytes on disk are not the bytes that came."""
        return frozenset(p for p, h in self._in_order() if self._hash(p, buffer).hexdigest != h.hexdigest)

    def forget(self, parts: frozenset[Extent]) -> None:
        """Let parts be fetched again, believing the others alone. Nobody else is at work on the ingest."""
        with self._lock:
            self._parts = {hashed: part for hashed, part in self._parts.items() if part not in parts}
            self._unsynced.clear()
            self._received = Received()
            for part in self._parts.values():
                self._received.add(part)
        self._hashed = 0
        if self._hasher and self.file.digest:
            self._hasher = in_order(self.file.digest, self.file.size)
            self._own_hasher = self._begin_own()
        with durable.disk_errors(self.directory):
            if self._journal is not None:
                os.close(self._journal)
                self._journal = None
            durable.remove(self.directory / "received")
            durable.sync(self._data)
            durable.write_file(self.directory / "journal", self.part_lines().encode(), mode=0o600)

    def part_lines(self) -> str:
        """The hashes of the parts of a hashed file, as the journal has them. None overlaps another.

        They cover all of a file without a digest; of one with a digest, what came in whole parts.
        """
        return "".join(_line(part, hashed) for part, hashed in self._tiles().items())

    def _in_order(self) -> list[tuple[Extent, PartHash]]:
        with self._lock:
            found = [(part, hashed) for hashed, part in self._parts.items()]
        return sorted(found, key=lambda item: item[0].start)

    def _tiles(self) -> dict[Extent, PartHash]:
        """The parts that overlap no other: where two streams wrote, what the disk holds counts."""
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
        """Let the parts' hashes cover the whole file once: read back what no part has, or two."""
        alone, tiles = Received(), self._tiles()
        for part in tiles:
            alone.add(part)
        for gap in alone.gaps(self.file.size):
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
        """Take over what is missing here from a damaged blob, as far as its parts still hash as they should.

        The damaged blob is only read. A part that the disk cannot read counts as damaged.
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
                        self._believe(part, hashed)
        finally:
            os.close(fd)
        self.is_of_one_source = False
        self._is_due = bool(self._unsynced)
        self._write_journal()
        self.resumed = self._received.bytes

    def _copy(self, fd: int, part: Extent, buffer: memoryview) -> PartHash | None:
        """Write a part as another file has it; its hash, None where that file ends before. Raises OSError."""
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
        """Make the data read-only and durable; it is then at the path returned."""
        with durable.disk_errors(self.directory):
            durable.seal(self._data)
        return self.directory / "data"

    def close(self) -> None:
        """Keep what is here for the next begin. Closing twice is fine."""
        for name in ("_data", "_journal"):
            fd = getattr(self, name, None)
            if fd is not None and fd >= 0:
                os.close(fd)
            setattr(self, name, -1 if name == "_data" else None)

    def discard(self) -> None:
        """Forget everything that was written."""
        self.close()
        with durable.disk_errors(self.directory):
            durable.remove_tree(self.directory)

    # --- resume ---

    def _resume(self) -> None:
        """Believe each line whose bytes still hash to what it says; write again what was not synced."""
        about, received, journal = (self.directory / name for name in ("about.json", "received", "journal"))
        told = _told(about, self.file)
        if told is None:
            for path in (received, journal, about):
                durable.remove(path)
            durable.write_note(about, self._about())
            return
        self.is_of_one_source = told.get("base") == self.file.base
        if not self.is_of_one_source:
            durable.write_note(about, self._about())
        lines: dict[int, list[tuple[int, str]]] = {}  # by where they start
        synced: dict[int, int] = {}  # how far the journal goes from there
        for path in (received, journal):
            for part, expected in read_parts(path, self.file.size):
                lines.setdefault(part.start, []).append((part.stop, expected))
                if path == journal:
                    synced[part.start] = max(part.stop, synced.get(part.start, 0))
        buffer = memoryview(bytearray(READ_BYTES))
        for start in sorted(lines):
            self._resume_from(start, sorted(lines[start]), synced.get(start, start), buffer)
        if received.exists():
            durable.append_note(received, "\n")  # a torn line must not swallow the next

    def _resume_from(self, start: int, lines: list[tuple[int, str]], synced: int, buffer: memoryview) -> None:
        """Believe the longest of some extents, all from `start` on, that hashes to what its line says.

        What cannot be read back is fetched and written again.
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
            self._believe(part, hashed)

    def _write_again(self, start: int, stop: int, buffer: memoryview) -> None:
        while start < stop:
            view = buffer[: min(len(buffer), stop - start)]
            self._read(view, start)
            self.write(start, view)
            start += len(view)

    def _believe(self, part: Extent, hashed: PartHash) -> None:
        """Count what is here, and not synced yet, as a part."""
        self._received.add(part)
        self._parts[hashed], self._unsynced[hashed] = part, _line(part, hashed)

    def _about(self) -> bytes:
        file = self.file
        about = {
            "origin": file.origin,
            "size": file.size,
            "blob": str(file.blob),
            "validator": file.validator,
        }
        about |= {"base": file.base if self.is_of_one_source else None}
        return json.dumps(about, indent=1).encode()

    def _hash(self, part: Extent, buffer: memoryview) -> PartHash:
        """Of a part as it is on disk."""
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


def _told(about: Path, file: File) -> dict[str, object] | None:
    """What an earlier life of the daemon wrote of these very bytes: same blob, same size; None if nothing."""
    try:
        told = durable.read_document(about)
        return dict(told) if told["blob"] == str(file.blob) and told["size"] == file.size else None
    except (FileNotFoundError, files.TooLong, ValueError, TypeError, KeyError, RecursionError):
        return None


def parts_of(blob: Path) -> Path:
    """Where the hashes of a blob's parts stand, of one that came in several or without a digest."""
    return blob.with_name(blob.name + ".parts")


def read_parts(journal: Path, size: int) -> Iterable[tuple[Extent, str]]:
    """The parts a journal lists. Lines that are torn or make no sense are passed over."""
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
