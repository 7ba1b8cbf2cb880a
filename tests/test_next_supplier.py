"""Which supplier of a download may take the next part, and how many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from cachd.metrics import Metrics
from cachd.model import Digest, File, Limits
from cachd.store.disk_store import DiskStore
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.supplier import Supplier, Supply
from cachd.transfer.download.suppliers import Suppliers
from cachd.transfer.engine import Engine
from cachd.transfer.streams import StreamQuota, Streams
from tests.shelf import ShelfSource

SHA256 = Digest("sha256", "0" * 64)
Joined = Callable[[str], Supplier]


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
            supply = Supply(ShelfSource(), "https", StreamQuota(), reservation, Outcomes())
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


def test_even_when_all_rest_each_waits(suppliers: Suppliers, joined: Joined) -> None:
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
