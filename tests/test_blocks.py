"""What a download pays for its disk blocks, and from whose reservation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cachd.errors import NoSpace
from cachd.model import Digest, Extent, File, Percentage
from cachd.store.disk_store import DiskStore
from cachd.store.ingest import Ingest
from cachd.store.overhead import beside_file
from cachd.store.space import Reservation
from cachd.transfer.download.blocks import Blocks, NoSpaceNow
from cachd.transfer.download.part import Part
from cachd.transfer.download.tally import Tally
from tests.ground.counted import counted
from tests.ground.disks import FuseDisk
from tests.ground.pause import PATIENCE_SECONDS, paused_before

MIB = 1 << 20
LIMIT = 12 * MIB
FILE = File("model.bin", 4 * MIB, "http://x/model.bin", Digest("sha256", "0" * 64))


class Paying:
    """The blocks of one file of 4 MiB in a store with a limit of 12 MiB, and pulls that pay for them."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.store = stack.enter_context(DiskStore(root))
        self.store.space.change(reserve_free=0, limit=LIMIT, reserve_inodes=0)
        self.stack, self.tally = stack, Tally(FILE)
        self.blocks = Blocks(self.tally)
        self.part = Part(Extent(0, FILE.size))
        self.ingest = self.store.content.begin(FILE)
        stack.callback(self.ingest.close)

    def pull(self) -> Reservation:
        reservation = self.stack.enter_context(self.store.space.reserve(FILE.size, total=FILE.size))
        self.blocks.share_with(reservation)
        return reservation

    def keep_free(self, share: int) -> None:
        """Let no file take the last `share` percent of the disk: with 100, as if others had filled it."""
        self.store.space.change(reserve_free=Percentage(share), limit=LIMIT, reserve_inodes=0)


@pytest.fixture
def paying(root: Path) -> Iterator[Paying]:
    with ExitStack() as stack:
        yield Paying(root, stack)


def test_to_ask_for_space_costs_nothing(paying: Paying) -> None:
    reservation = paying.pull()
    before = reservation.left
    for _ in range(3):
        assert paying.blocks.has_space_again(FILE.size)
    assert reservation.left == before
    assert paying.store.space.capacity().reserved == before


def test_blocks_are_taken_once_from_every_pull_that_waits(paying: Paying) -> None:
    first, second = paying.pull(), paying.pull()
    before = first.left
    assert before == second.left
    paying.blocks.allocate(paying.ingest, paying.part, 64)
    assert paying.part.allocated > MIB, "blocks are allocated ahead"
    assert before - first.left == before - second.left == paying.ingest.allocated
    paying.part.reached = MIB
    paying.blocks.allocate(paying.ingest, paying.part, MIB)
    assert before - first.left == paying.ingest.allocated, "it has its blocks already"


def test_blocks_that_an_earlier_pull_left_are_not_paid_for_again(paying: Paying) -> None:
    paying.ingest.allocate(Extent(0, MIB))
    here = paying.ingest.allocated
    reservation = paying.pull()
    before = reservation.left
    paying.blocks.begin(here)
    paying.blocks.allocate(paying.ingest, paying.part, 64)
    assert before - reservation.left == paying.ingest.allocated - here > 0


def test_a_pull_that_has_ended_pays_no_more(paying: Paying) -> None:
    first, second = paying.pull(), paying.pull()
    assert paying.blocks.payer() is first
    first.end()
    assert paying.blocks.payer() is second
    second.end()
    assert paying.blocks.payer() is first, "somebody must"


def test_bytes_that_found_no_space_are_counted_once_and_asked_for_when_there_is_some(paying: Paying) -> None:
    paying.pull()
    paying.keep_free(100)
    paying.tally.add(64)
    for _ in range(2):
        with pytest.raises(NoSpaceNow):
            paying.blocks.allocate(paying.ingest, paying.part, 64)
        assert (paying.part.lacking, paying.tally.received) == (64, 0)
    with pytest.raises(NoSpaceNow):
        paying.blocks.check_space(paying.ingest, paying.part)
    paying.keep_free(0)
    paying.blocks.check_space(paying.ingest, paying.part)
    assert paying.part.lacking == 0
    assert paying.part.allocated >= 64


