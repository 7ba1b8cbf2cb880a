"""Puts bugs into a copy of the code, one at a time, and counts those that the tests find: `make mutate`.

A bug is one small change at a place that a seed chooses: it negates a condition, leaves out a call, changes a
comparison, adds one to a number, returns None, False or True instead of the value, or takes no lock. The
tests that know the module best then run in the copy until one fails. `Related` ranks the files of tests by
what they import, by their names, and by how many names of the module they use that few other files use. What
a file knows of the importers of the module counts half. The tests of long.toml do not run.

A bug is killed by a test that fails or hangs with it, passes alone without it, and fails or hangs alone with
it. Several bugs are tried at once, each in a copy of its own. A bug may delete files that it should not, so
run this as root only on a machine that you can throw away.

The exit status is 0 if at least 95 % of the bugs are killed.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent
WHERE = ("store", "kernel", "sources", "transfer", "upkeep", "policy", "api", "config", "daemon")
LEAST_KILLED = 0.95
ABOUT_PROJECT = re.compile(  # these tests read the project's files; a bug does not concern them
    r"test_(bench|chart|contributing|daemonset|demo|examples|ground|ground_parts|index|install)\.py$"
    r"|test_(layers|lock|mutate|readme|runs|security|words)\.py$"
)
MAX_FILES = 25  # of tests, considered for a module
AT_ONCE = 5  # files that one pytest reads
ALONE_SECONDS = 120.0  # for one test without a bug
GRACE_SECONDS = 30.0  # a test that hangs runs so much longer than three times its time without the bug
NOT_READ, NO_TESTS = "", 5  # NO_TESTS is one of pytest's statuses
PLUGIN = PROJECT / "tests/ground/began.py"
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

    tree = ast.parse(text)
    tuned = {id(each) for node in tree.body if _is_constant(node) for each in ast.walk(node)}
    for node in _walked(tree):
        match node:
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                if not (isinstance(test, ast.Constant) or source(test) == "TYPE_CHECKING"):
                    yield bug(test, "condition negated", f"(not ({source(test)}))")
            case ast.Expr(value=ast.Call() as call) if not SAYS_ONLY.match(source(call)):
                yield bug(node, "call left out", "pass")
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                turned = f"({source(left)} {TURNED[type(op)]} {source(right)})"
                yield bug(node, "comparison turned", turned)
            case ast.Constant(value=int(number)) if not (isinstance(number, bool) or id(node) in tuned):
                yield bug(node, "one larger", str(number + 1))
            case ast.Return(value=ast.expr() as value):
                for answer in ("None", "False", "True"):
                    if source(value) != answer and {source(value), answer} != {"None", "False"}:
                        yield bug(value, "another answer", answer)
            case ast.With(items=items):
                for expression in (item.context_expr for item in items):
                    if source(expression).removeprefix("self.") in locks:
                        yield bug(expression, "no lock", NO_LOCK)


def _is_constant(node: ast.stmt) -> bool:
    """Whether it sets an UPPER_CASE name, such as a bound: no test should pin its very value."""
    return isinstance(node, ast.Assign) and all(
        isinstance(name, ast.Name) and name.id.isupper()
        for target in node.targets
        for name in (target.elts if isinstance(target, ast.Tuple) else [target])
    )


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
        self._code = _trees(root, "cachd/**/*.py")
        self._defined = {module: _defined(tree) for module, tree in self._code.items()}
        self._modules = Counter(name for names in self._defined.values() for name in names)
        self._imports = {module: _imported(tree) for module, tree in self._code.items()}
        every = _trees(root, "tests/**/*.py")
        suites = {_dotted(file): tree for file, tree in every.items() if "/contract_" in file}
        tests = {
            test: tree
            for test, tree in every.items()
            if Path(test).name.startswith("test_") and not ABOUT_PROJECT.search(test)
        }
        self._names = {test: _used(tree) for test, tree in tests.items()}
        self._tested = {test: _imported(tree) for test, tree in tests.items()}
        for test, imported in self._tested.items():
            for suite in imported & suites.keys():  # it runs the tests of the suite
                self._names[test] |= _used(suites[suite])
                self._tested[test] |= _imported(suites[suite])
        self._ranked: dict[str, list[str]] = {}
        self._in = Counter(name for names in self._names.values() for name in names)

    def to(self, module: str) -> list[str]:
        if module not in self._ranked:
            self._ranked[module] = self._rank(module)
        return self._ranked[module]

    def _rank(self, module: str) -> list[str]:
        dotted = _dotted(module)
        importers = [other for other, imported in self._imports.items() if dotted in imported]

        def score(test: str) -> float:
            above = max((self._score(other, test) for other in importers), default=0.0)
            return self._score(module, test) + above / 2

        scores = {test: score(test) for test in self._names}
        ranked = sorted(scores, key=lambda test: (-scores[test], test))
        return [test for test in ranked if scores[test] > 0][:MAX_FILES]

    def _score(self, module: str, test: str) -> float:
        stem = Path(module).stem
        named = re.compile(rf"test_(\w+_)?{stem.rstrip('s')}s?(_\w+)?\.py$")
        own = {stem, *self._defined[module]} & self._names[test]
        known = sum(1 / self._in[name] / max(1, self._modules[name]) for name in own)
        return known + 3 * (_dotted(module) in self._tested[test]) + 3 * bool(named.search(test))


def _trees(root: Path, pattern: str) -> dict[str, ast.Module]:
    return {str(path.relative_to(root)): ast.parse(path.read_text()) for path in sorted(root.glob(pattern))}


def _dotted(module: str) -> str:
    return ".".join(Path(module).with_suffix("").parts).removesuffix(".__init__")


def _imported(tree: ast.Module) -> set[str]:
    """The modules that a module imports, and what it imports of them, with dots."""
    names = [n for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names]
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    each = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return {alias.name for alias in names} | {str(node.module) for node in froms} | each


def _defined(tree: ast.Module) -> set[str]:
    """The names of the classes, functions and methods of a module."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name.strip("_") for node in ast.walk(tree) if isinstance(node, kinds)}


