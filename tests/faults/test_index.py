"""The index of faults: each row says what happens and names the tests that prove it, or why it cannot be."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parent.parent.parent
LETTERS = sorted((Path(__file__).parent / "index").glob("*.toml"))


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


@pytest.mark.parametrize("letter", LETTERS, ids=lambda path: path.stem)
def test_each_row_names_tests_that_are_there(letter: Path) -> None:
    index = tomllib.loads(letter.read_text())
    assert set(index) == {f"{letter.stem}{n}" for n in range(1, len(index) + 1)}, "a gap in the numbers"
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
