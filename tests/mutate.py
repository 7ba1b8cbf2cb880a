"""Puts bugs into a copy of the code, one at a time, and counts those that the tests find: `make mutate`.

A bug is one small change at a place that a seed chooses: it negates a condition, leaves out a call, changes a
comparison, adds one to a number, returns None, False or True instead of the value, or takes no lock. The
tests that know the module best then run in the copy until one fails. `Related` ranks the files of tests by
what they import, by their names, and by how many names of the module they use that few other files use.

Each file of tests first runs once without a bug. A file that fails then is not used; the time of the others
sets the deadline. A bug whose run exceeds the deadline counts as killed: it makes the tests hang. A bug may
delete files that it should not, so run this as root only on a machine that you can throw away.

The exit status is 0 if at least 95 % of the bugs are killed.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent
WHERE = ("store", "kernel", "sources", "transfer", "upkeep", "policy", "api", "config", "daemon")
LEAST_KILLED = 0.95
MAX_FILES = 10  # of tests, considered for a module
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", ".cache", ".demo", "__pycache__", "results")
TURNED: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
LOCKS_MADE = re.compile(r"^(.+?)=.*\bthreading\.(?:Lock|RLock|Condition)\b", re.MULTILINE)
NO_LOCK = '__import__("contextlib").nullcontext()'
SAYS_ONLY = re.compile(r"(log|logger|warnings)\.|super\(\)\.__init__")  # calls that need no test
WORD = re.compile(r"[A-Za-z_]{4,}")


@dataclass(frozen=True, slots=True)
class Bug:
    """A replacement of the text between two offsets of a module."""

    module: str
    line: int
    start: int
    stop: int
    was: str
    becomes: str
    kind: str

    def put_in(self, text: bytes) -> bytes:
        return text[: self.start] + self.becomes.encode() + text[self.stop :]

    def __str__(self) -> str:
        was, becomes = (" ".join(each.split()) for each in (self.was, self.becomes))
        return f"{self.module}:{self.line}: {self.kind}: {was:.70} -> {becomes:.70}"


def locks(text: str) -> set[str]:
    """The names of the variables and attributes that a module sets to locks or conditions."""
    return {name for left in LOCKS_MADE.findall(text) for name in re.findall(r"(?:self\.)?(\w+)", left)}


def bugs(module: str, text: str, locks: Set[str]) -> Iterator[Bug]:  # noqa: C901 one branch for each kind of bug
    """Every bug of a module, in the order of its lines. `locks`: the names of locks, its own or inherited."""
    content = text.encode()
    lines = [0, *itertools.accumulate(len(line) for line in content.splitlines(keepends=True))]

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        stop = lines[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        return lines[node.lineno - 1] + node.col_offset, stop

    def source(node: ast.expr | ast.stmt) -> str:
        return content[slice(*span(node))].decode()

    def bug(node: ast.expr | ast.stmt, kind: str, becomes: str) -> Bug:
        return Bug(module, node.lineno, *span(node), source(node), becomes, kind)

    for node in _walked(ast.parse(text)):
        match node:
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                if not (isinstance(test, ast.Constant) or source(test) == "TYPE_CHECKING"):
                    yield bug(test, "condition negated", f"(not ({source(test)}))")
            case ast.Expr(value=ast.Call() as call) if not SAYS_ONLY.match(source(call)):
                yield bug(node, "call left out", "pass")
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                turned = f"({source(left)} {TURNED[type(op)]} {source(right)})"
                yield bug(node, "comparison turned", turned)
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                yield bug(node, "one larger", str(number + 1))
            case ast.Return(value=ast.expr() as value):
                for answer in ("None", "False", "True"):
                    if source(value) != answer:
                        yield bug(value, "another answer", answer)
            case ast.With(items=items):
                for expression in (item.context_expr for item in items):
                    if source(expression).removeprefix("self.") in locks:
                        yield bug(expression, "no lock", NO_LOCK)


def _walked(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node, except in annotations, f-strings and patterns: edits there may not be valid Python."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.JoinedStr | ast.match_case | ast.arg):
            continue
        yield node
        kept = [c for c in ast.iter_child_nodes(node) if c is not getattr(node, "annotation", None)]
        waiting += reversed([c for c in kept if c is not getattr(node, "returns", None)])


def chosen(root: Path, seed: int, count: int, only: str) -> list[Bug]:
    """`count` bugs, drawn from all that are possible; the same for the same seed and code."""
    code = root / "cachd"
    paths = [path for part in WHERE for path in sorted((code / part).rglob("*.py"))]
    texts = {str(path.relative_to(root)): path.read_text() for path in paths}
    names = {name for text in texts.values() for name in locks(text)}
    found = [b for module, text in texts.items() if only in module for b in bugs(module, text, names)]
    return random.Random(seed).sample(found, min(count, len(found)))


class Related:
    """Finds the files of tests that know a module, the best first."""

    def __init__(self, root: Path) -> None:
        self._root = root
        files = sorted((root / "tests").rglob("test_*.py"))
        self._texts = {str(path.relative_to(root)): path.read_text() for path in files}
        self._words = {name: set(WORD.findall(text)) for name, text in self._texts.items()}
        self._in = Counter(word for words in self._words.values() for word in words)

    def to(self, module: str) -> list[str]:
        path = Path(module)
        stem = path.stem
        imported = re.compile(rf"(from|import) {'.'.join(path.with_suffix('').parts)}\b")
        named = re.compile(rf"test_(\w+_)?{stem.rstrip('s')}s?(_\w+)?\.py$")
        defined = [
            node.name
            for node in ast.walk(ast.parse((self._root / module).read_text()))
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        own = {stem, *(name.strip("_") for name in defined)}

        def score(test: str) -> float:
            known = sum(1 / self._in[word] for word in own & self._words[test])
            return known + 3 * bool(imported.search(self._texts[test])) + 3 * bool(named.search(test))

        ranked = sorted(self._texts, key=lambda test: (-score(test), test))
        return [test for test in ranked if score(test) > 0][:MAX_FILES]


@dataclass
class Copy:
    """A copy of the project, in which the tests run."""

    root: Path
    _stamps: Iterator[int] = field(default_factory=lambda: itertools.count(int(time.time()) - 10**8))
    _seconds: dict[str, float] = field(default_factory=dict)

    def write(self, module: str, content: bytes) -> None:
        """Each write sets another modification time, so that Python uses no bytecode of an earlier one."""
        path, stamp = self.root / module, next(self._stamps)
        path.write_bytes(content)
        os.utime(path, (stamp, stamp))

    def fit(self, tests: Sequence[str], seconds: float) -> list[str]:
        """The first of these files that pass, as many as fit into `seconds` together."""
        fitting, left = list[str](), seconds
        for test in tests:
            if test not in self._seconds:
                began = time.monotonic()
                passes = not self.failure([test], seconds)
                self._seconds[test] = time.monotonic() - began if passes else math.inf
            if self._seconds[test] <= left:
                left -= self._seconds[test]
                fitting.append(test)
            if left < seconds / 2:
                break
        return fitting

    def deadline(self, tests: Sequence[str]) -> float:
        return 30.0 + 3 * sum(self._seconds[test] for test in tests)

    def failure(self, tests: Sequence[str], seconds: float) -> str:
        """The first test that fails, or that the run hangs; empty if all pass or there is none to run."""
        place = f"--basetemp={self.root.parent}/pytest"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not alone", place, *tests]
        env = {**os.environ, "PYTHONPATH": str(self.root)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running = subprocess.Popen(command, cwd=self.root, env=env, start_new_session=True, **pipes)
        try:
            output, _ = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"nothing after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)  # its own group: all that it started, and nothing else
            running.wait()
        if running.returncode in (0, 5):
            return ""
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
        return found[1] if found else f"pytest's status {running.returncode}"


def main(arguments: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.mutate", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 30), help="repeats an earlier run (default: random)"
    )
    parser.add_argument("--count", type=int, default=100, help="how many bugs (default: %(default)s)")
    parser.add_argument("--only", default="", help="part of a module's path, such as store/space")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="time of the tests for each bug (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="print the bugs and their tests, and run nothing")
    parser.add_argument("--root", type=Path, default=PROJECT, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    found = chosen(asked.root, asked.seed, asked.count, asked.only)
    print(f"{len(found)} bugs, --seed {asked.seed}", flush=True)
    related, killed = Related(asked.root), 0
    if asked.list:
        print(*(f"{bug}\n    {' '.join(related.to(bug.module)[:6])}" for bug in found), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as place:
        copy = Copy(Path(place) / "project")
        shutil.copytree(asked.root, copy.root, ignore=NOT_COPIED, symlinks=True)
        for bug in found:
            tests = copy.fit(related.to(bug.module), asked.seconds)
            text = (asked.root / bug.module).read_bytes()
            copy.write(bug.module, bug.put_in(text))
            killer = copy.failure(tests, copy.deadline(tests)) if tests else ""
            copy.write(bug.module, text)
            killed += bool(killer)
            alive = "SURVIVED  " if tests else "NO TESTS  "  # no file passes in time
            print(f"killed    {bug}\n          by {killer}" if killer else f"{alive}{bug}", flush=True)
    part = killed / len(found) if found else 1.0
    print(f"\n{killed} of {len(found)} killed, {part:.0%}; {LEAST_KILLED:.0%} are wanted")
    return 0 if part >= LEAST_KILLED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
