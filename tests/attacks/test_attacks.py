"""Every attack in its short form, against one daemon that serves all the while."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.attacks.__main__ import INDEX
from tests.attacks.target import ATTACKS, Target, besieged


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    place = tmp_path_factory.mktemp("attacked")
    program = [sys.executable, "-m", "cachd"]
    with besieged(place, program, short=True, judges_time=False) as started:
        yield started


def test_every_row_of_the_index_has_an_attack() -> None:
    assert {*ATTACKS} == {*INDEX}


@pytest.mark.parametrize("row", INDEX)
def test_the_daemon_serves_on_and_nothing_is_lost(target: Target, row: str) -> None:
    verdict = target.tried(row)
    assert verdict.held, verdict.failure
