"""A run of the tests on any machine: what lacks is named with what brings it, and long tests are known."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.__main__ import Run, files_with_alone
from tests.ground import report
from tests.ground.needs import NEEDS, lack_of, refuse, require
from tests.ground.report import FAILED, LONG_TESTS, SKIPPED, Outcome, Tally, ending

PROJECT = Path(__file__).parent.parent
FROM_PYPI = {"nginx-light"}  # the Python environment has one of its own


def skipped(name: str, reason: str) -> Outcome:
    """As pytest tells of a test that `refuse` skipped."""
    with pytest.raises(pytest.skip.Exception) as told:
        refuse(name, reason)
    return Outcome(SKIPPED, f"Skipped: {told.value.msg}")


def test_a_run_ends_with_a_line_for_each_thing_that_lacks_and_one_command_that_brings_all() -> None:
    lacking = {"t1": ("strace", "strace is not installed"), "t2": ("fuse", "libfuse3 is not installed")}
    tally: Tally = {test: skipped(*lack) for test, lack in lacking.items()}
    tally |= {"t3": skipped(*lacking["t1"]), "t4": skipped("root", "not root"), "t5": Outcome(FAILED)}
    *lines, last = ending(tally)
    assert [re.findall(r"\d+|strace \(|fuse \(|root \(", line)[:2] for line in lines] == [
        ["1", "fuse ("],
        ["1", "root ("],
        ["2", "strace ("],
    ]
    assert last.endswith("apt-get install fuse3 strace")


def test_what_no_package_brings_names_none() -> None:
    [line] = ending({"t": skipped("fuse", "/dev/fuse may not be opened")})
    assert "apt-get" not in line
    assert list(ending({"t": Outcome()})) == []


def test_a_test_skipped_for_another_reason_is_counted_by_it() -> None:
    assert lack_of("Skipped: on one core") is None
    assert list(ending({"t": Outcome(SKIPPED, "Skipped: on one core")})) == ["skipped   1: on one core"]


def test_a_test_that_takes_long_is_named_unless_it_is_listed() -> None:
    listed = next(iter(tomllib.loads(LONG_TESTS.read_text())))
    long = Outcome(seconds=31)
    assert list(ending({f"{listed}[one]": long, "quick": Outcome(seconds=29)})) == []
    [line] = ending({"tests/test_x.py::test_slow": long})
    assert "tests/test_x.py::test_slow" in line


def test_each_listed_test_is_there_with_a_reason() -> None:
    for name, reason in tomllib.loads(LONG_TESTS.read_text()).items():
        module, test = name.split("::")
        assert f"def {test}(" in (PROJECT / module).read_text()
        assert reason


def test_a_namespace_is_tried_for_the_tests_that_may_run_there_and_for_no_other(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.tally = {
        "mounts": skipped("mount", "only root"),
        "rules": skipped("root", "not root"),
        "forgets": skipped("fuse", "libfuse3 is not installed"),
        "other": Outcome(SKIPPED, "Skipped: on one core"),
        "fails": Outcome(FAILED),
    }
    assert run.wanting_to_mount() == ["mounts"]


def test_a_pytest_tells_what_became_of_each_test(tmp_path: Path) -> None:
    tally = tmp_path / "tally.json"
    asked = "tests/test_runs.py::test_what_no_package_brings_names_none"
    command = [sys.executable, "-m", "pytest", "-q", f"--tally={tally}", asked]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    assert [(name, outcome.word) for name, outcome in report.read(tally).items()] == [(asked, "passed")]


def test_a_need_that_the_table_does_not_know_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        require("nginks")


def test_what_the_table_names_is_installed_where_every_test_must_run() -> None:
    installed = set(re.findall(r"[\w.+-]+", (PROJECT / ".ci/run").read_text()))
    assert {need.debian for need in NEEDS.values() if need.debian} - FROM_PYPI <= installed


def test_no_other_module_decides_what_a_machine_lacks() -> None:
    by_itself = re.compile(r"(geteuid|which)\(.*\n?.*pytest\.skip\(|skipif\(\s*.*(geteuid|which|available)\(")
    for module in (PROJECT / "tests").rglob("test_*.py"):
        assert not by_itself.search(module.read_text()), f"{module}: see tests/ground/needs.py"


def test_the_run_of_those_alone_reads_only_files_that_have_some() -> None:
    found = files_with_alone(["-k", "probe"])
    assert str(PROJECT / "tests/test_bench.py") in found
    assert str(PROJECT / "tests/test_api.py") not in found
    assert files_with_alone(["tests/test_api.py::test_x"]) == []
