"""Reads the cache through a pod's mount, without the daemon."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachd import files
from cachd.errors import Invalid
from cachd.store.layout import Layout

MAX_BYTES = 4 << 20  # of a ready or status file
TREE = re.compile(r"\.trees/([0-9a-f]{32,64})")


class Mount:
    """The cache as a pod sees it: a read-only mount of the root."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root.absolute())

    def snapshot(self, name: str) -> str | None:
        """The id of a ready model's snapshot; None when the model is not ready, or is just being replaced."""
        ready = _document(self.layout.ready_file(name))
        tree = TREE.fullmatch(target_of(self.layout.model(name)))
        return tree[1] if tree and ready.get("manifest") == tree[1] and self.has(tree[1]) else None

    def has(self, snapshot: str) -> bool:
        """Whether the files of a snapshot are here."""
        return self.layout.tree(snapshot).is_dir()

    def status(self, name: str) -> Mapping[str, Any]:
        """The status of a model, as the daemon last wrote it; empty when there is no status file."""
        return _document(self.layout.status_file(name))

    def open_hold(self, snapshot: str) -> int | None:
        """A descriptor that holds a snapshot while it is open; None when the snapshot is gone.

        Raises Invalid when the mount does not let this pod open the hold file.
        """
        try:
            fd = os.open(self.layout.hold(snapshot), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise refused(error, self.layout.hold(snapshot)) from error
        if self.is_held_by(fd, snapshot) and self.has(snapshot):
            return fd
        os.close(fd)
        return None

    def is_held_by(self, fd: int, snapshot: str) -> bool:
        """Whether the descriptor is still of the hold file of the snapshot."""
        try:
            return os.path.samestat(os.fstat(fd), self.layout.hold(snapshot).stat())
        except FileNotFoundError:
            return False


def target_of(link: Path) -> str:
    """The target of a symbolic link; empty when there is no link."""
    try:
        return str(link.readlink())
    except OSError:
        return ""


def refused(error: OSError, path: Path) -> Invalid:
    """The error for a call about `path` that the pod's mounts do not allow."""
    return Invalid(f"{path}: {error.strerror}", code="pod_misconfigured", hint="check the pod's mounts")


def _document(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the mount; empty when the file is missing or holds something else."""
    try:
        document = files.document(path, at_most=MAX_BYTES)
    except files.UNREADABLE:
        return {}
    return document if isinstance(document, dict) else {}
