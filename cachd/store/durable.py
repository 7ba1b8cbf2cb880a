"""Every system call that must survive a crash: write, sync, rename, link, unlink.

The rules (man 2 fsync, man 2 rename): a file's bytes are synced before it gets its final name; a name is
durable once its directory is synced; a failed sync is final, what it covered is fetched again.
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
from cachd.errors import DiskFailed, Leased, NoSpace, Unavailable

log = structlog.get_logger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
SEALED = 0o444  # the mode of published bytes
_LEASE_BREAK_SECONDS = 45.0  # fs.lease-break-time of Linux, unless it was changed
SCARCE = (errno.EMFILE, errno.ENFILE)  # it says nothing of the disk, and passes


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn the system's refusals into NoSpace, Unavailable or DiskFailed, naming the file they name, else
    `path`.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        named = [str(name) for name in (error.filename, error.filename2) if isinstance(name, str | Path)]
        shown = " -> ".join(named) or path
        if error.errno in FULL:
            raise NoSpace(
                f"{shown}: {reason}", hint="free space or inodes on the cache's file system"
            ) from error
        if error.errno in SCARCE:
            raise too_many_files(shown) from error
        code = "read_only" if error.errno == errno.EROFS else "disk_failed"
        hint = "look at the node's kernel log: a file system may become read-only after an error"
        raise DiskFailed(f"{shown}: {reason}", code=code, hint=hint, errno=error.errno) from error


def too_many_files(path: Path | str) -> Unavailable:
    """What EMFILE and ENFILE mean."""
    return Unavailable(
        f"{path}: too many open files",
        code="too_many_files",
        hint="raise the limit of open files (ulimit -n), or lower streams",
        retry_after=0.5,
    )


def open_file(path: Path | str, flags: int, mode: int = 0o600) -> int:
    """A descriptor of a regular file, at once or not at all: it waits for no lease and no pipe's other end.

    Raises Leased while another process holds a kernel lease on the file (man 2 fcntl, F_SETLEASE: of all that
    cachd does with a file, only to open and to shorten it waits for its holder); OSError as open(2) does, and
    for a link, a pipe, a device or a directory.
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except BlockingIOError as error:
        raise Leased(
            f"{path}: another process holds a kernel lease on it",
            hint="allow no pod the daemon's uid (SECURITY.md)",
            retry_after=_LEASE_BREAK_SECONDS,
        ) from error
    try:
        files.check_regular(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_file(path: Path | str, *, at_most: int = files.STATE_BYTES) -> bytes:
    """What a regular file holds. Raises as `open_file`, and TooLong when it is longer than `at_most`."""
    fd = open_file(path, os.O_RDONLY)
    try:
        return files.whole(fd, at_most=at_most)
    finally:
        os.close(fd)


def read_document(path: Path | str, *, at_most: int = files.STATE_BYTES) -> Any:
    """What a JSON file says. Raises as `read_file`, ValueError or RecursionError."""
    return json.loads(read_file(path, at_most=at_most))


def _new_file(path: Path | str, mode: int) -> int:
    """A descriptor of a new, empty file, in the place of what a crash left there. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with suppress(FileExistsError):
        return os.open(path, flags, mode)
    os.unlink(path)
    return os.open(path, flags, mode)


def write_at(fd: int, view: memoryview, offset: int) -> None:
    """Write the whole of `view` at `offset`. Raises OSError."""
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def overwrite(fd: int, content: bytes) -> None:
    """Let the file hold this alone; for a note that no crash may depend on. Raises OSError."""
    os.ftruncate(fd, 0)
    write_at(fd, memoryview(content), 0)


def write_note(path: Path, content: bytes) -> None:
    """Create or replace a file for the next process; a loss of power may spoil it. Raises OSError."""
    fd = _new_file(path, 0o600)
    try:
        write_at(fd, memoryview(content), 0)
    finally:
        os.close(fd)


def append_note(path: Path, line: str) -> None:
    """Append a line for the next process; a loss of power may spoil it. Raises OSError."""
    notes = Notes(path)
    try:
        notes.append(line)
    finally:
        notes.close()


class Notes:
    """A file of lines for the next process, open from the first line until `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def append(self, line: str) -> None:
        """Append a line; a loss of power may spoil it. Raises OSError."""
        if self._fd is None:
            self._fd = open_file(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        content = line.encode()
        while os.write(self._fd, content) < len(content):
            content = f"\n{line}".encode()  # the whole line again: another thread may have appended meanwhile

    def close(self) -> None:
        """Close the file, if it is open. The next line opens it again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def set_size(fd: int, size: int) -> None:
    """Make the file `size` bytes long; what is new takes no blocks. Raises OSError."""
    os.ftruncate(fd, size)


def preallocate(fd: int, offset: int, size: int) -> None:
    """Give these bytes of a file real blocks, so that a full disk is met now. Raises OSError.

    Does nothing where the file system cannot (man 3 posix_fallocate: EOPNOTSUPP, EINVAL).
    """
    try:
        os.posix_fallocate(fd, offset, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def sync(fd: int) -> None:
    """Make the file's bytes durable. Raises OSError."""
    os.fdatasync(fd)


def seal(fd: int) -> None:
    """Make the file read-only for everybody, and bytes, size and mode durable. Raises OSError."""
    os.fchmod(fd, SEALED)
    os.fsync(fd)


def keep_mode(path: str, mode: int, status: os.stat_result | None = None) -> None:
    """Give a file or directory its mode back if somebody changed it, and if we may. `status`: what lstat said
    of it, where that is known."""
    with suppress(OSError):
        found = (status or os.lstat(path)).st_mode
        if stat.S_IMODE(found) != mode and not stat.S_ISLNK(found):
            os.chmod(path, mode)
            log.warning("mode put right", path=path, was=f"{stat.S_IMODE(found):04o}", mode=f"{mode:04o}")


def keep_directory(path: Path, mode: int) -> None:
    """Make a directory that somebody deleted again, and give it its mode back. Raises OSError."""
    with suppress(FileExistsError):
        path.mkdir()
        log.warning("directory made again", path=str(path))
    keep_mode(str(path), mode)


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: Path) -> None:
    """Make `path` and what is missing above it, their names durable. Raises OSError."""
    if not path.is_dir():
        make_directories(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def append(fd: int, text: str) -> None:
    """Append to a journal, durably. Raises OSError."""
    pending = text.encode()
    while pending:
        pending = pending[os.write(fd, pending) :]
    os.fdatasync(fd)


def write_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Create or replace `path` so that any reader, after any crash, sees the old or the new whole."""
    beside = path.with_name(f".{path.name}.new")
    fd = _new_file(beside, mode)
    try:
        os.fchmod(fd, mode)
        write_at(fd, memoryview(content), 0)
        os.fsync(fd)
        os.rename(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    finally:
        os.close(fd)
    sync_directory(path.parent)


def replace_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Create or replace `path` so that any reader sees the old or the new whole. After a crash it may be
    lost, or empty: for what is only news. Raises OSError."""
    beside = path.with_name(f".{path.name}.new")
    fd = _new_file(beside, mode)
    try:
        os.fchmod(fd, mode)
        write_at(fd, memoryview(content), 0)
        os.rename(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    finally:
        os.close(fd)


def write_sealed(path: str, content: memoryview) -> None:
    """Write a new file, read-only and durable. Raises OSError.

    No name of it is durable yet; the caller moves it, or unlinks it after a failure.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        write_at(fd, content, 0)
        seal(fd)
    finally:
        os.close(fd)


def unlink(path: str) -> None:
    """Unlink `path`, for good or not; gone already is fine."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def make_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link, whatever was there; the caller moves it to where it is seen."""
    with suppress(FileNotFoundError):
        os.unlink(link)
    os.symlink(target, link)


def move(source: Path | str, target: Path | str) -> None:
    """Rename; the caller syncs the directories it cares for. Raises OSError."""
    os.rename(source, target)


def take_away(path: Path, trash: Path) -> None:
    """Move `path` to `trash` in one step; where a full disk has no room even for that, delete it."""
    try:
        os.rename(path, trash)
    except OSError as error:
        if error.errno not in FULL:
            raise
        if path.is_dir():
            remove_tree(path)
        else:
            os.unlink(path)


def link(source: Path | str, target: Path | str, *, beside: Path) -> None:
    """Give the file `source` the name `target`, taking the place of what has it; done already is fine.

    `beside` is a free name of the same file system to come from. Raises OSError.
    """
    with suppress(FileExistsError):
        os.link(source, target, follow_symlinks=False)
        return
    if not os.path.samestat(os.lstat(source), os.lstat(target)):
        with suppress(FileNotFoundError):
            os.unlink(beside)
        os.link(source, beside, follow_symlinks=False)
        os.rename(beside, target)


def remove(path: Path) -> None:
    """Unlink `path` durably; gone already is fine."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)
        sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a directory with all below it, whatever the modes; gone already is fine."""
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


def is_regular(path: Path) -> bool:
    """Whether `path` itself, not what it may point at, is a regular file."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False
