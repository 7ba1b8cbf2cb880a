"""SECURITY.md: what it says is in the index of attacks, and every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

from cachd import __version__
from docs.render import ATTACKERS, README, SECURITY, rendered
from tests.attacks.test_index import INDEX
from tests.faults.test_index import PROJECT, named_in

PAGE = SECURITY.read_text()


def test_the_attacks_of_the_page_are_those_of_the_index() -> None:
    assert rendered(PAGE) == PAGE, "run: make docs"
    assert set(ATTACKERS) == {row["attacker"] for row in INDEX.values()}
    for row in INDEX.values():
        assert f"| {row['attack']} | {row['holds']} |" in PAGE


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) == sum(len(row["tests"]) for row in INDEX.values())
    for module, test in named:
        assert test in named_in(PROJECT / "tests" / module), test


def test_the_page_is_found_and_names_the_version_that_is_supported_but_no_person() -> None:
    assert "(SECURITY.md)" in README.read_text()
    assert f"| the latest {__version__.rpartition('.')[0]} | yes |" in PAGE
    assert "@" not in PAGE.replace("name@revision", "")
    for linked in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (PROJECT / Path(linked)).exists(), linked
