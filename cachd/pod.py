"""Waits for a model and holds it for the life of a pod, with nothing but the read-only mount of the cache.

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
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cachd import files
from cachd.errors import Invalid, NotKnown, WaitTimeout, error_of
from cachd.model import check_name
from cachd.store.layout import Layout

_CHECK_SECONDS = 0.25  # between two checks whether a model is ready
_HOLD_SECONDS = 2.0  # between two checks of a hold file that is held
_TELL_SECONDS = 10.0  # between two lines of progress
# Blocked, then awaited: process 1 never gets a signal that it has no handler for (pid_namespaces(7)).
_ENDS = {signal.SIGTERM, signal.SIGINT}
_MOST_BYTES = 4 << 20  # of a ready or status file
_TREE = re.compile(r"\.trees/([0-9a-f]{32,64})")
Tell = Callable[[str], None]


class Mount:
    """The cache as a pod sees it: a read-only mount of the root."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root.absolute())

    def snapshot(self, name: str) -> str | None:
        """The id of a ready model's snapshot; None when the model is not ready, or is just being replaced."""
        ready = _read(self.layout.ready_file(name))
        tree = _TREE.fullmatch(_link(self.layout.model(name)))
        return tree[1] if tree and ready.get("manifest") == tree[1] and self.has(tree[1]) else None

    def has(self, snapshot: str) -> bool:
        """Whether the files of a snapshot are here."""
        return self.layout.tree(snapshot).is_dir()

    def status(self, name: str) -> Mapping[str, Any]:
        """The status of a model, as the daemon last wrote it; empty when there is no status file."""
        return _read(self.layout.status_file(name))

    def open_hold(self, snapshot: str) -> int | None:
        """A descriptor that holds a snapshot while it is open; None when the snapshot is gone.

        Raises Invalid when the mount does not let this pod open the hold file.
        """
        try:
            fd = os.open(self.layout.hold(snapshot), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refused(error, self.layout.hold(snapshot)) from error
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


class Patience:
    """How long to wait for one model.

    `seconds`: for the model. `unknown_seconds`: for this node to learn of the model. `tell` gets a line of
    progress for people at most every ten seconds.
    """

    def __init__(
        self, mount: Mount, name: str, *, seconds: float, unknown_seconds: float, tell: Tell
    ) -> None:
        self._mount, self._name, self._tell = mount, check_name(name), tell
        self._seconds, self._unknown_seconds = seconds, min(unknown_seconds, seconds)
        self._began, self._said = time.monotonic(), ("", -_TELL_SECONDS)

    def pause(self, why: str = "") -> None:
        """Sleep until the next check.

        Raises the error of a pull that failed for good, NotKnown when this node did not learn of the model in
        time, or WaitTimeout. `why` states the cause of the wait when it is not the pull.
        """
        status, waited = self._mount.status(self._name), time.monotonic() - self._began
        failed = status.get("error")
        if status.get("final") is True and isinstance(failed, dict) and not why:
            raise error_of(failed)
        known = bool(why or status or self._mount.layout.ready_file(self._name).exists())
        if not known and waited >= self._unknown_seconds:
            raise NotKnown(
                f"no cachd on this node knows {self._name} after {waited:.0f} s: it has no file in"
                f" {self._mount.layout.root}/ready or {self._mount.layout.root}/status",
                hint="list the model in the configuration (models:), or pull it; check that this directory is"
                " the root of the cache",
            )
        state = why or _state(status)
        if waited >= self._seconds:
            raise WaitTimeout(
                f"{self._name} is not ready after {waited:.0f} s: {state}", hint="wait longer (--timeout)"
            )
        self._say(f"waiting for {self._name}: {state}", waited)
        left = [limit - waited for limit in (self._seconds, self._unknown_seconds) if limit > waited]
        time.sleep(min(_CHECK_SECONDS, *left))

    def _say(self, line: str, now: float) -> None:
        said, at = self._said
        if line != said and now - at >= _TELL_SECONDS:
            self._tell(line)
            self._said = line, now


def wait(mount: Mount, name: str, patience: Patience) -> Path:
    """Wait until the model is ready. Returns its path in the mount. Raises as Patience.pause."""
    while mount.snapshot(name) is None:
        patience.pause()
    return mount.layout.model(name)


class Holder:
    """Holds one snapshot of a model for the life of a pod, with a link to it at `folder/NAME`.

    The link outlives the holder. A holder that is started again holds the linked snapshot, even when the name
    points to a newer one by then. Only if the linked snapshot no longer exists, a new link is made.
    """

    def __init__(self, mount: Mount, name: str, folder: Path, *, tell: Tell) -> None:
        self._mount, self._name, self._tell = mount, check_name(name), tell
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
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
            command = [sys.executable, "-P", "-m", "cachd.pod", str(fd), self._name, self.snapshot]
            command.append(str(self._mount.layout.root))
        self._tell(f"{self._name}: snapshot {self.snapshot} is held; {self.link} points to it")
        os.set_inheritable(fd, True)
        try:
            os.execvp(command[0], command)  # noqa: S606
        except OSError as error:
            raise _refused(error, Path(command[0])) from error

    def _linked(self) -> str | None:
        """The snapshot that the link points to, if it still exists. Raises Invalid for another file there."""
        target = _link(self.link)
        trees = f"{self._mount.layout.trees}/"
        if target.startswith(trees) and (found := _TREE.fullmatch(f".trees/{target.removeprefix(trees)}")):
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
        before, target = _link(self.link), str(self._mount.layout.tree(snapshot))
        if before == target:
            return
        staged = self.link.with_name(f".{self._name}.new")
        try:
            staged.unlink(missing_ok=True)
            staged.symlink_to(target)
            staged.rename(self.link)
        except OSError as error:
            raise _refused(error, self.link) from error
        if before:
            self._tell(f"{self._name}: {self.link} pointed to {before}, which no longer exists")


def keep(fd: int, name: str, snapshot: str, mount: Mount) -> None:
    """Hold a snapshot until SIGTERM or SIGINT.

    If the snapshot was deleted by force and is pulled again, it is held again.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    while signal.sigtimedwait(_ENDS, _HOLD_SECONDS) is None:
        if mount.is_held_by(fd, snapshot):
            continue
        again = mount.open_hold(snapshot)
        if again is not None:
            os.dup2(again, fd)
            os.close(again)
            print(f"{name}: snapshot {snapshot} came back and is held again", file=sys.stderr, flush=True)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the mount; empty when the file is missing or holds something else."""
    try:
        document = files.document(path, at_most=_MOST_BYTES)
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _link(path: Path) -> str:
    """The target of a symbolic link; empty when there is no link."""
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _state(status: Mapping[str, Any]) -> str:
    """The state and progress of a model, for people."""
    text = str(status.get("state", "not known on this node yet"))
    size, failed = status.get("bytes"), status.get("error")
    if isinstance(size, dict) and size.get("total"):
        text += f", {size.get('done')} of {size['total']} bytes"
    if isinstance(failed, dict):
        text += f" ({failed.get('detail')})"
    return text[:1000]


def _refused(error: OSError, path: Path) -> Invalid:
    return Invalid(f"{path}: {error.strerror}", code="pod_misconfigured", hint="check the pod's mounts")


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2], sys.argv[3], Mount(Path(sys.argv[4])))
