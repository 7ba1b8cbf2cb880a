"""When each blob was last verified, as the scrub log keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachd.model import Digest
from cachd.store.scrub_log import ScrubLog

ONE, TWO, NEW = (Digest("sha256", digit * 64) for digit in "123")
SAVE_SECONDS = 10.0


class Clock:
    """Stands still until a test sets it."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scrub_log.json"


def test_times_survive_a_restart_and_none_is_in_the_future(path: Path) -> None:
    now = Clock(100.0)
    log = ScrubLog(path, now=now)
    assert (log.times(), log.oldest([])) == ([], None)
    log.verified(ONE)
    now.now = 200.0
    log.verified(TWO)
    log.save()
    assert dict(ScrubLog(path, now=now).times()) == dict(log.times()) == {ONE: 100.0, TWO: 200.0}
    now.now = 150.0
    assert dict(ScrubLog(path, now=now).times()) == {ONE: 100.0, TWO: 150.0}, "the clock was set back"


def test_the_oldest_time_counts_unknown_blobs_since_the_given_time(path: Path) -> None:
    now = Clock(100.0)
    log = ScrubLog(path, now=now)
    log.verified(ONE)
    now.now = 200.0
    log.verified(TWO)
    assert log.oldest([ONE, TWO]) == 100.0
    assert log.oldest([TWO]) == 200.0
    assert log.oldest([TWO, NEW], since=50.0) == 50.0
    assert log.oldest([TWO, NEW], since=500.0) == 200.0
    assert log.oldest([NEW]) == 0.0


def test_new_blobs_count_as_verified_now_and_those_that_are_gone_are_forgotten(path: Path) -> None:
    now = Clock(100.0)
    log = ScrubLog(path, now=now)
    log.know([ONE, TWO])
    now.now = 200.0
    log.know([TWO, NEW])
    assert dict(log.times()) == {TWO: 100.0, NEW: 200.0}
    log.save()
    before = path.stat().st_ino
    log.know([TWO, NEW])
    log.save()
    assert path.stat().st_ino == before, "nothing has changed"
    log.forget(TWO)
    log.save()
    assert dict(ScrubLog(path, now=now).times()) == {NEW: 200.0}
    log.know([NEW, ONE])
    log.save()
    assert dict(ScrubLog(path, now=now).times()) == {NEW: 200.0, ONE: 200.0}
    log.know([])
    log.save()
    assert not path.exists(), "an empty log is no file"


def test_a_verification_saves_the_log_when_the_last_save_is_long_ago(path: Path) -> None:
    clock = Clock(1000.0)
    log = ScrubLog(path, now=Clock(100.0), clock=clock)
    clock.now += SAVE_SECONDS
    log.verified(ONE)
    assert not path.exists()
    clock.now += 0.1
    log.verified(TWO)
    assert len(json.loads(path.read_text())) == 2
    clock.now += SAVE_SECONDS
    log.verified(NEW)
    assert len(json.loads(path.read_text())) == 2
    log.save()
    assert len(json.loads(path.read_text())) == 3
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"sha256:zz": 1}', f'{{"{ONE}": "x"}}'])
def test_a_log_that_cannot_be_read_is_an_empty_one(path: Path, content: str) -> None:
    path.write_text(content)
    assert ScrubLog(path).times() == []


def test_a_log_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    log = ScrubLog(tmp_path / "absent/scrub_log.json", now=Clock(100.0))
    log.verified(ONE)
    log.save()
    assert log.times() == [(ONE, 100.0)]
