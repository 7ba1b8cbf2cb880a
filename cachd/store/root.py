"""Checks that a directory is a safe root: nobody but the daemon may change what the daemon trusts there.

The checks come before any file of the root is read. An unsafe root is refused (`unsafe_root`) with the
command that repairs it. cachd does not repair it by itself, because others may already have written there.

    above the root       no directory in which everybody may rename entries
    the root             owned by the daemon's user or by root; neither group nor others may rename entries
    public directories   (layout.py) owned by the daemon's user; nobody else may write
    private directories  owned by the daemon's user; nobody else may read or write
    files in .cachd/     such as format and lock: regular, owned by the daemon's user; nobody else may write

A directory with the sticky bit lets nobody rename the entries of others. A volume that the kubelet makes
writable for others, such as an emptyDir (0777) or one with an fsGroup (2775), cannot be a root: the daemon
uses a directory of its own in it (`own_directory`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import structlog

from cachd.errors import DiskFailed, Forbidden, Invalid, Unavailable, UnsafeRoot
from cachd.kernel import durable
from cachd.store.layout import PRIVATE, PUBLIC

log = structlog.get_logger(__name__)

_READ_AT_START = (
    *(
        f".cachd/{name}"
        for name in ("manifests", "pending", "previous", "rollbacks", "quarantined", "leases")
    ),
    *("ready", "status"),
)
_OWN = "cachd"  # pods mount it with `subPath: cachd`
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = 0o077


def check_root(root: Path) -> None:
    """Check that the daemon can use a root, and that nobody else can change what it trusts there.

    Raises Invalid (`bad_root`) if it is not a directory, Forbidden (`unsafe_root`; `bad_root` if the daemon
    cannot write there), DiskFailed.
    """
    _check_is_directory(root)
    _check_top(root)
    for trusted in _trusted(root):
        trusted.check()
    _check_writable(root)


def check_above(root: Path) -> None:
    """Check that not everybody may replace the root by another directory. Raises Forbidden."""
    for directory in {*root.absolute().parents, *root.resolve().parents}:
        status = _status(directory)
        if status and stat.S_ISDIR(status.st_mode) and _may_rename(status, stat.S_IWOTH):
            raise _unsafe(directory, status, f"chmod o-w {directory}, or chmod +t {directory}")


def own_place(volume: Path) -> Path:
    """Where the daemon's own directory in a volume is, whether it exists or not."""
    return volume / _OWN


def own_directory(volume: Path) -> Path:
    """The daemon's own directory in a volume that others may write to. Makes it if there is none.

    Removes the rights of the group from the daemon's own files and directories in it: whenever a pod mounts a
    volume with an fsGroup, the kubelet lets that group write everywhere in it. Raises Invalid, Forbidden,
    NoSpace, DiskFailed.
    """
    _check_is_directory(volume)
    own = own_place(volume)
    with durable.disk_errors(own), suppress(FileExistsError):
        own.mkdir(mode=0o755)
    _check_is_directory(own)
    for trusted in chain([_Trusted(own, is_directory=True, forbidden=_OTHERS_WRITE)], _trusted(own)):
        trusted.take_back()
        trusted.check()  # before its entries are listed
    return own


def end_leases(root: Path) -> None:
    """Make the kernel end all leases on the files that a start reads (man 2 fcntl, "Leases").

    The attempt to open a leased file begins the wait after which the kernel ends its lease. All leases are
    tried here, so that they end at the same time.
    """
    for name in (".cachd", *_READ_AT_START):
        for path in _below(root / name):
            with suppress(OSError, Unavailable):
                os.close(durable.open_file(path, os.O_RDONLY))


def make_directories(root: Path) -> None:
    """Make the missing directories of a checked root. The caller syncs them."""
    for trusted in _directories(root):
        with durable.disk_errors(trusted.path), suppress(FileExistsError):
            trusted.path.mkdir(mode=0o777 & ~trusted.forbidden)
        trusted.check()  # somebody else may have made it meanwhile


@dataclass(frozen=True, slots=True)
class _Trusted:
    """A path that must be owned by the daemon's user and have no `forbidden` mode bit, if it exists."""

    path: Path
    is_directory: bool
    forbidden: int

    def check(self) -> None:
        """Raises Forbidden if the path has the wrong type, owner or mode."""
        status = _status(self.path)
        if status is None:
            return
        wanted = stat.S_ISDIR if self.is_directory else stat.S_ISREG
        if not wanted(status.st_mode):
            raise _unsafe(self.path, status, f"find out who put it there, then remove {self.path}")
        if status.st_uid != os.getuid():
            owner = f"{os.getuid()}:{os.getgid()}"
            raise _unsafe(self.path, status, f"find out who wrote there, then: chown -hR {owner} {self.path}")
        if status.st_mode & self.forbidden:
            mode = stat.S_IMODE(status.st_mode) & ~self.forbidden
            raise _unsafe(self.path, status, f"find out who wrote there, then: chmod {mode:04o} {self.path}")

    def take_back(self) -> None:
        """Remove forbidden group rights if the daemon's user owns the path. Raises NoSpace, DiskFailed."""
        status, rights = _status(self.path), self.forbidden & stat.S_IRWXG
        if status is None or status.st_uid != os.getuid() or stat.S_ISLNK(status.st_mode):
            return
        if status.st_mode & rights:
            with durable.disk_errors(self.path):
                self.path.chmod(stat.S_IMODE(status.st_mode) & ~rights)
            log.warning("rights of the group removed", path=str(self.path), was=oct(status.st_mode))