def _used(tree: ast.Module) -> set[str]:
    """The variables, attributes, options and strings that a file of tests uses, without its comments."""
    words = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.keyword(arg=str(name)):
                words.add(name.strip("_"))
            case ast.alias(name=name):
                words.add(name.rpartition(".")[2].strip("_"))
            case ast.Constant(value=str(text)) if " " not in text:
                words |= set(re.findall(r"\w{4,}", text))
    return words


class Copy:
    """A copy of the project, in which the tests run, within a directory of its own."""

    def __init__(self, project: Path, place: Path) -> None:
        self.root = place / "project"
        shutil.copytree(project, self.root, ignore=NOT_COPIED, symlinks=True)
        self._place, self._began = place, place / "began"
        shutil.copy(PLUGIN, place)
        self._stamps = itertools.count(int(time.time()) - 10**8)

    @contextmanager
    def having(self, bug: Bug) -> Iterator[None]:
        """Inside, the copy has the bug."""
        text = (self.root / bug.module).read_bytes()
        self._write(bug.module, bug.put_in(text))
        try:
            yield
        finally:
            self._write(bug.module, text)

    def failure(self, tests: Sequence[str], seconds: float, *options: str) -> str | None:
        """The first test that fails, or that still runs after so many seconds; None if all pass.

        It is NOT_READ if pytest did not begin with any test.
        """
        self._began.write_text(NOT_READ)
        place = f"--basetemp={self._place}/pytest"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not alone", "-p", PLUGIN.stem, place]
        env = {**os.environ, "PYTHONPATH": f"{self.root}:{self._place}", "BEGAN": str(self._began)}
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        pytest = [*command, *options, *tests]
        running = subprocess.Popen(pytest, cwd=self.root, env=env, start_new_session=True, **quiet)
        try:
            passed = running.wait(seconds) in (0, NO_TESTS)
        except subprocess.TimeoutExpired:
            passed = False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)  # its own group: all that it started, and nothing else
            running.wait()
            self._unmount()
        return None if passed else self._began.read_text()

    def killer(self, bug: Bug, tests: Sequence[str], seconds: float) -> str | None:
        """The test that kills a bug, of those that run in this time; None if none does."""
        until, spared = time.monotonic() + seconds, long_tests(self.root)
        for some in (tests[at : at + AT_ONCE] for at in range(0, len(tests), AT_ONCE)):
            while (left := until - time.monotonic()) > 0:
                with self.having(bug):
                    suspect = self.failure(some, left, *(f"--deselect={test}" for test in spared))
                if suspect is None:
                    break
                if self._is_proved(bug, suspect, some, grace_seconds=min(GRACE_SECONDS, seconds)):
                    return suspect if suspect != NOT_READ else f"{some[0]} and others cannot be read"
                if suspect == NOT_READ:
                    break
                spared.append(suspect)
        return None

    def _is_proved(self, bug: Bug, suspect: str, tests: Sequence[str], *, grace_seconds: float) -> bool:
        """Whether a test passes alone without the bug, and not with it."""
        alone = [*tests, "--collect-only"] if suspect == NOT_READ else [suspect]
        began = time.monotonic()
        if self.failure(alone, ALONE_SECONDS) is not None:
            return False
        deadline = grace_seconds + 3 * (time.monotonic() - began)
        with self.having(bug):
            return self.failure(alone, deadline) is not None

    def _unmount(self) -> None:
        """Unmount what killed tests have left mounted."""
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in mounts:
            if mount.startswith(f"{self._place}/"):
                subprocess.run(["umount", "--lazy", mount], stderr=subprocess.DEVNULL, check=False)

    def _write(self, module: str, content: bytes) -> None:
        """Each write sets another modification time, so that Python uses no bytecode of an earlier one."""
        path, stamp = self.root / module, next(self._stamps)
        path.write_bytes(content)
        os.utime(path, (stamp, stamp))


