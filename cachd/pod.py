"""A pod's side of the cache, with the mount alone: wait for a model; hold it for as long as the pod lives.

    hold    the snapshot that the link leads to, else the one that the name leads to -> open its hold file
            -> it is still the file at its path -> make the link -> keep the descriptor

Whoever took the snapshot away did so before the file was opened, and then it is at its path no more; or comes
later, and then the kernel refuses it (store/holds.py).
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

_LOOK_SECONDS = 0.25  # between two looks at the files of a model that is not ready
_HOLD_SECONDS = 2.0  # between two looks at a hold file that is held
_TELL_SECONDS = 10.0
_ENDS = {signal.SIGTERM, signal.SIGINT}  # blocked and waited for: process 1 gets them no other way
_MOST_BYTES = 4 << 20  # of a file that is read
_TREE = re.compile(r"\.trees/([0-9a-f]{32,64})")
Tell = Callable[[str], None]


class Mount:
    """The root of a cache as a pod sees it: read-only, through a mount."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root.absolute())

    def snapshot(self, name: str) -> str | None:
        """The snapshot that a name leads to while it is ready; None when it is not, or moves just now."""
        told = _read(self.layout.ready_file(name))
        tree = _TREE.fullmatch(_link(self.layout.model(name)))
        return tree[1] if tree and told.get("manifest") == tree[1] and self.has(tree[1]) else None

    def has(self, snapshot: str) -> bool:
        return self.layout.tree(snapshot).is_dir()

    def status(self, name: str) -> Mapping[str, Any]:
        """How far a model is, as the daemon last wrote it; empty when it never heard of it."""
        return _read(self.layout.status_file(name))

    def open_hold(self, snapshot: str) -> int | None:
        """A descriptor that holds a snapshot for as long as it is open; None when it cannot be held now."""
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
        """Whether the descriptor still is of the file by which the snapshot is held."""
        try:
            return os.path.samestat(os.fstat(fd), self.layout.hold(snapshot).stat())
        except FileNotFoundError:
            return False


class Patience:
    """How long to wait for one model, and what ends the wait. `tell` takes a line for people now and then."""

    def __init__(
        self, mount: Mount, name: str, *, seconds: float, unknown_seconds: float, tell: Tell
    ) -> None:
        self._mount, self._name, self._tell = mount, check_name(name), tell
        self._seconds, self._unknown_seconds = seconds, min(unknown_seconds, seconds)
        self._began, self._told = time.monotonic(), ("", -_TELL_SECONDS)

    def pause(self, why: str = "") -> None:
        """Until it is worth another look.

        Raises what the pull failed with for good; NotKnown when the node has not heard of the model for so
        long; WaitTimeout. `why`: what is waited for, when it is not the pull.
        """
        status, waited = self._mount.status(self._name), time.monotonic() - self._began
        failed = status.get("error")
        if status.get("final") is True and isinstance(failed, dict) and not why:
            raise error_of(failed)
        known = bool(why or status or self._mount.layout.ready_file(self._name).exists())
        if not known and waited >= self._unknown_seconds:
            raise NotKnown(
                f"no cachd of this node has heard of {self._name} for {waited:.0f} s:"
                f" nothing of it is in {self._mount.layout.root}/ready or status",
                hint="list it in the configuration (models:), or ask for it; is that the root of the cache?",
            )
        state = why or _state(status)
        if waited >= self._seconds:
            raise WaitTimeout(
                f"{self._name} is not ready after {waited:.0f} s: {state}", hint="wait longer (--timeout)"
            )
        self._say(f"waiting for {self._name}: {state}", waited)
        left = [limit - waited for limit in (self._seconds, self._unknown_seconds) if limit > waited]
        time.sleep(min(_LOOK_SECONDS, *left))

    def _say(self, line: str, now: float) -> None:
        told, at = self._told
        if line != told and now - at >= _TELL_SECONDS:
            self._tell(line)
            self._told = line, now


