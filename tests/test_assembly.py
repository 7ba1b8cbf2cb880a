"""A file that arrives in parts: who takes which part, what becomes of one that breaks off, and repairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cachd.errors import CachdError, Cancelled, Corrupt, Unavailable
from cachd.model import Extent, File, Ref
from cachd.store.disk_store import DiskStore
from cachd.transfer.download.assembly import Assembly, explained
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.part import Part
from cachd.transfer.download.supplier import GaveWay, Supplier, Supply
from cachd.transfer.download.turn import write
from cachd.transfer.streams import StreamQuota
from tests.ground.disks import FuseDisk
from tests.ground.models import noise
from tests.ground.site import until
from tests.ground.stored import MIB, sha256
from tests.test_download_steps import Clock, Steps, keep_free
from tests.test_downloads import AWAY, Ground, Source, file_of, opened

CONTENT = noise(3 * MIB)
FIRST, SECOND, THIRD = (Extent(at * MIB, (at + 1) * MIB) for at in range(3))


class Assembled(Steps):
    """A download of 3 MiB from one host or several, whose time a test sets."""

    def __init__(self, ground: Ground, source: Source | None = None, content: bytes = CONTENT) -> None:
        super().__init__(ground, source or Source(content), content)
        self.clock = Clock()
        ingest = self.download.ingest = ground.store.content.begin(self.file)
        ground._stack.callback(ingest.close)
        self.assembly = Assembly(self.download, ingest, clock=self.clock)
        self.schedule = self.download.schedule
        self.schedule._clock = self.clock

    def joined(self, host: str, source: Source | None = None) -> Supplier:
        """Another supplier of the file."""
        file, quota = file_of(self.content, host), StreamQuota()
        supply = Supply(
            source or Source(self.content), Ref.parse(file.origin), quota, self.reservation, Outcomes()
        )
        supplier = Supplier(file, supply, self.engine)
        supplier.download = self.download
        self.schedule.suppliers.append(supplier)
        supply.outcomes.expect()
        return supplier

    def queue(self, *extents: Extent) -> list[Part]:
        parts = [Part(extent) for extent in extents]
        self.assembly.parts.add(parts)
        return parts

    def work(self, supplier: Supplier | None = None) -> None:
        with self.download.inside():  # or the file could be committed while the stream is at work
            self.on_stream(lambda buffer: self.assembly.work(supplier or self.supplier, buffer))


@pytest.fixture
def ground(store: DiskStore) -> Iterator[Ground]:
    with opened(store, streams=2) as made:
        yield made


# --- parts and turns ---


@pytest.mark.parametrize(("files", "count"), [(7, 32), (8, 16)], ids=["streams share it", "a file each"])
def test_a_file_is_divided_for_the_streams_that_share_it(store: DiskStore, files: int, count: int) -> None:
    file = File("model.bin", 256 * MIB, "https://host/model.bin", sha256(b"never fetched"))
    with opened(store, streams=8) as ground:
        on = Steps(ground, Source(b""), CONTENT)
        on.file = on.supplier.file = on.download.file = file
        on.begin()
        on.supplier.quota.files = files
        on.assembly.begin(on.supplier)
        parts = on.assembly.parts
        assert parts.count(on.supplier, 0.0) == count
        first = parts.take(on.supplier, 0.0)
        assert first is not None
        assert first.extent == Extent(0, file.size // count)


@pytest.mark.parametrize(
    ("parts", "files", "has_ranges", "running", "queued", "turns"),
    [
        (0, 0, True, 0, 1, 0),
        (3, 0, True, 0, 0, 3),
        (3, 0, True, 2, 1, 2),
        (3, 2, True, 0, 0, 1),
        (3, 2, True, 1, 0, 0),
        (3, 1, True, 0, 0, 3),
        (3, 0, False, 0, 0, 1),
        (3, 0, False, 1, 0, 0),
        (3, 0, False, 0, 1, 0),
    ],
)
def test_a_supplier_has_a_turn_for_each_part_that_it_may_fetch(
    ground: Ground, parts: int, files: int, has_ranges: bool, running: int, queued: int, turns: int
) -> None:
    on = Assembled(ground)
    on.queue(*(FIRST, SECOND, THIRD)[:parts])
    on.supplier.quota.files, on.supplier.has_ranges = files, has_ranges
    on.supplier.running, on.supplier.queued = running, queued
    assert on.assembly.turns_for(on.supplier, 100.0) == turns


def test_a_turn_is_due_when_a_part_is_or_when_its_supplier_has_rested(ground: Ground) -> None:
    on = Assembled(ground)
    on.supplier.rests_until = 105.0
    assert on.assembly.next_due(on.supplier, 100.0) == math.inf, "no part is left"
    part = Part(FIRST)
    part.wait(110.0, on.supplier)
    on.assembly.parts.put_back(part)
    dues = [on.assembly.next_due(on.supplier, now) for now in (100.0, 104.9, 105.0, 109.9, 110.0)]
    assert dues == [105.0, 105.0, 110.0, 110.0, math.inf]


def test_who_goes_on_with_a_part_of_another_takes_its_rest_and_the_other_vouches_for_what_it_sent(
    ground: Ground,
) -> None:
    on = Assembled(ground)
    other = on.joined("other")
    (part,) = on.queue(Extent(0, 2 * MIB))
    part.sender, part.hash = on.supplier, on.assembly.ingest.part_hash()
    write(on.assembly, part, memoryview(CONTENT)[:MIB])
    assert on.assembly.take(on.supplier) is part
    assert on.assembly.vouchers.of(FIRST) == set()
    on.assembly.parts.put_back(part)
    rest = on.assembly.take(other)
    assert rest is not None
    assert rest.extent == SECOND
    assert on.assembly.vouchers.of(FIRST) == {on.file.origin}
    assert on.assembly.take(other) is None


def test_work_fetches_one_part_and_puts_back_what_broke_off(ground: Ground) -> None:
    on = Assembled(ground)
    on.queue(FIRST, SECOND)
    on.source.ends_at = 1000
    on.work()
    assert (on.source.asked, on.supplier.running) == ([FIRST], 0)
    assert on.assembly.parts.count(on.supplier, 100.0) == 1, "the other waits"
    on.work()
    assert on.source.asked[1:] == [SECOND]
    assert not on.assembly.parts.count(on.supplier, 100.0)
    on.clock.now += 60.0
    on.work()
    assert on.source.asked[2:] == [Extent(1000, MIB)]
    assert not on.assembly.parts
    on.work()
    assert (len(on.source.asked), on.supplier.running) == (3, 0)


def test_no_more_turns_work_than_a_supplier_may_have(ground: Ground) -> None:
    on = Assembled(ground)
    on.queue(FIRST)
    on.supplier.has_ranges, on.supplier.running = False, 1
    on.work()
    assert (on.source.asked, on.supplier.running) == ([], 1)
    assert on.assembly.parts.count(on.supplier, 100.0) == 1


def test_a_source_that_turns_out_to_send_no_ranges_is_asked_for_the_complete_file(ground: Ground) -> None:
    on = Assembled(ground)
    on.source.has_ranges = False
    on.queue(THIRD, FIRST, SECOND)
    on.work()
    assert not on.supplier.has_ranges
    on.work()
    assert on.source.asked == [THIRD, Extent(0, 3 * MIB)]
    assert not on.assembly.parts
    assert on.assembly.ingest.gaps() == []


def test_an_ingest_knows_whether_all_its_bytes_come_from_one_source(ground: Ground) -> None:
    on = Assembled(ground)
    other = on.joined("other")
    on.queue(FIRST, SECOND)
    on.work()
    assert on.assembly.ingest.is_of_one_source
    on.work(other)
    assert not on.assembly.ingest.is_of_one_source


def test_blocks_and_bytes_of_an_earlier_download_are_not_paid_for_again(ground: Ground) -> None:
    first = Assembled(ground)
    first.queue(FIRST)
    first.work()
    first.assembly.ingest.close()
    on = Steps(ground, Source(CONTENT), CONTENT)
    ingest, before = on.begin(), on.reservation.left
    here = ingest.allocated
    assert (on.download.tally.resumed, on.download.ingest) == (MIB, ingest)
    assert ground.metrics.resumed_bytes._value.get() == MIB
    on.turn(Part(SECOND))
    assert before - on.reservation.left == ingest.allocated - here


def test_an_ingest_that_is_read_back_for_a_download_that_is_over_is_cancelled_and_stays(
    ground: Ground,
) -> None:
    first = Assembled(ground)
    first.queue(FIRST)
    first.work()
    first.assembly.ingest.close()
    on = Steps(ground, Source(CONTENT), CONTENT)
    on.download.tally.is_over = True
    with pytest.raises(Cancelled):
        on.begin()
    with closing(ground.store.content.begin(on.file)) as again:
        assert again.resumed == MIB


@pytest.mark.parametrize("has_ranges", [True, False])
def test_while_bytes_find_no_space_nothing_is_asked_for_until_half_a_second_later(
    ground: Ground, has_ranges: bool
) -> None:
    on = Assembled(ground)
    (part,) = on.queue(FIRST)
    on.supplier.has_ranges = has_ranges
    on.download.tally.is_waiting_for_space = True
    keep_free(ground, 100)
    on.work()
    assert on.source.asked == []
    assert (part.due, part.refused) == (100.5 if has_ranges else 0.0, None)
    assert on.supplier.rests_until == (0.0 if has_ranges else 100.5)
    keep_free(ground, 0)
    on.clock.now += 0.5
    on.work()
    assert part.is_complete


# --- what breaks off ---


def broken(on: Assembled, error: Unavailable | Cancelled) -> Part:
    """A part that broke off with this error."""
    part = Part(FIRST)
    on.assembly.broke_off(on.supplier, part, error)
    return part


def test_a_part_that_failed_waits_for_its_supplier_alone(ground: Ground) -> None:
    on = Assembled(ground)
    other = on.joined("other")
    part = broken(on, Unavailable("away", code="origin_failed", retry_after=7.0))
    assert part.due >= 107.0
    assert (part.is_due(on.supplier, 106.9), part.is_due(other, 106.9)) == (False, True)
    assert on.supplier.rests_until == part.due


def test_a_supplier_that_sends_files_in_order_rests_as_a_whole(ground: Ground) -> None:
    on = Assembled(ground)
    on.supplier.has_ranges = False
    part = broken(on, Unavailable("away", code="origin_failed", retry_after=7.0))
    assert part.due == 0.0
    assert on.supplier.rests_until >= 107.0


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_part_that_gave_way_goes_to_another_supplier_or_behind_the_other_tasks_of_its_pull(
    ground: Ground, is_alone: bool
) -> None:
    on = Assembled(ground)
    if not is_alone:
        on.joined("other")
    on.download.tally.is_over = True  # no turn works
    part = broken(on, GaveWay("taken"))
    assert (part.due, part.refused) == ((0.0, None) if is_alone else (101.0, on.supplier))
    assert on.supplier.queued + len(on.supplier.quota.tasks) in ((1, 2) if is_alone else (0,))


def test_too_many_failures_and_a_cancel_are_raised_unless_the_supplier_stops(ground: Ground) -> None:
    on, part = Assembled(ground), Part(FIRST)
    on.assembly.broke_off(on.supplier, part, AWAY)
    with pytest.raises(Unavailable) as refusal:
        on.assembly.broke_off(on.supplier, part, AWAY)
    assert refusal.value is AWAY
    with pytest.raises(Cancelled):
        broken(on, Cancelled("x"))
    on.supplier.is_stopped = True
    on.assembly.broke_off(on.supplier, part, AWAY)
    broken(on, Cancelled("x"))


# --- the commit, and repairs ---


def received(on: Assembled, *by: Supplier) -> None:
    """Let three parts of the file arrive from these suppliers in turn, and hash them."""
    suppliers = by or (on.supplier,)
    for number, extent in enumerate((FIRST, SECOND, THIRD)):
        on.queue(extent)
        on.work(suppliers[number % len(suppliers)])
    until(lambda: on.assembly.ingest.is_hashed)


def test_one_thread_commits_a_file_once_it_is_hashed(ground: Ground) -> None:
    on = Assembled(ground)
    assert not on.assembly.begins_commit()
    received(on)
    assert on.assembly.begins_commit()
    assert not on.assembly.begins_commit()
    on.assembly.commit()
    assert ground.here(CONTENT)
    assert (on.download.tally.is_over, on.supplier.has_ended, on.supplier.wrong) == (True, True, "")


def test_a_download_that_is_over_commits_nothing(ground: Ground) -> None:
    on = Assembled(ground)
    received(on)
    on.download.tally.is_over = True
    on.assembly.commit()
    assert not ground.here(CONTENT)


def stopped(on: Assembled) -> None:
    """Let no supplier take a part."""
    for each in on.schedule.suppliers:
        each.is_stopped = True


def damaged(on: Assembled, extent: Extent) -> None:
    """Let the disk change these bytes of the ingest."""
    with (on.assembly.ingest.directory / "data").open("r+b") as data:
        data.seek(extent.start)
        data.write(bytes(extent.size))


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_part_that_the_disk_changed_is_fetched_again_alone(ground: Ground, is_alone: bool) -> None:
    on = Assembled(ground)
    suppliers = [on.supplier] if is_alone else [on.supplier, on.joined("other")]
    for extent in (FIRST, SECOND, THIRD):
        on.queue(extent)
        on.work()
        if extent == SECOND:
            damaged(on, SECOND)
    until(lambda: on.assembly.ingest.is_hashed)
    assert on.assembly.begins_commit()
    stopped(on)
    on.assembly.commit()
    assert on.assembly.ingest.gaps() == [SECOND]
    assert (ground.refetched("disk"), ground.refetched("source")) == (MIB, 0)
    assert on.download.tally.received == 2 * MIB
    assert [bool(each.wrong) for each in suppliers] == ([True] if is_alone else [False, False])
    assert on.schedule.suppliers.take_turns
    assert not on.assembly.begins_commit(), "it is not hashed any more"


def test_after_a_wrong_digest_of_one_source_all_of_its_bytes_are_fetched_again(ground: Ground) -> None:
    on = Assembled(ground, Source(bytes(len(CONTENT))))
    received(on)
    stopped(on)
    on.assembly.commit()
    assert on.assembly.ingest.gaps() == [Extent(0, 3 * MIB)]
    assert (on.source.renewed, ground.refetched("source"), on.download.tally.received) == (1, 3 * MIB, 0)
    assert on.supplier.wrong == str(sha256(bytes(3 * MIB)))


def test_after_a_wrong_digest_of_two_sources_the_one_that_sent_most_completes_the_file(
    ground: Ground,
) -> None:
    lies = Source(bytes(len(CONTENT)))
    on = Assembled(ground)
    liar = on.joined("liar", lies)
    received(on, on.supplier, liar)
    vouchers, parts = on.assembly.vouchers, on.assembly.ingest.parts
    sent = [vouchers.bytes_of(each.origin, parts) for each in (on.supplier, liar)]
    assert sent == [2 * MIB, MIB]
    stopped(on)
    on.assembly.commit()
    assert on.assembly.ingest.gaps() == [SECOND]
    assert (on.supplier.vouched, liar.vouched) == (2 * MIB, MIB)
    assert (on.supplier.wrong, liar.wrong) == ("", ""), "who was wrong is not known yet"
    assert (on.source.renewed, lies.renewed) == (1, 0)
    on.supplier.is_stopped = False
    on.work()
    until(lambda: on.assembly.ingest.is_hashed)
    assert on.assembly.ingest.agrees


def test_a_source_that_is_wrong_again_fails_and_the_other_completes_the_file(ground: Ground) -> None:
    lies = Source(bytes(len(CONTENT)))
    on = Assembled(ground)
    liar = on.joined("liar", lies)
    received(on, liar)
    liar.wrong = "as before"
    stopped(on)
    on.assembly.commit()
    assert list(on.schedule.suppliers) == [on.supplier]
    assert isinstance(error_of(liar), Corrupt)
    assert on.assembly.ingest.gaps() == [Extent(0, 3 * MIB)]
    assert (on.supplier.wrong, on.supplier.has_ended) == ("", False)


def error_of(supplier: Supplier) -> CachdError | None:
    try:
        supplier.outcomes.wait(0)
    except CachdError as error:
        return error
    return None


def test_the_hint_of_a_wrong_digest_says_whether_it_was_the_same_as_before() -> None:
    for before, is_same in (("sha256:1", True), ("sha256:2", False)):
        error = Corrupt("x", got="sha256:1", hint="other")
        assert explained(error, before) is error
        assert ("same bytes twice" in error.hint) is is_same


def test_a_commit_without_a_file_descriptor_is_tried_again(tmp_path: Path) -> None:
    with FuseDisk(tmp_path) as disk, ExitStack() as stack:
        store = stack.enter_context(DiskStore(disk.path))
        ground = stack.enter_context(opened(store, streams=2))
        on = Assembled(ground)
        received(on)
        disk.fail("rename", "EMFILE", "*")
        on.assembly.commit()
        assert not on.download.tally.is_over
        disk.heal()
        until(lambda: on.download.tally.is_over)
        assert ground.here(CONTENT)


def test_an_ingest_whose_bytes_are_all_here_is_hashed_without_a_request(ground: Ground) -> None:
    first = Assembled(ground)
    received(first)
    first.assembly.ingest.close()
    on = Steps(ground, Source(CONTENT), CONTENT)
    ingest = on.begin()
    assert ingest.behind == len(CONTENT)
    on.assembly.begin(on.supplier)
    until(lambda: ingest.is_hashed)
    assert (on.source.asked, ingest.agrees) == ([], True)


def test_bytes_that_find_no_space_let_the_download_wait_for_it(ground: Ground) -> None:
    on = Assembled(ground)
    (part,) = on.queue(FIRST)
    keep_free(ground, 100)
    on.work()
    assert on.download.tally.is_waiting_for_space
    assert (part.reached, part.due, on.download.tally.received) == (0, 100.5, 0)
    assert on.assembly.parts.count(on.supplier, 100.5) == 1


def test_blocks_that_no_part_has_paid_for_are_charged_at_the_commit(ground: Ground) -> None:
    on = Assembled(ground)
    received(on)
    on.download.blocks.begin(on.assembly.ingest.allocated - 4096)
    before = on.reservation.left
    on.assembly.commit()
    assert before - on.reservation.left == 4096


def test_a_call_queues_the_turns_of_the_parts_that_wait(ground: Ground) -> None:
    on = Assembled(ground)
    on.queue(FIRST, SECOND, THIRD)
    on.assembly.serve()
    on.schedule.call()
    until(lambda: ground.here(CONTENT))
