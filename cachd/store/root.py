"""Whether a directory is safe as a root: nobody but the daemon may change what the daemon trusts there.

All of it is checked before a byte of the root is read. An unsafe root is refused (`unsafe_root`) with the
command that mends it. It is never mended silently: whoever could write there may have done so.

    above the root   no directory in which everybody may rename
    the root         a directory of the daemon's or of root's; neither a group nor everybody may rename there
    what is public   directories of the daemon's (layout.py); nobody else may write there
    what is private  directories of the daemon's; nobody else may even look there
    .cachd/*         the files there, such as format and lock: regular, the daemon's, written by nobody else

A volume that the kubelet hands out open, such as an emptyDir (0777) or one with an fsGroup (2775), is no
root. `own_directory` makes one in it.
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

from cachd.errors import DiskFailed, Forbidden, Invalid, Unavailable
from cachd.store import durable
from cachd.store.layout import PRIVATE, PUBLIC

log = structlog.get_logger(__name__)

_READ_AT_START = (
    *(f".cachd/{name}" for name in ("manifests", "pending", "previous", "quarantined", "leases")),
    *("ready", "status"),
)
_OWN = "cachd"  # pods mount it by this name
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = 0o077


def check_root(root: Path) -> None:
    """See that a root can be used, and that nobody else can change what is trusted there.

    Raises Invalid (`bad_root`) where there is none, Forbidden (`unsafe_root`, or `bad_root` where the daemon
    cannot write), DiskFailed.
    """
    _check_is_directory(root)
    _check_top(root)
    for trusted in _trusted(root):
        trusted.check()
    _check_writable(root)


def check_above(root: Path) -> None:
    """See that not everybody may put another directory in the place of the root. Raises Forbidden."""
    for directory in {*root.absolute().parents, *root.resolve().parents}:
        status = _status(directory)
        if status and stat.S_ISDIR(status.st_mode) and _may_rename(status, stat.S_IWOTH):
            raise _unsafe(directory, status, f"chmod o-w {directory}, or chmod +t {directory}")


def own_directory(volume: Path) -> Path:
    """The daemon's own directory in a volume that is open to others, made if it is not there.

    As its owner, the daemon takes back what the kubelet gave to a group: whenever a pod mounts a volume with
    an fsGroup, the group may write everything in it. Raises Invalid, Forbidden, NoSpace, DiskFailed.
    """
    _check_is_directory(volume)
    own = volume / _OWN
    with durable.disk_errors(own), suppress(FileExistsError):
        own.mkdir(mode=0o755)
    _check_is_directory(own)
    for trusted in chain([_Trusted(own, is_directory=True, forbidden=_OTHERS_WRITE)], _trusted(own)):
        trusted.take_back()
        trusted.check()  # before what is below it is touched
    return own


def end_leases(root: Path) -> None:
    """Let the kernel end all leases at once on what a start reads. It begins to as somebody tries to open."""
    for name in (".cachd", *_READ_AT_START):
        for path in _below(root / name):
            with suppress(OSError, Unavailable):
                os.close(durable.open_file(path, os.O_RDONLY))


def make_directories(root: Path) -> None:
    """Make what is not there yet of a checked root; no name is durable yet."""
    for trusted in _directories(root):
        with durable.disk_errors(trusted.path), suppress(FileExistsError):
            trusted.path.mkdir(mode=0o777 & ~trusted.forbidden)
        trusted.check()  # it may have come meanwhile


@dataclass(frozen=True, slots=True)
class _Trusted:
    """What must be the daemon's own where it is there, with none of the `forbidden` bits in its mode."""

    path: Path
    is_directory: bool
    forbidden: int

    def check(self) -> None:
        """Raises Forbidden."""
        status = _status(self.path)
        if status is None:
            return
        wanted = stat.S_ISDIR if self.is_directory else stat.S_ISREG
        if not wanted(status.st_mode):
            raise _unsafe(self.path, status, f"see who put it there, and remove it: {self.path}")
        if status.st_uid != os.getuid():
            owner = f"{os.getuid()}:{os.getgid()}"
            raise _unsafe(self.path, status, f"see who wrote there, then: chown -hR {owner} {self.path}")
        if status.st_mode & self.forbidden:
            mode = stat.S_IMODE(status.st_mode) & ~self.forbidden
            raise _unsafe(self.path, status, f"see who wrote there, then: chmod {mode:04o} {self.path}")

    def take_back(self) -> None:
        """Take from the group what it may not have, if it is the daemon's. Raises NoSpace, DiskFailed."""
        status, rights = _status(self.path), self.forbidden & stat.S_IRWXG
        if status is None or status.st_uid != os.getuid() or stat.S_ISLNK(status.st_mode):
            return
        if status.st_mode & rights:
            with durable.disk_errors(self.path):
                self.path.chmod(stat.S_IMODE(status.st_mode) & ~rights)
            log.warning("rights of the group taken back", path=str(self.path), was=oct(status.st_mode))