def wait(mount: Mount, name: str, patience: Patience) -> Path:
    """Until the name leads to a ready model; its path. Raises as Patience.pause."""
    while mount.snapshot(name) is None:
        patience.pause()
    return mount.layout.model(name)


class Holder:
    """Holds one snapshot of a model for a pod's life, and keeps `folder/NAME` leading to it.

    The link outlives the holder: one that starts again holds the same snapshot, wherever the name leads then.
    Only where that snapshot has gone meanwhile, as after a reboot, the link is made anew.
    """

    def __init__(self, mount: Mount, name: str, folder: Path, *, tell: Tell) -> None:
        self._mount, self._name, self._tell = mount, check_name(name), tell
        self.link = folder.absolute() / name
        self.snapshot = ""

    def hold(self, patience: Patience) -> int:
        """Hold a snapshot and make the link; the descriptor that holds it.

        Raises as Patience.pause; Invalid when the link cannot be made.
        """
        while True:
            linked = self._linked()
            wanted = linked or self._mount.snapshot(self._name)
            fd = self._mount.open_hold(wanted) if wanted else None
            if wanted and fd is not None:
                if linked or self._mount.snapshot(self._name) == wanted:
                    self._lead_to(wanted)
                    self.snapshot = wanted
                    return fd
                os.close(fd)  # the name has moved in between: the newer one, then
            patience.pause("its snapshot has no hold file that can be opened" if wanted else "")

    def become(self, fd: int, command: list[str]) -> None:
        """Run a command in place of this process, which then holds the snapshot for as long as it runs.

        Without a command: what holds it until SIGTERM, in a fresh interpreter that takes half the memory.
        Raises Invalid.
        """
        if not command:
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
            command = [sys.executable, "-P", "-m", "cachd.pod", str(fd), self._name, self.snapshot]
            command.append(str(self._mount.layout.root))
        self._tell(f"{self._name}: snapshot {self.snapshot} is held; {self.link} leads to it")
        os.set_inheritable(fd, True)
        try:
            os.execvp(command[0], command)  # noqa: S606
        except OSError as error:
            raise _refused(error, Path(command[0])) from error

    def _linked(self) -> str | None:
        """The snapshot that the link leads to, if it is still here. Raises Invalid for a foreign link."""
        target = _link(self.link)
        trees = f"{self._mount.layout.trees}/"
        if target.startswith(trees) and (found := _TREE.fullmatch(f".trees/{target.removeprefix(trees)}")):
            return found[1] if self._mount.has(found[1]) else None
        if self.link.exists():
            raise Invalid(
                f"{self.link} is there, and is no link to a snapshot below {trees}",
                code="link_taken",
                hint="give a directory of the pod's own (an emptyDir), and mount the cache at one path",
            )
        return None

    def _lead_to(self, snapshot: str) -> None:
        """Let the link lead to a snapshot, in one step."""
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
            self._tell(f"{self._name}: {self.link} led to {before}, which is not here any more")


def keep(fd: int, name: str, snapshot: str, mount: Mount) -> None:
    """Hold a snapshot until SIGTERM or SIGINT. What was removed by force is held again when it comes back."""
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
    """A JSON object of the mount; empty when it is not there, or is none."""
    try:
        told = files.document(path, at_most=_MOST_BYTES)
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _link(path: Path) -> str:
    """What a symbolic link says; empty when there is none."""
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _state(status: Mapping[str, Any]) -> str:
    """How far a model is, as people read it."""
    text = str(status.get("state", "not known here yet"))
    moved, failed = status.get("bytes"), status.get("error")
    if isinstance(moved, dict) and moved.get("total"):
        text += f", {moved.get('done')} of {moved['total']} bytes"
    if isinstance(failed, dict):
        text += f" ({failed.get('detail')})"
    return text[:1000]


def _refused(error: OSError, path: Path) -> Invalid:
    return Invalid(f"{path}: {error.strerror}", code="pod_misconfigured", hint="look at the pod's mounts")


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2], sys.argv[3], Mount(Path(sys.argv[4])))
