"""Offers: which bytes of an unfinished blob readers may have, and what a later process knows of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cachd.errors import DiskFailed
from cachd.model import Digest, Extent, File
from cachd.store.content import ContentStore
from cachd.store.content.offers import Offers
from cachd.store.ingest import HELD_BYTES, Ingest, Offer
from cachd.store.ingest.part_lines import parts_of
from cachd.store.ingest.records import Records
from cachd.store.layout import Layout
from tests.ground.models import noise

SIZE = 12 << 20
PART = 4 << 20
CONTENT = noise(SIZE)
BUFFER = memoryview(bytearray(1 << 20))


def file_of(content: bytes = CONTENT) -> File:
    digest = Digest("sha256", hashlib.sha256(content).hexdigest())
    return File("model.bin", len(content), "https://host/model.bin", digest, base="https://host/")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    private = ("blobs", "damaged", "ingest", "staging", "streamed", "trash")
    for directory in (tmp_path / ".cachd" / name for name in private):
        directory.mkdir(parents=True)
    return layout


def begun(layout: Layout) -> tuple[Ingest, Offer]:
    """An ingest as a new process begins or resumes it, and its offer."""
    file = file_of()
    offer = Offers(layout).of(file)
    return Ingest(layout.ingest(file.blob, file.size), file, offer=offer), offer


def receive(ingest: Ingest, number: int, content: bytes = CONTENT, *, synced: bool = True) -> None:
    part = Extent(number * PART, (number + 1) * PART)
    hashed, view = ingest.part_hash(), memoryview(content)[part.start : part.stop]
    ingest.write(part.start, view)
    hashed.update(view)
    ingest.keep(part, hashed)
    ingest.received(part)
    if synced:
        ingest.finish(part)


def test_a_reader_gets_synced_bytes_without_a_gap_and_not_the_end(layout: Layout) -> None:
    ingest, offer = begun(layout)
    assert offer.claim() is None
    receive(ingest, 0, synced=False)
    assert offer.claim() is None
    receive(ingest, 2)
    assert offer.claim() == 1
    assert offer.until(1, 0) == PART
    assert offer.until(1, PART) == PART
    assert offer.until(1, SIZE - 10) == SIZE - 10
    receive(ingest, 1)
    assert offer.until(1, 0) == SIZE - HELD_BYTES
    ingest.close()
    assert offer.until(1, 5) == 5  # nothing now, and nothing is wrong


def test_a_resumed_ingest_goes_on_with_the_attempt(layout: Layout) -> None:
    ingest, offer = begun(layout)
    receive(ingest, 0)
    assert offer.claim() == 1
    ingest.close()
    again, offer = begun(layout)
    assert (offer.next_attempt, offer.claim(), offer.until(1, 0)) == (1, 1, PART)
    again.close()


def test_an_ingest_that_lost_synced_bytes_is_another_attempt(layout: Layout) -> None:
    ingest, offer = begun(layout)
    receive(ingest, 0)
    receive(ingest, 1)
    assert offer.claim() == 1
    ingest.close()
    with (ingest.directory / "data").open("r+b") as data:
        data.seek(10)
        data.write(b"\0" if CONTENT[10] else b"\1")
    again, offer = begun(layout)
    assert offer.claim() == 2
    assert offer.until(1, PART) is None
    again.close()


def test_an_ingest_that_lost_its_journal_is_another_attempt(layout: Layout) -> None:
    ingest, offer = begun(layout)
    receive(ingest, 0, noise(SIZE, 2))
    assert offer.claim() == 1
    ingest.close()
    for lost in ("journal", "received", "data"):
        (ingest.directory / lost).unlink()
    again, offer = begun(layout)
    receive(again, 0)
    assert offer.claim() == 2
    again.close()


def test_a_removal_that_stops_halfway_has_ended_the_attempt(layout: Layout) -> None:
    store, file = ContentStore(layout), file_of()
    ingest = store.begin(file)
    receive(ingest, 0)
    assert ingest.offer.claim() == 1
    ingest.close()
    layout.trash.rmdir()
    layout.trash.touch()  # nothing can be moved there
    with pytest.raises(DiskFailed):
        store.removal.drop_ingest(file.blob)
    again, offer = begun(layout)
    assert offer.claim() == 2
    again.close()


@pytest.mark.parametrize("is_line_right", [True, False])
def test_a_salvage_replaces_no_received_byte(layout: Layout, tmp_path: Path, is_line_right: bool) -> None:
    ingest, offer = begun(layout)
    receive(ingest, 0, noise(SIZE, 2))
    assert offer.claim() == 1
    damaged, hashed, alone = tmp_path / "damaged", ingest.part_hash(), ingest.part_hash()
    damaged.write_bytes(CONTENT)
    hashed.update(memoryview(CONTENT)[: 2 * PART])
    alone.update(memoryview(CONTENT)[2 * PART if is_line_right else 0 :])
    lines = (f"0 {2 * PART} {hashed.hexdigest}", f"{2 * PART} {SIZE} {alone.hexdigest}")
    parts_of(damaged).write_text("\n".join([*lines, ""]))
    ingest.salvage(damaged)
    held = offer.data.read_bytes()
    assert held[:PART] == noise(SIZE, 2)[:PART]
    assert held[PART : 2 * PART] == bytes(PART)
    assert held[2 * PART :] == (CONTENT[2 * PART :] if is_line_right else bytes(PART))
    assert (offer.claim(), ingest.resumed) == (1, 2 * PART if is_line_right else PART)
    ingest.close()


@pytest.mark.parametrize("ends", ["forget", "discard"])
def test_after_wrong_bytes_the_attempt_is_over_for_this_and_the_next_process(
    layout: Layout, ends: str
) -> None:
    ingest, offer = begun(layout)
    receive(ingest, 0, noise(SIZE, 2))
    assert offer.claim() == 1
    if ends == "forget":
        ingest.forget(ingest.parts)
        assert offer.until(1, 0) is None
        ingest.close()
    else:
        ingest.discard()
    assert offer.next_attempt == 2
    again, offer = begun(layout)
    assert offer.next_attempt == 2
    assert not offer.is_right(1)
    receive(again, 0)
    assert offer.claim() == 2
    again.close()


@pytest.mark.parametrize("is_first_wrong", [False, True])
def test_a_verified_blob_says_which_attempt_had_its_bytes(layout: Layout, is_first_wrong: bool) -> None:
    store = ContentStore(layout)
    file = file_of()
    if is_first_wrong:
        wrong, offer = begun(layout)
        receive(wrong, 0, noise(SIZE, 2))
        assert offer.claim() == 1
        wrong.forget(wrong.parts)
        wrong.close()
    ingest = store.begin(file)
    for number in range(3):
        receive(ingest, number)
    offer = store.offers.of(file)
    attempt = 1 + is_first_wrong
    assert offer.claim() == attempt
    ingest.follow(BUFFER)
    while not ingest.is_hashed:
        ingest.follow(BUFFER)
    store.commit(ingest)
    ingest.close()
    for known in (offer, Offers(layout).of(file)):  # this process and the next one
        assert known.is_right(attempt)
        assert known.has_wrong_readers is is_first_wrong
        assert known.is_right(1) is not is_first_wrong


def test_an_attempt_that_nobody_read_before_the_blob_was_verified_is_right(layout: Layout) -> None:
    ingest, offer = begun(layout)
    receive(ingest, 0, noise(SIZE, 2))
    assert offer.claim() == 1
    ingest.forget(ingest.parts)
    told = offer.next_attempt
    offer.verify()
    assert (told, offer.is_right(2), offer.is_right(1)) == (2, True, False)
    ingest.close()


def test_the_oldest_records_are_forgotten_and_new_files_are_still_streamed(tmp_path: Path) -> None:
    streamed = tmp_path / "streamed"
    streamed.mkdir()
    for age, name in enumerate(("b", "a", "c", "d")):
        (streamed / name).write_text("1")
        os.utime(streamed / name, (100 + age, 100 + age))
    records = Records(streamed, at_most=3)
    for name in ("new", "newer"):
        offer = Offer(SIZE, tmp_path, streamed / name, records)
        offer.open([Extent(0, PART)], is_complete=False)
        assert offer.claim() == 1
    assert {path.name for path in streamed.iterdir()} == {"d", "new", "newer"}
    offer.verify()  # its record is removed, and leaves room
    records.write(streamed / "newest", "1")
    assert {path.name for path in streamed.iterdir()} == {"d", "new", "newest"}


def test_bytes_of_an_ingest_that_was_swept_are_never_right(layout: Layout) -> None:
    store, file = ContentStore(layout), file_of(CONTENT[:100])
    offer = Offers(layout).of(file)
    ingest = Ingest(layout.ingest(file.blob, file.size), file, offer=offer)
    part, hashed = Extent(0, 50), ingest.part_hash()
    ingest.write(0, memoryview(CONTENT)[:50])
    hashed.update(memoryview(CONTENT)[:50])
    ingest.keep(part, hashed)
    ingest.finish(part)
    assert offer.claim() == 1
    ingest.discard()
    store.put(file, memoryview(CONTENT)[:100])
    assert not store.offers.of(file).is_right(1)
    assert store.offers.of(file).has_wrong_readers
