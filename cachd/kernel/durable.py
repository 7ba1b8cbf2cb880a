"""The file operations whose results must survive a crash: write, sync, rename, link, unlink.

The rules (man 2 fsync, man 2 rename): a file's bytes are synced before the file gets its final name. A name
is durable once its directory is synced. A failed sync is final: the bytes it covered are fetched again.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog

from cachd import files
from cachd.errors import Busy, CachdError, DiskFailed, Leased, NoSpace
from cachd.kernel.content_time import content_time

log = structlog.get_logger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
SEALED = 0o444  # the mode of published bytes
_LEASE_BREAK_SECONDS = 45.0  # the default of the sysctl fs.lease-break-time
SCARCE = (errno.EMFILE, errno.ENFILE)  # no free descriptor: temporary, and no fault of the disk


class disk_errors:  # noqa: N801 - used as a statement, like contextlib.suppress
    """Inside `with disk_errors(path)`, an OSError becomes NoSpace, Busy or DiskFailed.

    The new error names the file that the OSError names; if it names none, `path`. A class and no generator,
    because each small file passes several of these blocks.
    """

    __slots__ = ("_path",)

    def __init__(self, path: Path | str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise _as_ours(error, self._path) from error


def _as_ours(error: OSError, path: Path | str) -> CachdError:
    """The exception of cachd for an OSError; see `disk_errors`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    named = [str(name) for name in (error.filename, error.filename2) if isinstance(name, str | Path)]
    shown = " -> ".join(named) or path
    if error.errno in FULL:
        return NoSpace(f"{shown}: {reason}", hint="free space or inodes on the cache's file system")
    if error.errno in SCARCE:
        return too_many_files(shown)
    return DiskFailed(
        f"{shown}: {reason}",
        code="read_only" if error.errno == errno.EROFS else "disk_failed",
        hint="look at the node's kernel log: a file system may become read-only after an error",
        errno=error.errno,
    )


def too_many_files(path: Path | str) -> Busy:
    """The error for EMFILE and ENFILE."""
    return Busy(
        f"{path}: too many open files",
        code="too_many_files",
        hint="raise the limit of open files (ulimit -n), or lower streams",
        retry_after=0.5,
    )


def open_file(path: Path | str, flags: int, mode: int = 0o600) -> int:
    """Open a regular file without ever waiting, and return its descriptor.

    Raises Leased while another process holds a kernel lease on the file (man 2 fcntl, F_SETLEASE). Of all
    that cachd does with a file, only opening and truncating it can wait for a lease. Raises OSError as
    open(2) does, and for a symbolic link, a pipe, a device or a directory.
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except BlockingIOError as error:
        raise Leased(
            f"{path}: another process holds a kernel lease on it",
            hint="let no pod run with the daemon's uid (SECURITY.md)",
            retry_after=_LEASE_BREAK_SECONDS,
        ) from error
    try:
        files.check_regular(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_file(path: Path | str, *, at_most: int = files.STATE_BYTES) -> bytes:
    """The content of a regular file. Raises as `open_file`, and TooLong when it is longer than `at_most`."""
    fd = open_file(path, os.O_RDONLY)
    try:
        return files.content_of(fd, at_most=at_most)
    finally:
        os.close(fd)


def read_document(path: Path | str, *, at_most: int = files.STATE_BYTES) -> Any:
    """The parsed content of a JSON file. Raises as `read_file`, ValueError or RecursionError."""
    return json.loads(read_file(path, at_most=at_most))


def _new_file(path: Path | str, mode: int) -> int:
    """Create an empty file, replacing one that a crash left, and return its descriptor. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with suppress(FileExistsError):
        return os.open(path, flags, mode)
    os.unlink(path)
    return os.open(path, flags, mode)


