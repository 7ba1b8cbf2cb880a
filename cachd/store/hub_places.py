"""Makes what huggingface_hub expects in its cache beside the files of a repository.

    .locks/<folder>/    empty; versions before 1.0 make it even for a file that is there
    <folder>/blobs/     empty; as above
    <folder>/.no_exist/<commit>/<path>      empty: the commit has no file of this path. A client that is not
                        told to work offline does not ask the Hub for it

Clients could not make these themselves: the mount of a pod is read-only.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from cachd.kernel import durable

_LOCKS = ".locks"


def make_empty(hub: Path, folder: str) -> None:
    """Make the empty directories of one folder of the Hub view `hub`, durably. Raises OSError."""
    make_locks(hub, folder)
    _make(hub / folder / "blobs")


def make_locks(hub: Path, folder: str) -> None:
    """Make the directory of locks of a folder, or of another name of it, durably. Raises OSError."""
    _make(hub / _LOCKS / folder)


def remove_locks(hub: Path, folder: str) -> None:
    """Remove the directory of locks of a folder, or of another name of it. Raises OSError."""
    durable.remove_tree(hub / _LOCKS / folder)


def mark_absent(repo: Path, commit: str, paths: Collection[str], *, beside: Path) -> None:
    """Mark exactly these paths as absent from a commit, durably. `beside` as in `durable.link`.

    All marks of a commit are links to one inode. Raises OSError.
    """
    top = repo / ".no_exist" / commit
    there = set(_marks(top))
    for path in there.difference(paths):
        durable.remove(top / path)
    first = next((top / path for path in there.intersection(paths)), None)
    for path in sorted(set(paths) - there):
        mark = top / path
        durable.make_directories(mark.parent)
        if first is None:
            durable.write_file(mark, b"", mode=durable.SEALED)
            first = mark
        else:
            durable.link(first, mark, beside=beside)
    if there != set(paths) and top.is_dir():
        durable.sync_directory(top)
    for directory in (top.parent, *(at for at, _, _ in os.walk(top))):
        durable.keep_mode(str(directory), 0o755)
    if first is not None:
        durable.keep_mode(str(first), durable.SEALED)


def remove_marks(repo: Path, commit: str) -> None:
    """Remove what `mark_absent` made for a commit. Raises OSError."""
    durable.remove_tree(repo / ".no_exist" / commit)


def _marks(top: Path) -> Iterator[str]:
    """The paths below `top` that are marked as absent."""
    for at, _, names in os.walk(top):
        for name in names:
            yield os.path.relpath(os.path.join(at, name), top)


def _make(place: Path) -> None:
    durable.make_directories(place)
    durable.keep_mode(str(place), 0o755)
