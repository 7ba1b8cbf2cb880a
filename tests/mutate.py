"""Bugs put into the code one at a time, to see which of them the tests let live: `make mutate`.

A bug is one small change at a place that a seed chooses: a condition negated, a call left out, a comparison
turned, a number one larger, an answer None, False or True, a lock not taken. It is made in a copy of the
project, and the tests that know the module best run there until one fails. Which those are is told by what
they import, by their names, and by how many of the module's own words they use that few other tests do.

Each file of tests runs once without a bug first: one that fails then is left out, and its time sets the
deadline. A run that passes the deadline has killed the bug, too: it hangs. As root, run it on a machine that
may be spoiled: a bug may remove what it should not.

The exit status is 0 if at least 95 of 100 bugs died.
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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent
WHERE = ("store", "sources", "transfer", "policy", "api")
MODULES = ("config.py", "daemon.py")
LEAST_KILLED = 0.95
MOST_FILES = 10  # of tests that are considered for a module
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", ".cache", ".demo", "__pycache__", "results")
_TURNS = (("Lt", "<="), ("LtE", "<"), ("Gt", ">="), ("GtE", ">"), ("Eq", "!="), ("NotEq", "=="))
TURNED = dict((*_TURNS, ("In", "not in"), ("NotIn", "in"), ("Is", "is not"), ("IsNot", "is")))
LOCK = re.compile(r"self\.(_lock|_\w*lock|_chang\w+|_owning|_evicting|_remembering)")
NO_LOCK = '__import__("contextlib").nullcontext()'
SAYS_ONLY = re.compile(r"(log|logger|warnings)\.|super\(\)\.__init__")  # no test is owed for a call of these
WORD = re.compile(r"[A-Za-z_]{4,}")


@dataclass(frozen=True, slots=True)
class Bug:
    """What stands between two offsets of a module, replaced."""

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


def bugs(module: str, text: str) -> Iterator[Bug]:
    """Every bug of a module, in the order of its lines."""
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
                yield bug(
                    node, "comparison turned", f"({source(left)} {TURNED[type(op).__name__]} {source(right)})"
                )
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                yield bug(node, "one larger", str(number + 1))
            case ast.Return(value=ast.expr() as value):
                for answer in ("None", "False", "True"):
                    if source(value) != answer:
                        yield bug(value, "another answer", answer)
            case ast.With(items=items):
                for item in items:
                    if LOCK.fullmatch(source(item.context_expr)):
                        yield bug(item.context_expr, "no lock", NO_LOCK)


def _walked(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node but those of annotations, of f-strings and of patterns, which no text edit fits."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.JoinedStr | ast.match_case | ast.arg):
            continue
        yield node
        kept = [c for c in ast.iter_child_nodes(node) if c is not getattr(node, "annotation", None)]
        waiting += reversed([c for c in kept if c is not getattr(node, "returns", None)])


def chosen(root: Path, seed: int, count: int, only: str) -> list[Bug]:
    """So many bugs, each kind as likely as it is frequent; the same for the same seed and code."""
    code = root / "cachd"
    paths = [path for part in WHERE for path in sorted((code / part).glob("*.py"))]
    paths += [code / name for name in MODULES if (code / name).exists()]
    found = [b for path in paths for b in bugs(str(path.relative_to(root)), path.read_text())]
    found = [b for b in found if only in b.module]
    return random.Random(seed).sample(found, min(count, len(found)))


class Related:
    """The files of tests that know a module, the best first."""

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
        return [test for test in ranked if score(test) > 0][:MOST_FILES]


@dataclass
class Copy:
    """A copy of the project, in which tests run."""

    root: Path
    _stamps: Iterator[int] = field(default_factory=lambda: itertools.count(int(time.time()) - 10**8))
    _seconds: dict[str, float] = field(default_factory=dict)

    def write(self, module: str, content: bytes) -> None:
        """Each state of a module has a time of its own: bytecode of another is never taken for it."""
        path, stamp = self.root / module, next(self._stamps)
        path.write_bytes(content)
        os.utime(path, (stamp, stamp))

    def fit(self, tests: Sequence[str], seconds: float) -> list[str]:
        """The first of these files that pass, and that take so many seconds together."""
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
        """The first test that fails, or that it hangs; empty when all pass, or none was there to run."""
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
                os.killpg(running.pid, signal.SIGKILL)  # its own group: what it started, and no more
            running.wait()
        if running.returncode in (0, 5):
            return ""
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
        return found[1] if found else f"pytest's status {running.returncode}"


def main(arguments: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.mutate", description=__doc__, formatter_class=raw)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="of an earlier run")
    parser.add_argument("--count", type=int, default=100, help="bugs (default: %(default)s)")
    parser.add_argument("--only", default="", help="part of a module's path, such as store/space")
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for each bug (%(default)s)")
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
            alive = "SURVIVED  " if tests else "NO TESTS  "  # none that passes in time
            print(f"killed    {bug}\n          by {killer}" if killer else f"{alive}{bug}", flush=True)
    part = killed / len(found) if found else 1.0
    print(f"\n{killed} of {len(found)} killed, {part:.0%}; {LEAST_KILLED:.0%} are wanted")
    return 0 if part >= LEAST_KILLED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
