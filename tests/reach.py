"""Records which blocks of cachd a file of tests runs, in the tests' own process and in all that it starts.

A block is a body of a function, a loop, a branch or a handler. In a copy of the project, `Reach` puts a call
before the first statement of each block. The call writes the number of the block to a file, once for each
process, so that a process that is killed has left its numbers, too.
"""

from __future__ import annotations

import ast
from bisect import insort
from collections.abc import Iterator
from pathlib import Path

RECORDER = """import os

_seen = set()


def seen(number):
    if number not in _seen:
        _seen.add(number)
        try:
            fd = os.open({path!r}, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            os.write(fd, b"%d\\n" % number)
            os.close(fd)
        except OSError:
            pass
"""


class Reach:
    """The blocks of the code below `root`, a copy of the project."""

    def __init__(self, root: Path) -> None:
        self._root, self._record = root, root.parent / "seen"
        self._recorder = root / "cachd/seen.py"
        paths = sorted((root / "cachd").rglob("*.py"))
        self._texts = {str(path.relative_to(root)): path.read_text() for path in paths}
        self._blocks: dict[str, list[tuple[int, int]]] = {}  # (first line, last line) of each block
        self._numbers: dict[tuple[str, int], int] = {}  # by module and first line
        for module, text in self._texts.items():
            self._blocks[module] = list(_blocks(text))
            for first, _ in self._blocks[module]:
                self._numbers[module, first] = len(self._numbers)

    def begin(self) -> None:
        """Make the code of the copy record its blocks."""
        self._recorder.write_text(RECORDER.format(path=str(self._record)))
        for module in self._texts:
            (self._root / module).write_text(self._marked(module))
        self.forget()

    def forget(self) -> None:
        """Forget what was recorded until now."""
        self._record.write_text("")
        self._record.chmod(0o666)

    def recorded(self) -> set[int]:
        """The numbers of the blocks that ran since `forget`."""
        return {int(line) for line in self._record.read_text().split()}

    def number(self, module: str, line: int) -> int | None:
        """The number of the innermost block around a line; None outside of all."""
        around = [(last - first, first) for first, last in self._blocks[module] if first <= line <= last]
        return self._numbers[module, min(around)[1]] if around else None

    def _marked(self, module: str) -> str:
        lines = self._texts[module].splitlines(keepends=True)
        for first, _ in sorted(self._blocks[module], reverse=True):
            indent = lines[first - 1][: len(lines[first - 1]) - len(lines[first - 1].lstrip())]
            number = self._numbers[module, first]
            lines.insert(first - 1, f"{indent}from cachd.seen import seen; seen({number})\n")
        return "".join(lines)


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """The first and the last line of each block of a module, without docstrings."""
    lines = text.splitlines()
    found: list[tuple[int, int]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef):
            continue
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if not isinstance(body, list) or not body:
                continue
            if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body = body[1:]  # a docstring, or `...`
            if not body:
                continue
            first = min([body[0].lineno, *(each.lineno for each in getattr(body[0], "decorator_list", ()))])
            before = lines[first - 1][: body[0].col_offset]
            if not before.strip(" @") and not lines[first - 1].lstrip().startswith("elif"):
                insort(found, (first, body[-1].end_lineno or first))
    yield from found
