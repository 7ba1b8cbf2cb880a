"""Faults in the system calls that cachd makes below its root: the Nth fails, or the process dies there.

The calls are caught where all of them pass, in the module `os` of a forked child: whatever cachd uses to
reach the disk, pathlib included, is counted, if its path or its descriptor is below the root.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALLS = (
    *("open", "pwrite", "write", "preadv", "fsync", "fdatasync", "ftruncate", "posix_fallocate"),
    *("rename", "replace", "link", "symlink", "unlink", "mkdir", "rmdir", "chmod", "fchmod", "statvfs"),
)
GROWS = frozenset({"open", "pwrite", "write", "posix_fallocate", "rename", "link", "symlink", "mkdir"})
CHANGES = GROWS | {"ftruncate", "unlink", "rmdir", "chmod", "fchmod", "replace"}
KILLS = ("killed before", "killed after")
ERRORS = (
    "EIO",
    "ENOSPC",
    "EDQUOT",
    "EINTR",
    "short write",
    "disk full from here on",
    "read-only from here on",
)
HALF_WAY = "killed half-way"  # of a write


class Tally:
    """Counters that a killed child leaves behind: calls made, faults by kind."""

    KINDS = (*KILLS, HALF_WAY, *ERRORS)

    def __init__(self) -> None:
        self._counts = multiprocessing.RawArray("q", len(self.KINDS))
        self._calls = multiprocessing.RawValue("q", 0)

    @property
    def calls(self) -> int:
        return int(self._calls.value)

    def called(self) -> int:
        """One call more; how many there were before."""
        self._calls.value += 1
        return self.calls - 1

    def injected(self, kind: str) -> None:
        self._counts[self.KINDS.index(kind)] += 1

    def faults(self) -> dict[str, int]:
        return {kind: n for kind, n in zip(self.KINDS, self._counts, strict=True) if n}

    def forget_calls(self) -> None:
        self._calls.value = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes wrong: the call number `at` (from 0), or the first after it that can, as `kind` says; those
    after that with `chance`, anyhow.

    With a `point`, a pattern of a call's name and its paths below the root, the numbers begin at the first
    such call: "rename .cachd/ingest/.*/data .cachd/blobs/" and 0 is that call, 1 the one after it.
    """

    kind: str
    at: int
    chance: float = 0.0
    seed: int = 0
    point: str = ""

    def __str__(self) -> str:
        more = f", {self.chance:.0%} of the calls, seed {self.seed}" if self.chance else ""
        return f"call {self.at}{self.point and f' from {self.point!r}'}: {self.kind}{more}"


class Injection:
    """The plan at work in this process, below `root`, until `over`. The calls stay wrapped until it ends."""

    def __init__(self, root: Path, plan: Plan, tally: Tally) -> None:
        self._root, self._plan, self._tally = str(root), plan, tally
        self._lock = threading.RLock()
        self._chosen = random.Random(plan.seed)
        self._inside = threading.local()
        self._done = False
        self._for_good: str | None = None
        self._point = re.compile(plan.point)
        self._reached = False
        self._over = False
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def over(self) -> None:
        """From here on every call succeeds."""
        self._over = True

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            if self._over or getattr(self._inside, "it", False):
                return call(*args, **more)
            self._inside.it = True  # what is called while we look is not cachd's
            try:
                below = self._below(args[:2])
            finally:
                self._inside.it = False
            if not below:
                return call(*args, **more)
            with self._lock:
                self._reached = self._reached or bool(self._point.match(f"{name} {' '.join(below)}"))
                kind = self._kind(self._tally.called(), name, args) if self._reached else None
                if kind:
                    self._tally.injected(kind)
            return self._spoilt(kind, name, call, args, more) if kind else call(*args, **more)

        return counted

    def _below(self, args: tuple[object, ...]) -> list[str]:
        """The paths below the root that a call is about, by name or by descriptor, relative to it."""
        first, *rest = args
        paths = [str(p) for p in (first, *rest) if isinstance(p, str | os.PathLike)]
        if isinstance(first, int):
            try:
                paths.append(os.readlink(f"/proc/self/fd/{first}"))
            except OSError:
                return []
        return [path[len(self._root) + 1 :] or "." for path in paths if path.startswith(self._root)]

    def _kind(self, number: int, name: str, args: tuple[Any, ...]) -> str | None:
        if self._for_good and self._fits(self._for_good, name, args):
            return self._for_good
        if number >= self._plan.at and not self._done and self._fits(self._plan.kind, name, args):
            self._done = True
            if self._plan.kind.endswith("from here on"):
                self._for_good = self._plan.kind
            return self._plan.kind
        if self._done and self._chosen.random() < self._plan.chance:
            kind = self._chosen.choice(ERRORS[:5])
            return kind if self._fits(kind, name, args) else None
        return None

    @staticmethod
    def _fits(kind: str, name: str, args: tuple[Any, ...]) -> bool:
        """Whether this call can fail in this way."""
        creates = name != "open" or bool(args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
        match kind:
            case "short write" | "killed half-way":
                return name in ("pwrite", "write") and len(args[1]) > 1
            case "ENOSPC" | "EDQUOT" | "disk full from here on":
                return (name in GROWS or name in ("fsync", "fdatasync")) and creates
            case "read-only from here on":
                return name in CHANGES and creates
            case _:
                return True

    def _spoilt(self, kind: str, name: str, call: Callable[..., Any], args: Any, more: Any) -> Any:
        match kind:
            case "killed before":
                os.kill(os.getpid(), signal.SIGKILL)
            case "killed after":
                call(*args, **more)
                os.kill(os.getpid(), signal.SIGKILL)
            case "killed half-way":
                call(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:], **more)
                os.kill(os.getpid(), signal.SIGKILL)
            case "short write":
                return call(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:], **more)
        numbers = {"disk full from here on": "ENOSPC", "read-only from here on": "EROFS"}
        number = getattr(errno, numbers.get(kind, kind))
        raise OSError(number, os.strerror(number), str(args[0]))
