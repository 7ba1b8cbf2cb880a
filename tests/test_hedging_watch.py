"""Which request of a pull is taken over by another connection: decided from what each has received."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from cachd.metrics import Metrics
from cachd.model import Digest, Extent, File, Limits, Ref
from cachd.store.disk_store import DiskStore
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.download.download import Download
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.part import Part
from cachd.transfer.download.supplier import Supplier, Supply
from cachd.transfer.engine import Engine
from cachd.transfer.hedging import Hedging
from cachd.transfer.streams import Asking, StreamQuota, Streams
from tests.shelf import ShelfSource

KIB, MIB = 1 << 10, 1 << 20
PART_BYTES = 64 * MIB
SLOW = 10.0 * KIB  # bytes per second
THREAD = threading.get_ident()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """The requests of one pull, whose paces the test sets, and what `Hedging` takes over."""

    def __init__(self, supplier: Supplier, metrics: Metrics) -> None:
        self.supplier, self.metrics, self.clock = supplier, metrics, Clock()
        self.requests: list[tuple[Asking, Part, float, dict[int, int]]] = []
        self.hedging = Hedging(supplier.quota, self.clock)

    def ask(self, *paces: float | None, size: int = PART_BYTES) -> None:
        """Begin a request with each of these paces; None: its answer has not begun."""
        for pace in paces:
            received = {THREAD: 0}
            asking = Asking(self.supplier.quota, 5.0, {}, received, now=self.clock.now)
            asking.opened = 0.0 if pace is None else self.clock.now
            part = Part(Extent(0, size))
            self.supplier.turns[asking] = part
            self.requests.append((asking, part, pace or 0.0, received))

    def end(self, number: int) -> None:
        del self.supplier.turns[self.requests[number][0]]

    def run(self, seconds: float, *, step: float = 0.5) -> list[int]:
        """Let time pass, and watch twice a second. Returns the numbers of the requests that were taken."""
        for _ in range(round(seconds / step)):
            self.clock.now += step
            for asking, part, pace, received in self.requests:
                if asking in self.supplier.turns:
                    received[THREAD] += int(pace * step)
                    part.reached += int(pace * step)
                    self.supplier.sent += int(pace * step)
            self.hedging.watch([self.supplier])
        return [number for number, each in enumerate(self.requests) if each[0].is_taken]

    @property
    def hedged(self) -> tuple[int, float]:
        """Bytes that were taken over, as the pull and as the metrics count them."""
        return self.supplier.download.tally.hedged, self.metrics.hedged_bytes._value.get()


@pytest.fixture
def watched(store: DiskStore) -> Iterator[Watched]:
    metrics = Metrics()
    engine = Engine(Streams(1), Bandwidth(Limits(), metrics), metrics, retries=0)
    with closing(engine), ExitStack() as stack:
        reservation = stack.enter_context(store.space.reserve(9, total=9))
        ref, quota = Ref.parse("https://host/model.bin"), StreamQuota()
        supply = Supply(ShelfSource(), ref, quota, reservation, Outcomes())
        file = File("model.bin", 1 << 40, "https://host/model.bin", Digest("sha256", "0" * 64))
        supplier = Supplier(file, supply, engine)
        supplier.download = Download(file, store.content, engine, lambda _: None)
        yield Watched(supplier, metrics)


def test_a_request_that_is_far_slower_than_the_others_is_taken_once(watched: Watched) -> None:
    watched.ask(*[1.0 * MIB] * 7, SLOW)
    assert watched.run(0.5) == [7]
    _, part, *_ = watched.requests[7]
    rest = PART_BYTES - int(SLOW / 2)
    assert (part.taken, watched.hedged) == (1, (rest, rest))
    assert watched.run(5.0) == [7]
    assert (part.taken, watched.hedged) == (1, (rest, rest))


@pytest.mark.parametrize(
    ("slow", "fast", "taken"),
    [(1, 1, 1), (2, 6, 2), (3, 5, 0), (3, 9, 3), (2, 5, 0), (1, 2, 1), (4, 0, 0), (1, 0, 0)],
)
def test_only_a_quarter_of_the_requests_may_be_slow(
    watched: Watched, slow: int, fast: int, taken: int
) -> None:
    watched.ask(*[1.0 * MIB] * fast, *[SLOW] * slow)
    assert len(watched.run(3.0)) == taken


@pytest.mark.parametrize(
    "change",
    [
        lambda watched: setattr(watched.supplier, "has_ranges", False),
        lambda watched: setattr(watched.requests[7][1], "taken", 3),
        lambda watched: watched.requests[7][0].take(),
        lambda watched: setattr(watched.requests[7][0], "wanted", PART_BYTES),
    ],
    ids=["no ranges", "taken three times", "taken already", "the bytes may be nearly here"],
)
def test_a_request_that_another_cannot_better_is_left_alone(
    watched: Watched, change: Callable[[Watched], object]
) -> None:
    watched.ask(*[1.0 * MIB] * 7, SLOW)
    change(watched)
    watched.run(1.0)
    assert watched.hedged == (0, 0)


def test_an_answer_that_does_not_begin_is_late_after_a_few_seconds(watched: Watched) -> None:
    watched.ask(*[1.0 * MIB] * 7)
    watched.ask(None, size=MIB)
    assert watched.run(3.5) == []
    assert watched.run(1.0) == [7]
    assert watched.hedged == (MIB, MIB)


def test_an_answer_that_does_not_begin_is_waited_for_longer_each_time(watched: Watched) -> None:
    watched.ask(*[1.0 * MIB] * 7)
    watched.ask(None, size=MIB)
    watched.requests[7][1].taken = 1
    assert watched.run(7.5) == []
    assert watched.run(1.0) == [7]


def test_the_bytes_that_may_be_lost_are_bounded(watched: Watched) -> None:
    watched.ask(8.0 * MIB, 400.0 * KIB, size=1 << 40)
    assert watched.run(1.0) == [], "a second of the slow request is more than 3 % of all bytes"
    assert watched.run(1.0) == [1]
    watched.ask(400.0 * KIB, size=1 << 40)
    watched.end(1)
    assert watched.run(1.0) == [1], "the loss of the first one counts"
    assert watched.run(2.0) == [1, 2]


def test_a_few_bytes_may_always_be_lost(watched: Watched) -> None:
    watched.ask(800.0 * KIB, 60.0 * KIB, size=1 << 40)
    assert watched.run(0.5) == [1]


def test_streams_receive_an_eighth_of_a_second_at_once_of_what_a_request_usually_gets(
    watched: Watched,
) -> None:
    quota = watched.supplier.quota
    watched.ask(8.0 * MIB)
    watched.run(2.0)
    assert not quota.has_pace, "one request alone is compared with nothing"
    watched.ask(8.0 * MIB, 4.0 * MIB)
    watched.run(1.0)
    assert (quota.has_pace, quota.read_bytes) == (True, MIB), "the slowest one does not count"
    for number in (0, 1):
        watched.end(number)
    watched.run(2.0)
    assert quota.read_bytes >= MIB // 2, "at the end, the earlier value stays"


def test_a_pace_that_is_too_low_lets_streams_receive_64_kib_at_once(watched: Watched) -> None:
    watched.ask(SLOW, SLOW)
    watched.run(1.0)
    assert watched.supplier.quota.read_bytes == 64 * KIB


def test_nothing_is_measured_before_half_a_second(watched: Watched) -> None:
    watched.ask(*[1.0 * MIB] * 7, SLOW)
    assert watched.run(0.375, step=0.125) == []
    assert watched.run(0.125, step=0.125) == [7]


def test_a_request_that_becomes_slow_is_taken_after_a_second(watched: Watched) -> None:
    watched.ask(*[1.0 * MIB] * 8)
    assert watched.run(3.0) == []
    asking, part, _, received = watched.requests[7]
    watched.requests[7] = asking, part, SLOW, received
    assert watched.run(10.0) == [7]
    assert part.reached < 4 * MIB, "the bytes from before do not count for long"


def test_a_request_that_receives_nothing_is_slower_the_longer_its_bytes_are_waited_for(
    watched: Watched,
) -> None:
    watched.ask(*[1.0 * MIB] * 7, 0.0)
    watched.requests[7][0].wanted = 3 * MIB
    assert watched.run(11.0) == []
    assert watched.run(3.0) == [7]
