"""The runner that puts bugs into the code: what it changes, which tests it runs, and what it prints."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.mutate import PROJECT, WHERE, Related, bugs, chosen, locks, main

MODULE = '''"""It."""

import threading


class Box:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.held = 0

    def take(self, count: int) -> bool:
        """Take so many."""
        with self._lock:
            if count > 3:
                return False
            self.put(count)
        return True

    def put(self, count: int) -> None:
        self.held += count


def never_tested(much: int) -> int:
    return much + 7
'''
SHORT = """
class Box:
    held = None

    def put(self, count):
        self.held = count

    def take(self, count):
        self.put(count)


def never_seen():
    print()


def never_run():
    print(1)
"""
TEST = """
from cachd.store.it import Box, never_seen


def test_a_box_takes_three():
    box = Box()
    box.take(3)
    assert box.held == 3


def test_a_call_proves_nothing():
    never_seen()
"""
FILLED = """
class Box:
    held = None

    def put(self):
        self.held = True
    def fill(self):
        while not self.held: self.put()
"""
FILLS = """
from cachd.store.it import Box


def test_a_box_is_filled():
    box = Box()
    box.fill()
    assert box.held is True
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of one module and one test."""
    for file, text in {
        "cachd/__init__.py": "",
        "cachd/store/__init__.py": "",
        "cachd/store/it.py": MODULE,
        "tests/test_it.py": TEST,
        "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["alone"]\n',
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def test_each_kind_of_bug_is_made_where_it_can_be() -> None:
    found = list(bugs("it.py", MODULE, locks(MODULE)))
    assert [(b.line, b.kind, b.was, b.becomes) for b in found if b.line in (13, 14, 16, 24)] == [
        (13, "no lock", "self._lock", '__import__("contextlib").nullcontext()'),
        (14, "condition negated", "count > 3", "(not (count > 3))"),
        (14, "comparison turned", "count > 3", "(count >= 3)"),
        (14, "one larger", "3", "4"),
        (16, "call left out", "self.put(count)", "pass"),
        (24, "another answer", "much + 7", "None"),
        (24, "another answer", "much + 7", "False"),
        (24, "another answer", "much + 7", "True"),
        (24, "one larger", "7", "8"),
    ]


def test_the_locks_of_the_code_are_found_whatever_their_names() -> None:
    every = chosen(PROJECT, seed=1, count=1 << 20, only="")
    without = {(bug.module, bug.was) for bug in every if bug.kind == "no lock"}
    assert without >= {
        ("cachd/store/content/owners.py", "self._writing"),
        ("cachd/upkeep/jobs.py", "self._lock"),
        ("cachd/upkeep/verifications.py", "self._lock"),  # which it inherits
        ("cachd/transfer/streams.py", "self._lock"),
        ("cachd/kernel/threads.py", "_counting"),
    }


def test_a_module_with_a_bug_is_python_still_and_differs_in_that_place_alone() -> None:
    for bug in chosen(PROJECT, seed=1, count=40, only=""):
        text = (PROJECT / bug.module).read_bytes()
        with_bug = bug.put_in(text)
        assert ast.dump(ast.parse(with_bug)) != ast.dump(ast.parse(text)), bug
        rest = len(text) - bug.stop
        assert with_bug[: bug.start] == text[: bug.start]
        assert with_bug[len(with_bug) - rest :] == text[bug.stop :]


def test_bugs_are_chosen_by_the_seed_from_every_package() -> None:
    one, again, other = (chosen(PROJECT, seed, 500, "") for seed in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) == 500
    packages = Counter(Path(bug.module).parts[1] for bug in one)
    assert set(packages) == set(WHERE)
    assert {bug.module for bug in chosen(PROJECT, 1, 50, "store/space")} == {"cachd/store/space.py"}


def test_the_tests_of_a_module_are_those_that_know_it_best() -> None:
    related = Related(PROJECT)
    for module, test in {
        "cachd/store/space.py": "tests/test_space.py",
        "cachd/api/access.py": "tests/test_roles.py",
        "cachd/settings/tokens.py": "tests/test_tokens.py",
        "cachd/transfer/slots.py": "tests/attacks/test_waits.py",
    }.items():
        assert test in related.to(module)[:5], module


def test_what_the_tests_see_is_killed_and_what_they_do_not_survives(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "cachd/store/it.py").write_text(SHORT)
    assert main(["--root", str(tree), "--seed", "1", "--count", "9"]) == 1
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "4 bugs, --seed 1"
    assert (
        "killed    cachd/store/it.py:9: call left out: self.put(count) -> pass\n"
        "          by tests/test_it.py::test_a_box_takes_three\n"
    ) in told
    assert "SURVIVED  cachd/store/it.py:13: call left out: print() -> pass\n" in told
    assert "SURVIVED  cachd/store/it.py:17: one larger: 1 -> 2\n" in told
    assert told.endswith("1 of 4 killed, 25%; 95% are wanted\n")
    assert (tree / "cachd/store/it.py").read_text() == SHORT, "the tree itself stays as it is"


def test_a_run_whose_bugs_all_die_succeeds(tree: Path) -> None:
    (tree / "cachd/store/it.py").write_text(
        SHORT.replace("    print()", "    ...").replace("    print(1)", "    ...")
    )
    assert main(["--root", str(tree), "--seed", "2"]) == 0


def test_tests_that_fail_without_a_bug_kill_none(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "cachd/store/it.py").write_text(SHORT)
    (tree / "tests/test_it.py").write_text(TEST.replace("== 3", "== 4"))
    assert main(["--root", str(tree), "--seed", "1"]) == 1
    told = capsys.readouterr().out
    assert "0 of 4 killed" in told
    assert told.count("SURVIVED  cachd/store/it.py") == 4


def test_a_bug_with_which_a_test_hangs_is_killed(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "cachd/store/it.py").write_text(FILLED)
    (tree / "tests/test_it.py").write_text(FILLS)
    assert main(["--root", str(tree), "--seed", "1", "--seconds", "15"]) == 0
    assert (
        "killed    cachd/store/it.py:8: call left out: self.put() -> pass\n"
        "          by tests/test_it.py::test_a_box_is_filled\n"
    ) in capsys.readouterr().out


def test_a_bug_with_which_the_tests_cannot_be_read_is_killed(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "cachd/store/it.py").write_text("def made():\n    return int\n\n\nmade()()\n")
    (tree / "tests/test_it.py").write_text("import cachd.store.it\n\ndef test_it(): ...\n")
    assert main(["--root", str(tree), "--seed", "1", "--count", "9"]) == 1
    told = capsys.readouterr().out
    assert (
        "killed    cachd/store/it.py:2: another answer: int -> None\n"
        "          by tests/test_it.py and others cannot be read\n"
    ) in told
    assert "SURVIVED  cachd/store/it.py:5: call left out: made()() -> pass\n" in told


def test_a_module_that_no_test_knows_has_no_tests(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "cachd/store/it.py").write_text("def lonely(): return zyx")
    (tree / "tests/test_it.py").rename(tree / "tests/test_other.py").write_text("def test_nothing(): ...")
    assert main(["--root", str(tree), "--seed", "1"]) == 1
    assert capsys.readouterr().out.count("NO TESTS  cachd/store/it.py:1") == 3
