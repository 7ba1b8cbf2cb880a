"""Makes what huggingface_hub expects in its cache beside the files of a repository.

.locks/<folder>/    empty; versions before 1.0 make it even for a file that is there, and a pod cannot
<folder>/blobs/     empty; as above
"""

from __future__ import annotations

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


def _make(place: Path) -> None:
    durable.make_directories(place)
    durable.keep_mode(str(place), 0o755)
