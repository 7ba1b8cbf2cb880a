"""Which supplier of a download may take the next part, how many at once, and which part that is."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from cachd.metrics import Metrics
from cachd.model import Digest, Extent, File, Limits, Ref
from cachd.policy.outrun import SLOW_BYTES_PER_SECOND
from cachd.store.disk_store import DiskStore
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.part import Part, Parts
from cachd.transfer.download.supplier import Supplier, Supply
from cachd.transfer.download.suppliers import Suppliers
from cachd.transfer.engine import Engine
from cachd.transfer.streams import Asking, StreamQuota, Streams
from tests.shelf import ShelfSource

SHA256 = Digest("sha256", "0" * 64)
Joined = Callable[[str], Supplier]
MIB = 1 << 20


@pytest.fixture
def suppliers() -> Suppliers:
    return Suppliers()


@pytest.fixture
def joined(store: DiskStore, suppliers: Suppliers) -> Iterator[Joined]:
    """Let a supplier from a host join the download."""
    metrics = Metrics()
    engine = Engine(Streams(1), Bandwidth(Limits(), metrics), metrics, retries=0)
    with closing(engine), ExitStack() as stack:
        reservation = stack.enter_context(store.space.reserve(9, total=9))

        def join(host: str) -> Supplier:
            supply = Supply(
                ShelfSource(), Ref.parse("https://host/file"), StreamQuota(), reservation, Outcomes()
            )
            file = File("model.bin", 9, f"https://{host}/model.bin", SHA256)
            suppliers.append(Supplier(file, supply, engine))
            return suppliers[-1]

        yield join


def test_all_suppliers_work_at_once_while_none_was_wrong_or_slow(
    suppliers: Suppliers, joined: Joined
) -> None:
    both = joined("one.test"), joined("two.test")
    assert [suppliers.most_turns(each, 0.0) for each in both] == [None, None]


def test_who_failed_rests_while_another_serves(suppliers: Suppliers, joined: Joined) -> None:
    failed, other = joined("one.test"), joined("two.test")
    suppliers.failed(failed, 0.0, 10.0)
    assert suppliers.best(9.9) is other
    assert (suppliers.most_turns(failed, 9.9), suppliers.most_turns(other, 9.9)) == (0, None)
    assert suppliers.most_turns(failed, 10.0) is None


def test_a_supplier_that_failed_rests_even_if_all_others_rest_too(
    suppliers: Suppliers, joined: Joined
) -> None:
    both = joined("one.test"), joined("two.test")
    for each in both:
        suppliers.failed(each, 0.0, 10.0)
    assert [suppliers.most_turns(each, 5.0) for each in both] == [0, 0]


def test_the_parts_of_the_only_supplier_wait_one_by_one(suppliers: Suppliers, joined: Joined) -> None:
    only = joined("one.test")
    suppliers.failed(only, 0.0, 10.0)
    assert suppliers.most_turns(only, 5.0) is None


def test_a_supplier_without_ranges_sends_one_file_at_a_time_and_rests_as_a_whole(
    suppliers: Suppliers, joined: Joined
) -> None:
    only = joined("one.test")
    only.has_ranges = False
    assert suppliers.most_turns(only, 0.0) == 1
    suppliers.failed(only, 0.0, 10.0)
    assert (suppliers.most_turns(only, 5.0), suppliers.most_turns(only, 10.0)) == (0, 1)


def test_who_was_wrong_serves_only_when_nobody_else_does(suppliers: Suppliers, joined: Joined) -> None:
    wrong, other = joined("one.test"), joined("two.test")
    wrong.wrong = str(SHA256)
    assert (suppliers.most_turns(wrong, 0.0), suppliers.most_turns(other, 0.0)) == (0, None)
    suppliers.remove(other)
    assert suppliers.most_turns(wrong, 0.0) is None


def test_after_a_wrong_digest_of_several_only_the_one_that_sent_most_serves(
    suppliers: Suppliers, joined: Joined
) -> None:
    less, most = joined("one.test"), joined("two.test")
    less.vouched, most.vouched = 4, 5
    suppliers.take_turns = True
    assert suppliers.best(0.0) is most
    assert (suppliers.most_turns(less, 0.0), suppliers.most_turns(most, 0.0)) == (0, None)


def test_who_was_not_measured_yet_gets_one_part_at_a_time_beside_one_that_was(
    suppliers: Suppliers, joined: Joined
) -> None:
    new, known = joined("one.test"), joined("two.test")
    known.was_measured = True
    assert (suppliers.most_turns(new, 0.0), suppliers.most_turns(known, 0.0)) == (1, None)


def test_when_one_fails_a_benched_one_serves_again(suppliers: Suppliers, joined: Joined) -> None:
    slow, fast = joined("one.test"), joined("two.test")
    slow.bench()
    assert (suppliers.most_turns(slow, 0.0), suppliers.most_turns(fast, 0.0)) == (0, None)
    suppliers.failed(fast, 0.0, 10.0)
    assert (suppliers.most_turns(slow, 5.0), suppliers.most_turns(fast, 5.0)) == (None, 0)
    assert suppliers.most_turns(slow, 10.0) is None, "it is not benched any more"


# --- slow ones ---

SLOW, FAST = float(1 * MIB), float(8 * MIB)  # bytes per second


def paced(supplier: Supplier, pace: float | None) -> Supplier:
    """The supplier as if its pace had been measured."""
    supplier.pace, supplier.was_measured, supplier.running = pace, pace is not None, 1
    return supplier


@pytest.mark.parametrize(
    ("pace", "other", "is_benched"),
    [
        (SLOW, 4 * SLOW, False),
        (SLOW, 4 * SLOW + 1, True),
        (SLOW, None, False),
        (float(SLOW_BYTES_PER_SECOND), None, False),
        (SLOW_BYTES_PER_SECOND - 1.0, None, True),
        (None, FAST, False),
    ],
)
def test_a_supplier_that_another_outruns_is_benched(
    suppliers: Suppliers, joined: Joined, pace: float | None, other: float | None, is_benched: bool
) -> None:
    slow, fast = paced(joined("one.test"), pace), paced(joined("two.test"), other)
    suppliers.watch(10.0, all_parts_taken=False)
    assert (slow.is_benched, fast.is_benched) == (is_benched, False)


def test_another_pull_from_the_same_origin_outruns_nobody(suppliers: Suppliers, joined: Joined) -> None:
    slow = paced(joined("one.test"), SLOW)
    paced(joined("one.test"), FAST)
    suppliers.watch(10.0, all_parts_taken=True)
    assert not slow.is_benched


def test_a_benched_one_is_compared_with_nobody_and_not_all_can_be_benched(
    suppliers: Suppliers, joined: Joined
) -> None:
    benched, other = paced(joined("one.test"), FAST), paced(joined("two.test"), SLOW)
    benched.bench()
    suppliers.watch(10.0, all_parts_taken=False)
    assert (benched.is_benched, other.is_benched) == (True, False)


def test_when_those_who_work_hardly_send_the_benched_ones_serve_again(
    suppliers: Suppliers, joined: Joined
) -> None:
    for pace, stays in ((SLOW_BYTES_PER_SECOND, True), (SLOW_BYTES_PER_SECOND - 1, False)):
        suppliers.clear()
        benched, works = paced(joined("one.test"), None), paced(joined("two.test"), float(pace))
        benched.bench()
        suppliers.watch(10.0, all_parts_taken=False)
        assert (benched.is_benched, works.is_benched) == (stays, False)
    works.running = 0
    benched.bench()
    suppliers.watch(10.0, all_parts_taken=False)
    assert benched.is_benched, "nobody works"


@pytest.mark.parametrize(
    ("size", "all_parts_taken", "is_new", "taken"),
    [
        (5 * MIB, True, True, [False, False]),
        (5 * MIB + 1, True, True, [False, True]),
        (5 * MIB + 1, False, True, [False, False]),
        (5 * MIB + 1, True, False, [False, False]),
    ],
    ids=["it ends soon", "it takes long", "parts wait", "the other works"],
)
def test_one_that_is_new_gets_the_part_that_would_take_longest(
    suppliers: Suppliers, joined: Joined, size: int, all_parts_taken: bool, is_new: bool, taken: list[bool]
) -> None:
    known, new = paced(joined("one.test"), SLOW), paced(joined("two.test"), None)
    new.running = int(not is_new)
    requests = []
    for length in (MIB, size):
        asking = Asking(known.quota, 5.0, {}, {threading.get_ident(): 0}, now=0.0)
        known.turns[asking] = Part(Extent(0, length))
        requests.append(asking)
    suppliers.watch(10.0, all_parts_taken=all_parts_taken)
    assert [each.is_taken for each in requests] == taken
    assert not known.is_benched


# --- which part ---


def parts_of(*starts: int) -> list[Part]:
    """Parts of one MiB that begin at these MiB."""
    return [Part(Extent(start * MIB, (start + 1) * MIB)) for start in starts]


def taken(parts: Parts, supplier: Supplier, now: float = 0.0, *, at_least: int = 0) -> int | None:
    """The MiB at which the next part begins that the supplier takes."""
    part = parts.take(supplier, now, at_least=at_least)
    return None if part is None else part.extent.start // MIB


def test_parts_are_taken_in_their_order_and_one_that_was_put_back_comes_first(joined: Joined) -> None:
    supplier, parts = joined("one.test"), Parts()
    first, second, third = parts_of(0, 1, 2)
    parts.add([first, second])
    assert parts.take(supplier, 0.0) is first
    parts.add([third])
    parts.put_back(first)
    assert parts.count(supplier, 0.0) == 3
    assert [taken(parts, supplier) for _ in range(4)] == [0, 1, 2, None]
    assert not parts


def test_a_part_that_one_supplier_failed_to_send_goes_to_another_at_once_and_to_it_later(
    joined: Joined,
) -> None:
    failed, other, parts = joined("one.test"), joined("two.test"), Parts()
    (part,) = parts_of(0)
    part.wait(10.0, failed)
    parts.put_back(part)
    assert parts
    assert (parts.count(failed, 9.9), parts.count(other, 9.9)) == (0, 1)
    assert (parts.next_due(failed, 9.9), parts.next_due(other, 9.9)) == (10.0, math.inf)
    assert taken(parts, failed, 9.9) is None
    assert taken(parts, other, 9.9) == 0
    assert not parts
    parts.put_back(part)
    assert taken(parts, failed, 9.9) == 0, "whoever took it, it waits no more"
    part.wait(10.0, failed)
    parts.put_back(part)
    assert taken(parts, failed, 10.0) == 0


def test_a_part_that_waits_for_space_goes_to_nobody(joined: Joined) -> None:
    supplier, parts = joined("one.test"), Parts()
    waiting, other = parts_of(0, 1)
    waiting.wait(10.0)
    parts.put_back(waiting)
    parts.add([other])
    assert (parts.count(supplier, 9.9), parts.next_due(supplier, 9.9)) == (1, 10.0)
    assert [taken(parts, supplier, 9.9), taken(parts, supplier, 9.9)] == [1, None]
    assert (parts.next_due(supplier, 10.0), taken(parts, supplier, 10.0)) == (math.inf, 0)


def test_a_supplier_without_ranges_takes_the_first_part_of_the_file_and_none_that_it_has_passed(
    joined: Joined,
) -> None:
    supplier, parts = joined("one.test"), Parts()
    supplier.has_ranges = False
    passed, next_one, waiting, last = parts_of(0, 2, 1, 3)
    parts.add([last, next_one, passed])
    waiting.wait(10.0)
    parts.put_back(waiting)
    assert taken(parts, supplier, at_least=2 * MIB) == 2
    assert taken(parts, supplier) == 0
    assert [taken(parts, supplier, 10.0) for _ in range(3)] == [1, 3, None]
    assert waiting.due == 0.0


def test_failures_count_for_each_supplier_until_64_kib_have_arrived(joined: Joined) -> None:
    one, two = joined("one.test"), joined("two.test")
    (part,) = parts_of(1)
    at = part.extent.start
    assert [part.failed(at, one), part.failed(at + (64 << 10) - 1, one), part.failed(at, two)] == [1, 2, 1]
    assert part.failed(at + (64 << 10), one) == 1
    assert part.failed(at + (64 << 10), two) == 1


def test_another_origin_goes_on_with_the_rest_of_a_part_and_the_same_one_with_the_part(
    joined: Joined,
) -> None:
    sender, other = joined("one.test"), joined("two.test")
    (part,) = parts_of(1)
    assert part.rest_for(other) is part, "no byte has come"
    part.sender = sender
    assert part.rest_for(other) is part, "no byte has come"
    part.reached, part.allocated, part.lacking = part.extent.start + 10, part.extent.start + 20, 5
    assert part.rest_for(sender) is part
    rest = part.rest_for(other)
    assert (rest.extent, rest.reached) == (Extent(part.extent.start + 10, part.extent.stop), part.reached)
    assert (rest.allocated, rest.lacking) == (part.allocated, 5)
    part.reached = part.extent.stop
    assert (rest.is_complete, part.is_complete, part.rest.size) == (False, True, 0)
