"""Disks that are small, full, broken or gone: real file systems on loop devices, and one in user space that
fails and forgets on demand."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from tests.ground.needs import libfuse, refuse, require

MIB = 1 << 20
PROJECT = Path(__file__).parent.parent.parent
SMALLEST = {"ext4": 64 * MIB, "xfs": 300 * MIB, "btrfs": 128 * MIB}
_MAKE: dict[str, list[str]] = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-m", "0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


@contextmanager
def loop(place: Path, kind: str = "ext4", *, inodes: int | None = None, options: str = "") -> Iterator[Path]:
    """A file system of `kind` and the smallest sensible size, mounted below `place`; its mount point.

    Skips the test where that cannot be, with the reason.
    """
    require("root", "mount", _MAKE[kind][0])
    image, disk = place / f"{kind}.image", place / kind
    image.touch()
    os.truncate(image, SMALLEST[kind])
    some = ["-N", str(inodes)] if inodes else []
    subprocess.run([*_MAKE[kind], *some, image], check=True, capture_output=True)
    disk.mkdir()
    wanted = ",".join(filter(None, ["loop", options]))
    mounted = subprocess.run(["mount", "-o", wanted, image, disk], capture_output=True, text=True)
    if mounted.returncode:
        refuse("loop", mounted.stderr)
    try:
        disk.chmod(0o755)
        yield disk
    finally:
        unmount(disk)
        image.unlink()


def remount(disk: Path, option: str) -> None:
    """Mount what is there once more: `ro`, `rw`, `size=BYTES`."""
    # With a source named, mount adds none of the options that stand in the list of mounts: a user namespace
    # would refuse its own, an owner whom it does not know.
    subprocess.run(["mount", "-o", f"remount,{option}", "none", disk], check=True)


def unmount(disk: Path) -> None:
    """Take the file system away, whoever still has it open."""
    if subprocess.run(["umount", disk], capture_output=True).returncode:
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Take every free block but `leave` bytes; the file that has them."""
    filler = disk / "filler"
    status = os.statvfs(disk)
    piece, taken = status.f_bavail * status.f_frsize - leave, 0
    with filler.open("wb") as opened:
        while piece >= 4096 and not (leave and taken):
            try:
                os.posix_fallocate(opened.fileno(), taken, piece)
                taken += piece
            except OSError:
                piece //= 2
    return filler


def take_inodes(disk: Path, *, leave: int) -> Path:
    """Leave so many inodes of a file system; the directory that has the others."""
    fillers = disk / "fillers"
    fillers.mkdir()
    taken = []
    with suppress(OSError):
        for number in itertools.count():
            taken.append(fillers / str(number))
            taken[-1].touch()
    for filler in taken[-1 - leave :]:
        filler.unlink(missing_ok=True)
    assert os.statvfs(disk).f_favail == leave
    return fillers


class FuseDisk:
    """`fuse_disk` over a directory, by default `place/backing`, mounted at `place/fuse` while inside `with`.

    Several over one directory do not know each other's locks. Skips the test where there can be none, with
    the reason.
    """

    def __init__(self, place: Path, *, backing: Path | None = None) -> None:
        self.backing, self.path = backing or place / "backing", place / "fuse"
        self._rules_file, self._log = place / "rules.json", place / "log"
        self._rules: list[dict[str, Any]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        require("mount", "fuse")
        for directory in (self.backing, self.path):
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)
        self._log.touch()
        self._write_rules()
        command = [sys.executable, "-m", "tests.ground.fuse_disk"]
        serving = subprocess.Popen(
            [*command, self.backing, self.path, self._rules_file, self._log],
            cwd=PROJECT,
            env={**os.environ, "FUSE_LIBRARY_PATH": str(libfuse())},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert serving.stdout is not None
        self._stack.enter_context(serving)
        self._stack.callback(serving.kill)
        assert serving.stdout.readline() == "mounted\n", "the reason is in the output of this test"
        self._stack.callback(unmount, self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fail(self, operation: str, error: str | None = None, match: str = "*", **rest: float | str) -> None:
        """Let calls of an operation fail from now on; see `fuse_disk` for the rest of a rule."""
        known = {"operation": operation, "match": match, "id": str(len(self._rules)), **rest}
        self._rules.append(known | ({"error": error} if error else {}))
        self._write_rules()

    def heal(self) -> None:
        """Fail no more."""
        self._rules = [{**rule, "times": 0} for rule in self._rules]
        self._write_rules()

    def records(self) -> list[tuple[Any, ...]]:
        """What was changed and synced so far."""
        found = []
        with self._log.open("rb") as opened, suppress(EOFError):
            while True:
                found.append(pickle.load(opened))
        return found

    def _write_rules(self) -> None:
        beside = self._rules_file.with_suffix(".new")
        beside.write_text(json.dumps(self._rules))
        beside.replace(self._rules_file)
