"""Prepares a locked root for use: its format, its file system, and what a crash left half done."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

import structlog

from cachd import __version__, files
from cachd.errors import DiskFailed, Invalid
from cachd.kernel import durable
from cachd.store.layout import EARLIER_NAMES, PRIVATE, PUBLIC, Layout

log = structlog.get_logger(__name__)

# docs/versions.md says when the number grows: when an older version would misread what this one writes.
_NUMBER = 1
FORMAT = f"cachd {_NUMBER}\n"
_ANY_FORMAT = re.compile(r"cachd ([0-9]{1,9})\n")
_LONGEST_FORMAT_BYTES = 4096
_INGEST = re.compile(r".+-[0-9a-f]{8,}-[0-9]+")  # ALGORITHM-HEX-SIZE
# Backup tools skip a directory with such a tag (Cache Directory Tagging Specification).
_CACHEDIR_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Models kept by cachd.\n"
# Names expected in a root. Pods keep their own caches in `cache`; ext4 makes lost+found.
_KNOWN = {name.partition("/")[0] for name in (*PUBLIC, *PRIVATE)} | {"CACHEDIR.TAG", "cache", "lost+found"}


def check_disk(root: Path, *, at_least: int) -> None:
    """Raises DiskFailed if the file system is too small: then the disk is probably not mounted."""
    with durable.disk_errors(root):
        status = os.statvfs(root)
    size = status.f_blocks * status.f_frsize
    if size < at_least:
        raise DiskFailed(
            f"root {root} is on a file system of {size} bytes, but disk_at_least is {at_least}",
            code="disk_too_small",
            hint="mount the intended disk there, or lower disk_at_least",
            size=size,
        )


def prepare(layout: Layout) -> None:
    """Check the file system of a root, and remove what a crash left half done.

    Raises DiskFailed if the file system lacks hard links, NoSpace.
    """
    with durable.disk_errors(layout.root):
        for directory in (layout.root, layout.models, layout.format.parent):
            durable.sync_directory(directory)  # a published model needs these names after a crash
        if not layout.format.exists():
            durable.write_file(layout.format, FORMAT.encode())
        _take_over(layout)
        _check_links(layout)
        for leftover in layout.staging.iterdir():
            _delete(leftover)
        for ingest in layout.ingests.iterdir():
            # Its data became a blob already; or an earlier version named it, and nothing resumes it.
            if not (ingest / "data").exists() or not _INGEST.fullmatch(ingest.name):
                _delete(ingest)
        for tag in (layout.root / "CACHEDIR.TAG", layout.hub / "CACHEDIR.TAG"):
            if not tag.exists():
                with suppress(OSError):  # only for backup tools: no reason not to start
                    durable.write_file(tag, _CACHEDIR_TAG)
    if foreign := sorted({entry.name for entry in layout.root.iterdir()} - _KNOWN):
        log.warning(
            "entries that cachd did not make are left alone",
            root=str(layout.root),
            names=foreign[:20],
            count=len(foreign),
        )


def check_format(layout: Layout) -> None:
    """Raises Invalid for a root of another format. Changes nothing; a new root has no format yet."""
    try:
        found = durable.read_file(layout.format, at_most=_LONGEST_FORMAT_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return
    except files.TooLong as error:
        found = str(error)
    if found == FORMAT:
        return
    number = _ANY_FORMAT.fullmatch(found)
    if number and int(number[1]) > _NUMBER:
        raise Invalid(
            f"{layout.root} has format {int(number[1])}, of a newer cachd;"
            f" cachd {__version__} supports format {_NUMBER}",
            code="bad_format",
            hint="run the newer version again; or use an empty root, into which the models are pulled again",
        )
    raise Invalid(
        f"{layout.format} says {found.strip()!r:.40}, which is no format of cachd",
        code="bad_format",
        hint=f"use an empty root; if {layout.root} is known to be a cache of cachd, restore that file:"
        f" echo {FORMAT.strip()} > {layout.format}",
    )


def _take_over(layout: Layout) -> None:
    """Rename what earlier versions of the same format called otherwise. A crash on the way is no harm."""
    private = layout.format.parent
    for before, now in (each.split(" -> ") for each in EARLIER_NAMES):
        old, new = private / before, private / now
        if old.is_symlink() or not old.exists():
            continue
        for path in sorted(old.iterdir()) if old.is_dir() else [old]:
            target = new / path.name if old.is_dir() else new
            if target.exists():  # the newer one is right
                _delete(path)
            else:
                durable.move(path, target)
        if old.is_dir():
            _delete(old)
        log.info("entry of an earlier version taken over", root=str(layout.root), was=before, name=now)


def _check_links(layout: Layout) -> None:
    """Raises DiskFailed if hard links and renames between directories fail, which the views need."""
    probe, linked = layout.staging / "probe", layout.ready / ".probe"
    try:
        for leftover in (probe, linked):
            leftover.unlink(missing_ok=True)
        durable.write_file(probe, b"")
        durable.link(probe, linked, beside=layout.staging / "link")
        durable.move(linked, layout.models / ".probe")
    except OSError as error:
        if error.errno in durable.FULL:
            log.warning("disk full: hard links and renames not checked", root=str(layout.root))
            return  # the daemon must start on a full disk, to serve and to free space
        if error.errno == errno.EROFS:
            raise
        raise DiskFailed(
            f"{layout.root} does not allow hard links and renames between its directories: {error.strerror}",
            code="no_hard_links",
            hint="put the complete root on one mount of one local file system (ext4, xfs, btrfs, tmpfs)",
        ) from error
    finally:
        for leftover in (probe, linked, layout.models / ".probe"):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        durable.remove_tree(path)
    else:
        path.unlink(missing_ok=True)