def test_while_a_file_waits_for_space_no_part_is_asked_for_that_has_none(paying: Paying) -> None:
    paying.pull()
    paying.keep_free(100)
    paying.blocks.check_space(paying.ingest, paying.part)  # nothing has failed yet
    paying.tally.is_waiting_for_space = True
    with pytest.raises(NoSpaceNow):
        paying.blocks.check_space(paying.ingest, paying.part)
    paying.keep_free(0)
    paying.blocks.check_space(paying.ingest, paying.part)


def test_a_quota_that_refuses_blocks_is_no_space_and_costs_nothing(tmp_path: Path) -> None:
    """The file system shows free space and allocates nothing: to wait would be in vain."""
    with FuseDisk(tmp_path) as disk, ExitStack() as stack:
        paying = Paying(disk.path, stack)
        reservation = paying.pull()
        before = reservation.left
        disk.fail("fallocate", "ENOSPC", "*/data")
        with pytest.raises(NoSpace):
            paying.blocks.allocate(paying.ingest, paying.part, 64)
        assert reservation.left == before
        assert paying.part.allocated == 0
        disk.heal()
        paying.blocks.allocate(paying.ingest, paying.part, 64)
        assert paying.part.allocated >= 64


def test_bytes_whose_space_was_taken_after_it_was_granted_are_fetched_again(tmp_path: Path) -> None:
    with FuseDisk(tmp_path) as disk, ExitStack() as stack:
        paying = Paying(disk.path, stack)
        reservation = paying.pull()
        before = reservation.left
        paying.tally.add(64)
        with paused_before(
            Ingest.allocate, lambda: paying.blocks.allocate(paying.ingest, paying.part, 64)
        ) as allocating:
            paying.keep_free(100)
            disk.fail("fallocate", "ENOSPC", "*/data")
        with pytest.raises(NoSpaceNow):
            allocating.result(PATIENCE_SECONDS)
        assert (paying.part.lacking, paying.tally.received) == (64, 0)
        assert (paying.part.allocated, reservation.left) == (0, before)


def test_pulls_that_pay_are_listed_with_the_lock(paying: Paying) -> None:
    paying.pull()
    other = paying.pull()
    steps: list[Callable[[], object]] = [
        lambda: paying.blocks.share_with(other),
        paying.blocks.payer,
        paying.blocks.begin_ingest,
        lambda: paying.blocks.spend_in_others(other, 0),
    ]
    with counted(paying.blocks) as lock:
        for number, step in enumerate(steps, 1):
            step()
            assert lock.here == number
        paying.blocks.took(paying.ingest)
        assert lock.here == len(steps) + 2, "to measure what was taken, and to list who pays"


def test_the_ingest_of_a_small_file_is_reserved_by_every_pull(root: Path) -> None:
    with ExitStack() as stack:
        paying = Paying(root, stack)
        pulls = [paying.pull(), paying.pull()]
        paying.blocks.begin_ingest()
        assert [each.files for each in pulls] == [{FILE.blob: beside_file(FILE, by_ingest=True)}] * 2


@pytest.mark.parametrize("count", [1, 2])
def test_only_the_others_are_charged_for_what_one_pull_was_granted(paying: Paying, count: int) -> None:
    pulls = [paying.pull() for _ in range(count)]
    before = [each.left for each in pulls]
    paying.blocks.spend_in_others(pulls[0], 64)
    assert [was - each.left for was, each in zip(before, pulls, strict=True)] == [0, 64][:count]
    paying.blocks.spend_in_others(None, 64)
    assert [was - each.left for was, each in zip(before, pulls, strict=True)] == [64, 128][:count]


def test_blocks_are_allocated_ahead_and_never_behind_the_end_of_the_part(paying: Paying) -> None:
    paying.pull()
    part = Part(Extent(0, MIB))
    paying.blocks.allocate(paying.ingest, part, 64)
    assert (part.allocated, paying.ingest.allocated) == (MIB, MIB)
    part.reached = MIB // 2
    paying.blocks.allocate(paying.ingest, part, MIB // 2)
    assert paying.ingest.allocated == MIB, "all its bytes have blocks"
