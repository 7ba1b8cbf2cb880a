"""What a disk may hold after the power went: worked out from the records of `fuse_disk`.

POSIX promises little: a file's bytes and mode are as of its last sync, a directory's names as of its last
sync; what was changed since may be there, or not, each directory for itself. `after_power_loss` gives such
states for one moment: nothing unsynced there; every name there but no byte; every name and the sizes, full of
zeros; everything; and, for each directory, its names alone there or its names alone not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Names = dict[str, int]


@dataclass(slots=True)
class _File:
    mode: int
    content: bytearray = field(default_factory=bytearray)
    durable: tuple[bytes, int] | None = None

    def held(self, bytes_there: str) -> tuple[bytes, int]:
        """Content and mode: `none` of what is unsynced there, `zeros` in its place, or `all`."""
        if bytes_there == "all":
            return bytes(self.content), self.mode
        content, mode = self.durable or (b"", self.mode)
        return (content.ljust(len(self.content), b"\0") if bytes_there == "zeros" else content), mode


@dataclass(slots=True)
class _Directory:
    mode: int
    names: Names = field(default_factory=dict)
    durable: Names = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Link:
    target: str


@dataclass(frozen=True, slots=True)
class State:
    """A tree: (path, what) of everything below the root, parents first. What: a mode of a directory, the
    target of a link, or number, content and mode of a file; equal numbers are one file."""

    said: str
    entries: tuple[tuple[str, int | str | tuple[int, bytes, int]], ...]

    def lay_out(self, root: Path) -> None:
        """Make the tree in an empty directory."""
        files: dict[int, Path] = {}
        for path, what in self.entries:
            at = root / path
            if isinstance(what, int):
                at.mkdir()
            elif isinstance(what, str):
                at.symlink_to(what)
            elif what[0] in files:
                os.link(files[what[0]], at)
            else:
                files[what[0]] = at
                at.write_bytes(what[1])
                at.chmod(what[2] & 0o7777)
        for path, what in reversed(self.entries):
            if isinstance(what, int):
                (root / path).chmod(what & 0o7777)


class Disk:
    """The disk as the records change it."""

    def __init__(self) -> None:
        self._nodes: dict[int, _File | _Directory | _Link] = {0: _Directory(0o755)}

    def apply(self, record: tuple[Any, ...]) -> None:
        getattr(self, f"_{record[0]}")(*record[1:])

    def after_power_loss(self) -> Iterator[State]:
        """States the disk may be found in if the power went now."""
        changed = {n for n, d in self._directories() if d.names != d.durable}
        yield self._state("nothing unsynced is there", set(), "none")
        yield self._state("names are there and no byte", changed, "none")
        yield self._state("names are there, and zeros", changed, "zeros")
        yield self._state("everything is there", changed, "all")
        for one in sorted(changed) if len(changed) > 1 else ():
            yield self._state(f"only the names in {one} are there", {one}, "none")
            yield self._state(f"only the names in {one} are lost", changed - {one}, "none")

    def _state(self, said: str, there: set[int], bytes_there: str) -> State:
        def walk(number: int, at: str) -> Iterator[tuple[str, int | str | tuple[int, bytes, int]]]:
            directory = self._directory(number)
            for name, child in sorted((directory.names if number in there else directory.durable).items()):
                node, path = self._nodes[child], f"{at}{name}"
                if isinstance(node, _Link):
                    yield path, node.target
                elif isinstance(node, _File):
                    yield path, (child, *node.held(bytes_there))
                else:
                    yield path, node.mode
                    yield from walk(child, f"{path}/")

        return State(said, tuple(walk(0, "")))

    def _directories(self) -> Iterable[tuple[int, _Directory]]:
        return [(n, node) for n, node in self._nodes.items() if isinstance(node, _Directory)]

    def _directory(self, number: int) -> _Directory:
        found = self._nodes[number]
        assert isinstance(found, _Directory)
        return found

    def _file(self, number: int) -> _File:
        found = self._nodes[number]
        assert isinstance(found, _File)
        return found

    # --- the records ---

    def _create(self, number: int, parent: int, name: str, mode: int) -> None:
        self._nodes[number] = _File(mode)
        self._link(number, parent, name)

    def _directory_made(self, number: int, parent: int, name: str, mode: int) -> None:
        self._nodes[number] = _Directory(mode)
        self._link(number, parent, name)

    def _symlink(self, number: int, parent: int, name: str, target: str) -> None:
        self._nodes[number] = _Link(target)
        self._link(number, parent, name)

    def _link(self, number: int, parent: int, name: str) -> None:
        self._directory(parent).names[name] = number

    def _unlink(self, parent: int, name: str) -> None:
        del self._directory(parent).names[name]

    def _rename(self, parent: int, name: str, new_parent: int, new_name: str) -> None:
        self._directory(new_parent).names[new_name] = self._directory(parent).names.pop(name)

    def _write(self, number: int, offset: int, content: bytes) -> None:
        held = self._file(number).content
        held.extend(bytes(max(0, offset - len(held))))
        held[offset : offset + len(content)] = content

    def _truncate(self, number: int, size: int) -> None:
        held = self._file(number).content
        del held[size:]
        held.extend(bytes(size - len(held)))

    def _mode(self, number: int, mode: int) -> None:
        node = self._nodes[number]
        assert not isinstance(node, _Link)
        node.mode = mode

    def _sync(self, number: int) -> None:
        file = self._file(number)
        file.durable = bytes(file.content), file.mode

    def _sync_directory(self, number: int) -> None:
        directory = self._directory(number)
        directory.durable = dict(directory.names)