def long_tests(root: Path) -> list[str]:
    """The tests that a bug has no time for."""
    file = root / "tests/long.toml"
    return list(tomllib.loads(file.read_text())) if file.exists() else []


def verdicts(
    project: Path, found: Sequence[Bug], seconds: float, jobs: int
) -> Iterator[tuple[Bug, str | None]]:
    """Each bug and what killed it, as they end; the killer is empty if no file of tests knows the module."""
    related, copies = Related(project), queue.SimpleQueue[Copy]()

    def verdict(bug: Bug) -> tuple[Bug, str | None]:
        copy, tests = copies.get(), related.to(bug.module)
        try:
            return bug, copy.killer(bug, tests, seconds) if tests else ""
        finally:
            copies.put(copy)

    with (
        tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as place,
        ThreadPoolExecutor(jobs) as threads,
    ):
        for number in range(jobs):
            copies.put(Copy(project, Path(place, str(number))))
        for done in as_completed([threads.submit(verdict, bug) for bug in found]):
            yield done.result()


def main(arguments: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.mutate", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 30), help="repeats an earlier run (default: random)"
    )
    parser.add_argument("--count", type=int, default=100, help="how many bugs (default: %(default)s)")
    parser.add_argument("--only", default="", help="part of a module's path, such as store/space")
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="time of the tests for each bug (default: %(default)s)"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=2 * cores, help="bugs at once (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the bugs and their tests, and run nothing")
    parser.add_argument("--root", type=Path, default=PROJECT, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    found = chosen(asked.root, asked.seed, asked.count, asked.only)
    print(f"{len(found)} bugs, --seed {asked.seed}", flush=True)
    if asked.list:
        related = Related(asked.root)
        print(*(f"{bug}\n    {' '.join(related.to(bug.module)[:6])}" for bug in found), sep="\n")
        return 0
    killed = 0
    for bug, killer in verdicts(asked.root, found, asked.seconds, asked.jobs):
        killed += bool(killer)
        alive = "NO TESTS  " if killer == "" else "SURVIVED  "
        print(f"killed    {bug}\n          by {killer}" if killer else f"{alive}{bug}", flush=True)
    part = killed / len(found) if found else 1.0
    print(f"\n{killed} of {len(found)} killed, {part:.0%}; {LEAST_KILLED:.0%} are wanted")
    return 0 if part >= LEAST_KILLED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
