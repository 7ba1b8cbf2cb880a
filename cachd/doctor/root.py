"""Checks the directory of the root: who may change it, and what its file system can do."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from cachd import files
from cachd.config import Config
from cachd.doctor.codes import Code
from cachd.doctor.finding import Finding, State, of_error, ok
from cachd.errors import CachdError
from cachd.kernel import inotify
from cachd.kernel.leases import reports_open_files
from cachd.model import count_text
from cachd.store.layout import PUBLIC, Layout
from cachd.store.opening import check_disk
from cachd.store.root import check_above, check_root, own_place

_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "lustre", "9p", "beegfs", "gpfs")
_SHOWN = 5  # entries of the views that cachd did not make
_WATCHED = inotify.DELETE | inotify.MOVED_FROM


def place_of(config: Config) -> Path:
    """The directory that the daemon uses as its root."""
    return own_place(config.root) if config.own_directory else config.root


def check_user(config: Config) -> Iterator[Finding]:
    """Whether this process is of the user to whom cachd's files belong."""
    owner = owner_of(config)
    if owner is None or is_owner(config):
        yield ok(Code.user, f"runs as uid {os.geteuid()}, as the daemon does")
        return
    yield Finding(
        Code.user,
        State.warning,
        f"runs as uid {os.geteuid()}, but cachd's files in {place_of(config)} belong to uid {owner.uid}:"
        " the root and the secrets of the daemon are not checked",
        f"run it as root or as that user: sudo -u '#{owner.uid}' cachd doctor",
    )


@dataclass(frozen=True, slots=True)
class Owner:
    """The user and the group that cachd's own files belong to."""

    uid: int
    gid: int


def owner_of(config: Config) -> Owner | None:
    """Who owns cachd's own files. While there are none, it is for root whoever owns their place, if any."""
    place = place_of(config)
    places = [Layout(place).format.parent, *([place] if os.geteuid() == 0 else [])]
    for path in places:
        with suppress(OSError):
            status = path.lstat()
            return Owner(status.st_uid, status.st_gid)
    return None


def is_owner(config: Config) -> bool:
    """Whether this process is of the daemon's user, or nothing says who that is."""
    owner = owner_of(config)
    return owner is None or owner.uid == os.geteuid()


def check_owner_and_mode(config: Config) -> Iterator[Finding]:
    """Whether the daemon can use the root, and nobody else can change what it trusts there."""
    place = place_of(config)
    try:
        if not config.own_directory:
            check_above(place)
        check_root(place if place.exists() or not config.own_directory else config.root)
    except CachdError as error:
        yield of_error(Code.root, error, subject=str(place))
        return
    status = (place if place.exists() else config.root).stat()
    shown = f"{place} belongs to {status.st_uid}:{status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}"
    if status.st_mode & stat.S_IXOTH:
        yield ok(Code.root, shown, subject=str(place))
        return
    hint = f"chmod 0755 {place}, unless all pods run as its user or group"
    what = f"{shown}: pods of other users cannot read it"
    yield Finding(Code.root, State.warning, what, hint, subject=str(place))


def check_file_system(config: Config) -> Iterator[Finding]:
    """Its type, its size, and whether it can be written."""
    place = _existing(place_of(config))
    kind = _type_of(place)
    try:
        check_disk(place, at_least=config.disk_at_least)
        found = os.statvfs(place)
    except CachdError as error:
        yield of_error(Code.file_system, error)
        return
    except OSError as error:
        hint = "check the disk and its mount"
        yield Finding(Code.file_system, State.wrong, f"{place}: {error}", hint, error="disk_failed")
        return
    size = decimal(found.f_blocks * found.f_frsize)
    if found.f_flag & os.ST_RDONLY:
        hint = "see the node's kernel log: ext4 remounts a file system read-only after an error"
        what = f"{place} is on {kind}, which is mounted read-only"
        yield Finding(Code.file_system, State.wrong, what, hint, error="read_only")
    elif kind in _NETWORK or kind.startswith("fuse"):
        hint = "use a local disk (ext4, xfs, btrfs): it is faster, and reports which files are open"
        yield Finding(Code.file_system, State.warning, f"{place} is on {kind}, {size}, over a network", hint)
    elif kind == "overlay":
        hint = "mount a disk of the node there: this one is lost with the container"
        yield Finding(Code.file_system, State.warning, f"{place} is in the container's own layer", hint)
    else:
        yield ok(Code.file_system, f"{place} is on {kind}, {size}")