def _directories(root: Path) -> Iterator[_Trusted]:
    """The directories of every root, each after the one that it is in."""
    for name in PUBLIC:
        yield _Trusted(root / name, is_directory=True, forbidden=_OTHERS_WRITE)
    for name in PRIVATE:
        yield _Trusted(root / name, is_directory=True, forbidden=_OTHERS)


def _trusted(root: Path) -> Iterator[_Trusted]:
    """All of it. A directory is listed only after it was given out itself, to be checked."""
    yield from _directories(root)
    for path in _below(root / ".cachd/blobs"):
        yield _Trusted(path, is_directory=True, forbidden=_OTHERS)
    for path in _below(root / ".cachd"):
        if path.is_symlink() or not path.is_dir():
            yield _Trusted(path, is_directory=False, forbidden=_OTHERS_WRITE)


def _below(directory: Path) -> list[Path]:
    """What stands in a directory; nothing where it is none, or a link."""
    with suppress(OSError):
        if not directory.is_symlink():
            return sorted(directory.iterdir())
    return []


def _check_is_directory(root: Path) -> None:
    hint = f"make it first: install -d -m 0755 -o {os.getuid()} -g {os.getgid()} {root}"
    status = _status(root)
    if status is None:
        raise Invalid(f"root {root} does not exist", code="bad_root", hint=hint)
    if not stat.S_ISDIR(status.st_mode):
        raise Invalid(f"root {root} is not a directory", code="bad_root", hint=hint)


def _check_top(root: Path) -> None:
    """Whoever may rename in the root can put other models in the place of the daemon's."""
    status = root.lstat()
    if status.st_uid not in (os.getuid(), 0):
        raise _unsafe(root, status, f"chown {os.getuid()}:{os.getgid()} {root}")
    if _may_rename(status, _OTHERS_WRITE):
        raise _unsafe(
            root,
            status,
            f"chmod 0755 {root}; of a volume that is handed out so, as an emptyDir or one with an fsGroup is,"
            f" cachd uses a directory of its own: own_directory: true",
        )
    if not status.st_mode & stat.S_IXOTH:
        log.warning("pods of other users cannot read here", root=str(root), hint=f"chmod 0755 {root}")


def _check_writable(root: Path) -> None:
    with durable.disk_errors(root):
        flags = os.statvfs(root).f_flag
    if flags & os.ST_RDONLY:
        raise DiskFailed(
            f"root {root} is on a file system that is mounted read-only",
            code="read_only",
            hint="look at the node's kernel log: ext4 does this after an error",
        )
    if not os.access(root, os.W_OK | os.X_OK):
        raise Forbidden(
            f"root {root} belongs to uid {root.lstat().st_uid} and uid {os.getuid()} cannot write there",
            code="bad_root",
            hint=f"chown {os.getuid()}:{os.getgid()} {root}",
        )


def _status(path: Path) -> os.stat_result | None:
    """What lstat says; None where nothing is."""
    with durable.disk_errors(path), suppress(FileNotFoundError):
        return path.lstat()
    return None


def _may_rename(status: os.stat_result, who: int) -> bool:
    """Whether those with these write bits may rename what others own in a directory."""
    return bool(status.st_mode & who) and not status.st_mode & stat.S_ISVTX


def _unsafe(path: Path, status: os.stat_result, hint: str) -> Forbidden:
    mode, kind = stat.S_IMODE(status.st_mode), _kind(status.st_mode)
    return Forbidden(
        f"{path} is {kind} of mode {mode:04o} and belongs to {status.st_uid}:{status.st_gid}: others than uid"
        f" {os.getuid()} could change there what pods load",
        code="unsafe_root",
        hint=hint,
        path=str(path),
        mode=f"{mode:04o}",
        uid=status.st_uid,
        gid=status.st_gid,
    )


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "link", stat.S_IFIFO: "pipe"}
    return f"a {names.get(stat.S_IFMT(mode), 'device or socket')}"