def write_at(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`. Raises OSError."""
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def overwrite(fd: int, content: bytes) -> None:
    """Replace the file's content. A crash may lose or tear it. Raises OSError."""
    os.ftruncate(fd, 0)
    write_at(fd, memoryview(content), 0)


def write_note(path: Path, content: bytes) -> None:
    """Create or replace a file. It survives a crash of the daemon; a crash of the node may spoil it.

    Raises OSError.
    """
    fd = _new_file(path, 0o600)
    try:
        write_at(fd, memoryview(content), 0)
    finally:
        os.close(fd)


def append_note(path: Path, line: str) -> None:
    """Append a line. It survives a crash of the daemon; a crash of the node may spoil it. Raises OSError."""
    notes = Notes(path)
    try:
        notes.append(line)
    finally:
        notes.close()


class Notes:
    """A file to which lines are appended. It stays open from the first line until `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def append(self, line: str) -> None:
        """See `append_note`."""
        if self._fd is None:
            self._fd = open_file(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        content = line.encode()
        while os.write(self._fd, content) < len(content):
            # The write was short, and another thread's line may follow it: repeat the complete line.
            content = f"\n{line}".encode()

    def close(self) -> None:
        """Close the file, if it is open. The next line opens it again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def set_size(fd: int, size: int) -> None:
    """Make the file `size` bytes long. Added bytes take no disk blocks. Raises OSError."""
    os.ftruncate(fd, size)


def preallocate(fd: int, offset: int, size: int) -> None:
    """Allocate disk blocks for `size` bytes at `offset`, so that a full disk fails here. Raises OSError.

    Does nothing on a file system that cannot do this (man 3 posix_fallocate: EOPNOTSUPP, EINVAL).
    """
    try:
        os.posix_fallocate(fd, offset, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def sync(fd: int) -> None:
    """Make the file's bytes durable. Raises OSError."""
    os.fdatasync(fd)


def seal(fd: int, modified_ns: int) -> None:
    """Make the file read-only for everybody, and make its bytes, size, mode and time durable. Raises OSError.

    `modified_ns`: its modification time, in nanoseconds since the epoch.
    """
    os.fchmod(fd, SEALED)
    os.utime(fd, ns=(modified_ns, modified_ns))
    os.fsync(fd)


def set_time(directory: Path, modified: int) -> None:
    """Set the modification time of a directory, not durably. Raises OSError."""
    os.utime(directory, (modified, modified))


def keep_mode(path: str, mode: int, status: os.stat_result | None = None) -> None:
    """Restore the mode of a file or directory if somebody changed it. A failure is ignored.

    `status`: the lstat result of `path`, if the caller has it already.
    """
    with suppress(OSError):
        found = (status or os.lstat(path)).st_mode
        if stat.S_IMODE(found) != mode and not stat.S_ISLNK(found):
            os.chmod(path, mode)
            log.warning("mode restored", path=path, was=f"{stat.S_IMODE(found):04o}", mode=f"{mode:04o}")


def keep_directory(path: Path, mode: int) -> None:
    """Recreate a directory if somebody deleted it, and restore its mode. Raises OSError."""
    with suppress(FileExistsError):
        path.mkdir()
        log.warning("directory recreated", path=str(path))
    keep_mode(str(path), mode)


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: Path) -> None:
    """Make the directory `path` and its missing parents, and make their names durable. Raises OSError."""
    if not path.is_dir():
        make_directories(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def append(fd: int, text: str) -> None:
    """Append to a journal and make the text durable. Raises OSError."""
    pending = text.encode()
    while pending:
        pending = pending[os.write(fd, pending) :]
    os.fdatasync(fd)


@contextmanager
def new_file(path: Path | str) -> Iterator[int]:
    """A context with the descriptor of a new, empty file. The caller seals it. Raises OSError."""
    fd = _new_file(path, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def write_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Create or replace `path` atomically and durably. Raises OSError.

    Any reader, after any crash, sees either the complete old or the complete new content.
    """
    with _replacing(path, content, mode) as fd:
        os.fsync(fd)  # before the rename: a crash must not leave the name without the content
    sync_directory(path.parent)


def replace_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Create or replace `path` atomically, but not durably. Raises OSError.

    Any reader sees either the complete old or the complete new content. A crash of the node may leave the
    file missing or empty.
    """
    with _replacing(path, content, mode):
        pass


@contextmanager
def _replacing(path: Path, content: bytes, mode: int) -> Iterator[int]:
    """Write a new file beside `path`, and rename it to `path` after the block. Yields its descriptor."""
    beside = path.with_name(f".{path.name}.new")
    fd = _new_file(beside, mode)
    try:
        os.fchmod(fd, mode)
        write_at(fd, memoryview(content), 0)
        yield fd
        os.rename(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    finally:
        os.close(fd)


def write_sealed(path: str, content: memoryview) -> None:
    """Write a new read-only file and make its content durable. Raises OSError.

    Its name is not durable yet. The caller moves the file to its place, or unlinks it after a failure.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        write_at(fd, content, 0)
        seal(fd, 10**9 * content_time(len(content), lambda at, count: content[at : at + count]))
    finally:
        os.close(fd)


def unlink(path: str) -> None:
    """Unlink `path`, not durably. A missing file is fine."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def make_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, replacing a file there. The caller moves it to its place."""
    with suppress(FileNotFoundError):
        os.unlink(link)
    os.symlink(target, link)


def move(source: Path | str, target: Path | str) -> None:
    """Rename. The caller syncs the directories if the rename must be durable. Raises OSError."""
    os.rename(source, target)


def take_away(path: Path, trash: Path) -> None:
    """Move `path` to `trash` by one rename. If the disk is too full for a rename, delete `path` instead."""
    try:
        os.rename(path, trash)
    except OSError as error:
        if error.errno not in FULL:
            raise
        if path.is_dir():
            remove_tree(path)
        else:
            os.unlink(path)


def link_new(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`. Of several processes, only one succeeds, without any lock.

    It is not durable. Raises FileExistsError if another process was faster, OSError.
    """
    os.link(source, target, follow_symlinks=False)


def link(source: Path | str, target: Path | str, *, beside: Path) -> None:
    """Make `target` a hard link to the file `source`, replacing another file there. Raises OSError.

    `beside` is an unused path on the same file system: the new link is made there and renamed to `target`.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        if not os.path.samestat(os.lstat(source), os.lstat(target)):
            with suppress(FileNotFoundError):
                os.unlink(beside)
            os.link(source, beside, follow_symlinks=False)
            os.rename(beside, target)


def remove(path: Path) -> None:
    """Unlink `path` durably. A missing file is fine."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)
        sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a directory and all below it, whatever their modes. A missing directory is fine."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.chmod(path, 0o700)
        with os.scandir(path) as entries:
            below = list(entries)
        for entry in below:
            if entry.is_dir(follow_symlinks=False):
                remove_tree(Path(entry.path))
            else:
                with suppress(FileNotFoundError):
                    os.unlink(entry.path)
        os.rmdir(path)
