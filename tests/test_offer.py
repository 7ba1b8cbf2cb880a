"""An offer without an ingest, and the records of offers: each rule of the two alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachd.errors import DiskFailed
from cachd.model import Extent
from cachd.store.ingest import HELD_BYTES, Offer
from cachd.store.ingest.offer import end_attempt
from cachd.store.ingest.records import Records

PART = 4 << 20


class Alone:
    """An offer of a blob of `size` bytes without an ingest, at a time that the test sets."""

    def __init__(self, directory: Path, size: int = 5 * PART) -> None:
        self.now = 0.0
        self.directory, self.record = directory / "ingest", directory / "streamed" / "blob"
        for made in (self.directory, self.record.parent):
            made.mkdir()
        self.offer = Offer(size, self.directory, self.record, clock=lambda: self.now)

    def noted(self) -> tuple[str | None, str | None]:
        """The content of the record and of the file `attempt`."""
        paths = (self.record, self.directory / "attempt")
        record, attempt = (path.read_text() if path.exists() else None for path in paths)
        return record, attempt


@pytest.fixture
def alone(tmp_path: Path) -> Alone:
    return Alone(tmp_path)


def test_a_reader_gets_the_bytes_before_the_next_gap_or_before_the_held_end(alone: Alone) -> None:
    offer = alone.offer
    offer.open([Extent(0, PART), Extent(2 * PART, 3 * PART)], is_complete=True)
    assert offer.claim() == 1
    reached = {0: PART, PART - 1: PART, PART: PART, PART + 1: PART + 1, 2 * PART: 3 * PART}
    assert {offset: offer.until(1, offset) for offset in reached} == reached
    offer.add([Extent(PART, 2 * PART), Extent(3 * PART, 5 * PART)])
    held = 5 * PART - HELD_BYTES
    assert [offer.until(1, offset) for offset in (0, held, held + 1)] == [held, held, held + 1]
    assert offer.until(2, 0) is None
    offer.close()
    assert [offer.until(attempt, 3) for attempt in (1, 2)] == [3, 3]
    offer.open([], is_complete=True)
    assert (offer.until(1, 3), offer.claim()) == (3, None), "an offer that is closed forgets its parts"


@pytest.mark.parametrize(
    ("start", "stop", "is_wanted"),
    [(10, 20, True), (11, 20, False), (0, 10, False), (0, 11, True), (20, 30, False)],
)
def test_bytes_are_synced_soon_if_the_reader_that_asked_last_waits_for_them(
    alone: Alone, start: int, stop: int, *, is_wanted: bool
) -> None:
    assert not alone.offer.wants_sync(Extent(0, 100)), "nobody has asked"
    alone.offer.follow(50)
    alone.offer.follow(10)
    assert alone.offer.wants_sync(Extent(start, stop)) is is_wanted


def test_bytes_are_synced_four_times_a_second_and_for_a_minute_after_a_reader_asked(alone: Alone) -> None:
    part = Extent(0, 100)
    alone.offer.follow(10)
    wanted = []
    for now in (0.0, 0.125, 0.25, 0.375, 0.5, 60.0, 60.5):
        alone.now = now
        wanted.append(alone.offer.wants_sync(part))
    assert wanted == [True, False, True, False, True, True, False]
    alone.offer.follow(10)
    assert alone.offer.wants_sync(part)


def test_each_change_is_counted_and_wakes_who_waits(alone: Alone) -> None:
    offer = alone.offer
    assert [offer.wait(0, 0.0), offer.wait(7, 60.0)] == [0, 0]
    steps: tuple[Callable[[], object], ...] = (
        lambda: offer.open([], is_complete=True),
        lambda: offer.add([]),
        offer.tell,
        offer.withdraw,
        offer.close,
    )
    for count, step in enumerate(steps, start=1):
        with ThreadPoolExecutor(1) as reader:
            waits = reader.submit(offer.wait, count - 1, 60.0)
            step()
            assert waits.result() == count


def test_a_claim_is_written_once_for_the_reader_and_for_the_ingest(alone: Alone) -> None:
    offer = alone.offer
    assert offer.claim() is None
    offer.open([Extent(0, PART)], is_complete=True)
    assert (alone.noted(), offer.next_attempt) == ((None, None), 1)
    assert (offer.claim(), alone.noted()) == (1, ("1", "1"))
    for path in (alone.record, alone.directory / "attempt"):
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o400)
    assert offer.claim() == 1
    assert alone.record.stat().st_mode & 0o777 == 0o400, "it was not written again"
    alone.record.write_text("3")
    assert (offer.next_attempt, offer.claim(), alone.noted()) == (4, 4, ("4", "4"))
    alone.record.unlink()
    assert (offer.next_attempt, offer.claim(), alone.noted()) == (4, 4, ("4", "4"))


@pytest.mark.parametrize(("is_complete", "attempt"), [(True, 1), (False, 2)])
def test_an_offer_that_lost_bytes_begins_another_attempt(
    alone: Alone, attempt: int, *, is_complete: bool
) -> None:
    for path in (alone.record, alone.directory / "attempt"):
        path.write_text("1")
    alone.offer.open([Extent(0, PART)], is_complete=is_complete)
    assert (alone.directory / "attempt").exists() is is_complete
    assert alone.offer.until(1, 0) == (PART if is_complete else None)
    assert (alone.offer.claim(), alone.noted()) == (attempt, (str(attempt), str(attempt)))


def test_what_is_withdrawn_is_offered_no_more(alone: Alone) -> None:
    offer = alone.offer
    offer.open([Extent(0, PART)], is_complete=True)
    assert offer.claim() == 1
    offer.withdraw()
    assert (alone.noted(), offer.claim(), offer.until(1, 0), offer.next_attempt) == (
        ("1", None),
        None,
        None,
        2,
    )
    offer.add([Extent(0, PART)])
    assert offer.claim() == 2
    end_attempt(alone.directory)
    assert (alone.noted(), offer.next_attempt) == (("2", None), 3)


@pytest.mark.parametrize(
    ("attempt", "record", "then"),
    [(1, "1", None), (2, "2", "2 verified"), (1, "2", "2"), (None, "1", "1"), (None, None, None)],
)
def test_a_right_digest_is_noted_of_the_attempt_that_readers_have(
    alone: Alone, attempt: int | None, record: str | None, then: str | None
) -> None:
    for path, text in ((alone.record, record), (alone.directory / "attempt", attempt)):
        if text is not None:
            path.write_text(str(text))
    alone.offer.open([Extent(0, PART)], is_complete=True)
    alone.offer.verify()
    for _ in range(2):
        assert alone.noted()[0] == then
        assert alone.offer.claim() == attempt, "nothing more is recorded"


@pytest.mark.parametrize(
    ("record", "right", "is_known"),
    [
        (None, [True, True, True], False),
        ("2", [False, False, True], True),
        ("2 verified", [False, True, True], True),
        ("2 verified\n", [False, True, True], True),
        ("", [False, False, False], True),
        ("-2", [False, False, False], True),
        ("2" * 65, [False, False, False], True),
        ("\u0662 verified", [False, False, False], True),
    ],
)
def test_a_record_says_whose_bytes_were_right(
    alone: Alone, record: str | None, right: list[bool], *, is_known: bool
) -> None:
    if record is not None:
        alone.record.write_text(record)
    assert [alone.offer.is_right(attempt) for attempt in (1, 2, 3)] == right
    assert alone.offer.has_wrong_readers is is_known


def test_a_disk_that_fails_is_reported_as_such(alone: Alone) -> None:
    offer, attempt = alone.offer, alone.directory / "attempt"
    attempt.write_text("1")
    offer.open([Extent(0, PART)], is_complete=True)
    alone.record.mkdir()
    attempt.unlink()
    attempt.mkdir()
    for call in (offer.claim, offer.verify, offer.withdraw):
        with pytest.raises(DiskFailed):
            call()


# --- the records ---


def test_a_record_that_is_written_again_is_the_newest_and_forgets_no_other(tmp_path: Path) -> None:
    streamed = tmp_path / "streamed"
    streamed.mkdir()
    records = Records(streamed, at_most=2)

    def names() -> set[str]:
        return {path.name for path in streamed.iterdir()}

    for name in ("a", "b", "a"):
        records.write(streamed / name, name)
    assert names() == {"a", "b"}
    records.write(streamed / "c", "c")
    assert names() == {"a", "c"}, "b was the oldest"
    for _ in range(2):
        records.remove(streamed / "a")
    records.write(streamed / "d", "d")
    assert names() == {"c", "d"}
    assert {(path.read_text(), path.stat().st_mode & 0o777) for path in streamed.iterdir()} == {
        ("c", 0o600),
        ("d", 0o600),
    }


def test_a_missing_directory_has_no_records(tmp_path: Path) -> None:
    records = Records(tmp_path / "absent")
    records.remove(tmp_path / "absent" / "blob")
    with pytest.raises(FileNotFoundError):
        records.write(tmp_path / "absent" / "blob", "1")
