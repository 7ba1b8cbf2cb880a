"""Every odd origin: the right model is ready, or the pull is refused with the right code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from docs.render import ORIGINS, rendered
from tests.faults.test_index import PROJECT, named_in
from tests.wild.field import INDEX, KINDS, READY, ROWS, WILD, Field, among
from tests.wild.modules import MODULES


@pytest.fixture(scope="module")
def field(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    place, rows = tmp_path_factory.mktemp(request.param), INDEX[request.param]
    with among(place, rows, short=True, s3=lambda: request.getfixturevalue("s3")) as started:
        yield started


@pytest.mark.parametrize(
    ("field", "row"), [(kind, row) for kind in KINDS for row in INDEX[kind]], indirect=["field"]
)
def test_the_right_model_is_ready_or_the_pull_is_refused_with_the_right_code(field: Field, row: str) -> None:
    verdict = field.tried(row)
    assert verdict.is_right, verdict.failure


def test_the_command_that_the_page_names_knows_every_row() -> None:
    code = "import tests.wild.__main__; from tests.wild.field import ROWS, WILD; assert {*WILD} == {*ROWS}"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=120, check=True)


def test_every_row_has_an_origin_in_the_module_of_its_kind() -> None:
    assert {*WILD} == {*ROWS}
    assert len(ROWS) == sum(map(len, INDEX.values())), "a row is in two files"
    for kind, rows in INDEX.items():
        assert {WILD[row].__module__ for row in rows} <= {module.__name__ for module in MODULES[kind]}


def test_the_command_line_lists_every_row_that_has_an_origin() -> None:
    ended = on_the_command_line("--list")
    assert ended.returncode == 0, ended.stderr
    assert [line.split(":")[0] for line in ended.stdout.splitlines()] == [*ROWS]


def test_the_command_line_pulls_from_the_origins_that_it_is_given() -> None:
    ended = on_the_command_line("--short", "head-says-empty")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "head-says-empty" in ended.stdout
    assert "1 of 1 as they should be: 1 ready, 0 refused;" in ended.stdout


def on_the_command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m tests.wild`, which imports what these tests have imported already."""
    command = [sys.executable, "-m", "tests.wild", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_says_who_does_what_and_what_cachd_does(row: str) -> None:
    said = ROWS[row]
    assert said.keys() <= {"server", "oddity", "answer", "outcome", "tests", "deadline"}
    assert said["server"]
    assert said["oddity"]
    assert said["answer"]
    assert said["outcome"] == READY or said["outcome"].isidentifier()
    for named in said.get("tests", []):
        file, _, test = named.partition("::")
        assert test in named_in(PROJECT / file), named


def test_the_page_of_origins_has_every_row() -> None:
    page = ORIGINS.read_text()
    assert rendered(page) == page, "run: make docs"
    for said in ROWS.values():
        assert f"| {said['server']} | {said['oddity']} | {said['answer']} |" in page
