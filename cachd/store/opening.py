"""Prepares a locked root for use: its format, its file system, and what a crash left half done."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import DiskFailed, Invalid
from cachd.kernel import durable
from cachd.store.layout import PRIVATE, PUBLIC, Layout

log = structlog.get_logger(__name__)

FORMAT = "cachd 1\n"
_LONGEST_FORMAT_BYTES = 4096
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
    """Check the format and the file system of a root, and remove what a crash left half done.

    Raises Invalid for another format, DiskFailed if the file system lacks hard links, NoSpace.
    """
    with durable.disk_errors(layout.root):
        for directory in (layout.root, layout.models, layout.format.parent):
            durable.sync_directory(directory)  # a published model needs these names after a crash
        _check_format(layout)
        _check_links(layout)
        for leftover in layout.staging.iterdir():
            _delete(leftover)
        for ingest in layout.ingests.iterdir():
            if not (ingest / "data").exists():  # its data became a blob already
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


def _check_format(layout: Layout) -> None:
    try:
        found = durable.read_file(layout.format, at_most=_LONGEST_FORMAT_BYTES).decode(errors="replace")
    except FileNotFoundError:
        durable.write_file(layout.format, FORMAT.encode())
        return
    except files.TooLong as error:
        found = str(error)
    if found != FORMAT:
        raise Invalid(
            f"{layout.root} has the format {found.strip()!r:.40}; cachd supports {FORMAT.strip()!r}",
            code="bad_format",
            hint="run the version of cachd that wrote it, or use another root",
        )


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