def _directories(root: Path) -> Iterator[_Trusted]:
    """The directories that every root has, each after its parent."""
    for name in PUBLIC:
        yield _Trusted(root / name, is_directory=True, forbidden=_OTHERS_WRITE)
    for name in PRIVATE:
        yield _Trusted(root / name, is_directory=True, forbidden=_OTHERS)


def _trusted(root: Path) -> Iterator[_Trusted]:
    """All paths that must be safe, parents first. The caller checks each one before it takes the next."""
    yield from _directories(root)
    for path in _below(root / ".cachd/blobs"):
        yield _Trusted(path, is_directory=True, forbidden=_OTHERS)
    for path in _below(root / ".cachd"):
        if path.is_symlink() or not path.is_dir():
            yield _Trusted(path, is_directory=False, forbidden=_OTHERS_WRITE)


def _below(directory: Path) -> list[Path]:
    """The entries of a directory; none if it cannot be read or is a link."""
    with suppress(OSError):
        if not directory.is_symlink():
            return sorted(directory.iterdir())
    return []


def _check_is_directory(root: Path) -> None:
    hint = f"create it first: install -d -m 0755 -o {os.getuid()} -g {os.getgid()} {root}"
    status = _status(root)
    if status is None:
        raise Invalid(f"root {root} does not exist", code="bad_root", hint=hint)
    if not stat.S_ISDIR(status.st_mode):
        raise Invalid(f"root {root} is not a directory", code="bad_root", hint=hint)


def _check_top(root: Path) -> None:
    """Check the root itself. Whoever may rename its entries can replace the models."""
    status = root.lstat()
    if status.st_uid not in (os.getuid(), 0):
        raise _unsafe(root, status, f"chown {os.getuid()}:{os.getgid()} {root}")
    if _may_rename(status, _OTHERS_WRITE):
        raise _unsafe(
            root,
            status,
            f"chmod 0755 {root}; for a volume that the kubelet makes writable for others (an emptyDir, or one"
            f" with an fsGroup), set own_directory: true: cachd then uses a directory of its own in it",
        )
    if not status.st_mode & stat.S_IXOTH:
        log.warning("pods of other users cannot read the root", root=str(root), hint=f"chmod 0755 {root}")


def _check_writable(root: Path) -> None:
    with durable.disk_errors(root):
        flags = os.statvfs(root).f_flag
    if flags & os.ST_RDONLY:
        raise DiskFailed(
            f"root {root} is on a file system that is mounted read-only",
            code="read_only",
            hint="see the node's kernel log: ext4 remounts a file system read-only after an error",
        )
    if not os.access(root, os.W_OK | os.X_OK):
        raise Forbidden(
            f"root {root} belongs to uid {root.lstat().st_uid}, but uid {os.getuid()} cannot write there",
            code="bad_root",
            hint=f"chown {os.getuid()}:{os.getgid()} {root}",
        )


def _status(path: Path) -> os.stat_result | None:
    """The result of lstat; None if nothing is there."""
    with durable.disk_errors(path), suppress(FileNotFoundError):
        return path.lstat()
    return None


def _may_rename(status: os.stat_result, who: int) -> bool:
    """Whether the write bits `who` let users rename entries of a directory that others own."""
    return bool(status.st_mode & who) and not status.st_mode & stat.S_ISVTX


def _unsafe(path: Path, status: os.stat_result, hint: str) -> Forbidden:
    mode, kind = stat.S_IMODE(status.st_mode), _kind(status.st_mode)
    return UnsafeRoot(
        f"{path} is {kind} of mode {mode:04o} and belongs to {status.st_uid}:{status.st_gid}: users other"
        f" than uid {os.getuid()} could change the models that pods load",
        hint=hint,
        path=str(path),
        mode=f"{mode:04o}",
        uid=status.st_uid,
        gid=status.st_gid,
    )


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "link", stat.S_IFIFO: "pipe"}
    return f"a {names.get(stat.S_IFMT(mode), 'device or socket')}"
