"""The index of faults: each row says what happens and names the tests that prove it, or why it cannot be."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parent.parent.parent
INDEX = Path(__file__).parent / "index"
# Input, manifests, origins, trust, disks, kill points, clocks, crowds, evictions, Kubernetes: 145 rows.
ROWS = {"A": 17, "B": 14, "C": 25, "D": 11, "E": 17, "F": 17, "G": 5, "H": 11, "I": 10, "J": 18}


@cache
def named_in(file: Path) -> frozenset[str]:
    """The names of a file's test functions, those in classes and state machines too."""
    return frozenset(
        node.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


def faults_of(row: dict[str, Any]) -> list[str]:
    """What is wrong with one row of the index."""
    if not row.get("fault"):
        return ["says no fault"]
    if "reason" in row:
        return [] if row["reason"] and "tests" not in row else ["has a reason and tests, or an empty reason"]
    if not row.get("answer") or not row.get("tests"):
        return ["names no answer or no test"]
    return [
        f"names {named}, which is not there"
        for named in row["tests"]
        for file, _, test in [named.partition("::")]
        if not (PROJECT / file).is_file() or test not in named_in(PROJECT / file)
    ]


@pytest.mark.parametrize("letter", ROWS)
def test_each_row_names_tests_that_are_there(letter: str) -> None:
    index = tomllib.loads((INDEX / f"{letter}.toml").read_text())
    assert set(index) == {f"{letter}{n}" for n in range(1, ROWS[letter] + 1)}
    wrong = {row: faults for row, said in index.items() if (faults := faults_of(said))}
    assert not wrong


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "a", "tests": ["tests/faults/test_index.py::test_each_row_names_tests_that_are_there"]},
        {"fault": "f", "answer": "a", "tests": []},
        {"fault": "f", "answer": "a", "tests": ["tests/faults/test_index.py::test_not_here"]},
        {"fault": "f", "answer": "a", "tests": ["tests/faults/nowhere.py::test_x"]},
        {"fault": "f", "reason": ""},
    ],
)
def test_a_row_that_proves_nothing_is_refused(row: dict[str, Any]) -> None:
    assert faults_of(row)
