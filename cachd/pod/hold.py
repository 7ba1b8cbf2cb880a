"""Holds one snapshot of a model for the life of a pod.

    hold    choose the snapshot: the one the pod's link points to, else the one the name points to
            -> open its hold file
            -> check that the open file is still the one at its path
            -> make the link
            -> keep the descriptor open

The daemon removes a hold file before it removes the snapshot. If it did so before the open, the check fails.
If it tries later, the kernel denies it the lease that the removal needs (store/holds.py).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from cachd.errors import Invalid
from cachd.model import check_name
from cachd.pod.mount import TREE, Mount, refused, target_of
from cachd.pod.wait import Patience, Report

# Blocked, then awaited: process 1 never gets a signal that it has no handler for (pid_namespaces(7)).
ENDS = {signal.SIGTERM, signal.SIGINT}


class Holder:
    """Holds one snapshot of a model for the life of a pod, with a link to it at `folder/NAME`.

    The link outlives the holder. A holder that is started again holds the linked snapshot, even when the name
    points to a newer one by then. Only if the linked snapshot no longer exists, a new link is made.
    """

    def __init__(self, mount: Mount, name: str, folder: Path, *, report: Report) -> None:
        self._mount, self._name, self._report = mount, check_name(name), report
        self.link = folder.absolute() / name
        self.snapshot = ""

    def hold(self, patience: Patience) -> int:
        """Hold a snapshot and make the link. Returns the descriptor that holds the snapshot while it is open.

        Raises as Patience.pause, and Invalid when the link cannot be made.
        """
        while True:
            linked = self._linked()
            wanted = linked or self._mount.snapshot(self._name)
            fd = self._mount.open_hold(wanted) if wanted else None
            if wanted and fd is not None:
                if linked or self._mount.snapshot(self._name) == wanted:
                    self._link_to(wanted)
                    self.snapshot = wanted
                    return fd
                os.close(fd)  # a newer snapshot was published in between: hold that one
            patience.pause("the hold file of its snapshot cannot be opened" if wanted else "")

    def become(self, fd: int, command: list[str]) -> None:
        """Replace this process by a command, which inherits `fd` and so holds the snapshot while it runs.

        Without a command, a new interpreter holds the snapshot until SIGTERM. It needs half the memory of
        this process. Raises Invalid when the command cannot be run.
        """
        if not command:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
            command = [sys.executable, "-P", "-m", "cachd.pod", str(fd), self._name, self.snapshot]
            command.append(str(self._mount.layout.root))
        self._report(f"{self._name}: snapshot {self.snapshot} is held; {self.link} points to it")
        os.set_inheritable(fd, True)  # noqa: FBT003 takes no keyword
        try:
            os.execvp(command[0], command)  # noqa: S606 the command that the pod was given
        except OSError as error:
            raise refused(error, Path(command[0])) from error

    def _linked(self) -> str | None:
        """The snapshot that the link points to, if it still exists. Raises Invalid for another file there."""
        target = target_of(self.link)
        trees = f"{self._mount.layout.trees}/"
        if target.startswith(trees) and (found := TREE.fullmatch(f".trees/{target.removeprefix(trees)}")):
            return found[1] if self._mount.has(found[1]) else None
        if self.link.exists():
            raise Invalid(
                f"{self.link} already exists and is not a link to a snapshot below {trees}",
                code="link_taken",
                hint="use an emptyDir of the pod, and mount the cache at the same path in every container",
            )
        return None

    def _link_to(self, snapshot: str) -> None:
        """Make the link point to a snapshot, atomically. Raises Invalid."""
        before, target = target_of(self.link), str(self._mount.layout.tree(snapshot))
        if before == target:
            return
        staged = self.link.with_name(f".{self._name}.new")
        try:
            staged.unlink(missing_ok=True)
            staged.symlink_to(target)
            staged.rename(self.link)
        except OSError as error:
            raise refused(error, self.link) from error
        if before:
            self._report(f"{self._name}: {self.link} pointed to {before}, which no longer exists")