def check_hard_links(config: Config) -> Iterator[Finding]:
    """Whether files can be linked and moved between directories, which the views need."""
    place = place_of(config)
    hint = "put the complete root on one mount of one local file system (ext4, xfs, btrfs, tmpfs)"
    mounted = [name for name in (*PUBLIC, ".cachd") if _is_mount(place / name, of=place)]
    if mounted:
        what = f"{', '.join(mounted)} in {place} are mounts of their own: no file can be linked into them"
        yield Finding(Code.hard_links, State.wrong, what, hint, error="no_hard_links")
        return
    try:
        with _probing(place) as probe:
            for name in ("from", "to"):
                (probe / name).mkdir()
            (probe / "from/file").touch()
            (probe / "to/link").hardlink_to(probe / "from/file")
            (probe / "to/link").rename(probe / "from/moved")
    except OSError as error:
        what = f"files in {place} cannot be linked and moved: {files.reason(error)}"
        yield Finding(Code.hard_links, State.wrong, what, hint, error="no_hard_links")
        return
    yield ok(Code.hard_links, "files can be linked and moved between the directories of the root")


def check_foreign_files(config: Config) -> Iterator[Finding]:
    """Whether the views have only what cachd made: links to snapshots, and documents of names."""
    layout = Layout(place_of(config))
    links = [path for path in _entries(layout.models) if not path.is_symlink()]
    documents = [path for view in (layout.ready, layout.status) for path in _entries(view)]
    found = [*links, *(path for path in documents if path.suffix != ".json")]
    if not found:
        yield ok(Code.foreign_files, "the views have only what cachd made")
        return
    shown = ", ".join(str(path.relative_to(layout.root)) for path in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    what = f"{layout.root} has {count_text(len(found), 'entry', 'entries')} that cachd did not make: {shown}"
    hint = "move them elsewhere: cachd neither serves nor removes them"
    yield Finding(Code.foreign_files, State.warning, what + more, hint)


def _entries(directory: Path) -> list[Path]:
    """What is in a directory of the views, without cachd's own names, which begin with a dot."""
    return sorted(path for path in directory.glob("*") if not path.name.startswith("."))


def check_leases(config: Config) -> Iterator[Finding]:
    """Whether the kernel reports which files are open."""
    try:
        with _probing(place_of(config)) as probe:
            reports = reports_open_files(probe / "lease")
    except OSError as error:
        yield no_leases(f"a file in {place_of(config)} cannot be made: {files.reason(error)}")
        return
    yield leases_work() if reports else no_leases(f"{_type_of(place_of(config))} has no leases (man 2 fcntl)")


def leases_work() -> Finding:
    """The finding where open files are reported."""
    return ok(Code.leases, "the kernel reports which files are open")


def no_leases(why: str) -> Finding:
    """The finding where they are not."""
    what = "the kernel cannot report open files here: only pins and leases protect models"
    hint = "use a local file system (ext4, xfs, btrfs, tmpfs), or pin the models that pods use"
    return Finding(Code.leases, State.warning, f"{what}: {why}", hint)


def check_inotify(config: Config) -> Iterator[Finding]:
    """Whether a daemon could watch every directory of the views. For when none does: it takes watches."""
    layout = Layout(place_of(config))
    wanted = [path for view in (layout.models, layout.hub, layout.ready) for path, *_ in os.walk(view)]
    watched = 0
    try:
        queue = inotify.Inotify()
        try:
            for directory in wanted:
                queue.add(directory, _WATCHED)
                watched += 1
        finally:
            queue.close()
    except OSError as error:
        setting = "max_user_watches" if watched else "max_user_instances"
        every = count_text(len(wanted), "directory", "directories")
        what = f"of {every} of the views, only {watched} can be watched: {files.reason(error)}"
        yield too_few_watches(what, setting)
        return
    every = count_text(watched, "directory", "directories")
    what = f"the kernel can watch all of the views: {every}, and up to {inotify.most_watches()} for a user"
    yield ok(Code.inotify, what)


def too_few_watches(what: str, setting: str) -> Finding:
    """The finding where the kernel does not watch all directories. `setting` of fs.inotify is too low."""
    much = 1024 if setting == "max_user_instances" else 1 << 20
    hint = f"sysctl -w fs.inotify.{setting}={much}; deleted and opened files are seen only after minutes"
    return Finding(Code.inotify, State.warning, what, hint)


@contextmanager
def _probing(place: Path) -> Iterator[Path]:
    """A directory for probe files, which is removed again. Raises OSError."""
    staging = Layout(place).staging
    at = staging if staging.is_dir() else _existing(place)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=at) as made:
        yield Path(made)


def _existing(place: Path) -> Path:
    """The place, or the closest directory above it that exists."""
    return next((path for path in (place, *place.parents) if path.is_dir()), place)


def _is_mount(path: Path, *, of: Path) -> bool:
    """Whether a directory is on another mount than `of`: a bind mount of the same disk is one, too."""
    return path.is_dir() and _mount_of(path) != _mount_of(of)


def _mount_of(path: Path) -> str:
    """The id of the mount of a directory (man 5 proc: fdinfo)."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    return next((line for line in lines if line.startswith("mnt_id:")), "")


def _type_of(path: Path) -> str:
    """The type of the file system of a path (man 5 proc: mountinfo)."""
    mount = _mount_of(_existing(path)).partition(":")[2].strip()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[0] == mount:
            return rest.split()[0]
    return "an unknown file system"
