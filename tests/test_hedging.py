"""One connection of many that is throttled: another takes over what is left of its part."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cachd.policy.outrun import answers_late, is_far_behind
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Fault, Origin, Reply, Seen
from tests.ground.origin.content import Patched

KIB, MIB = 1 << 10, 1 << 20
SLOW_BYTES = 20_000.0  # a second
Start = Callable[..., Engine]


@dataclass(frozen=True)
class Throttled(Fault):
    """The first `many` connections that ask for content are slow from then on.

    `lie_after`: what they send after so many bytes of an answer is wrong; None for right bytes.
    """

    many: int = 1
    lie_after: int | None = None
    peers: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        with self.lock:
            if reply.stop - reply.start >= 64 * KIB and len(self.peers) < self.many:
                self.peers.append(seen.peer)
        if seen.peer not in self.peers:
            return reply
        if self.lie_after is not None:
            at = reply.start + self.lie_after
            lie = Patched(reply.content, at, bytes(max(reply.stop - at, 0)))
            reply = replace(reply, content=lie)
        return replace(reply, rate=SLOW_BYTES)


def files_of(count: int, size: int) -> dict[str, bytes]:
    return {f"model-{n:05}.safetensors": noise(size, seed=n) for n in range(count)}


def seconds_of(running: Engine, origin: Origin, name: str, files: Mapping[str, bytes]) -> float:
    """How long a pull of these files takes."""
    ref = origin.add_model(name, files)
    began = time.monotonic()
    running.begin(spec_of(ref, name=name)).done.result(PATIENCE_SECONDS)
    return time.monotonic() - began


def hedged(running: Engine) -> float:
    found = re.search(rb"^cachd_hedged_bytes_total (\S+)$", running.metrics.text(), re.MULTILINE)
    assert found
    return float(found[1])


@dataclass(frozen=True)
class Measured:
    """A pull with a slow connection: its time, as a multiple of that without; bytes sent, of those needed."""

    times: float
    sent: float


def measured(running: Engine, origin: Origin, count: int, size: int, fault: Fault) -> Measured:
    files = files_of(count, size)
    seconds_of(running, origin, "warm", files_of(count, size - 1))  # until all streams are at work
    without = seconds_of(running, origin, "without", {path: content[1:] for path, content in files.items()})
    origin.forget()
    origin.fault("*", fault)
    with_slow = seconds_of(running, origin, "slow", files)
    needed = sum(map(len, files.values()))
    return Measured(with_slow / without, origin.bytes_sent() / needed)


def test_a_slow_connection_of_eight_hardly_delays_a_pull_and_what_it_sends_late_goes_nowhere(
    engine: Start, origin: Origin, root: Path
) -> None:
    origin.rate = 1.0 * MIB
    running = engine(streams=8, retries=0)
    files = files_of(32, MIB)
    found = measured(running, origin, 32, MIB, Throttled(lie_after=512 * KIB))
    assert found.times < 1.5, found  # a MiB over the slow connection alone takes 52 s
    assert found.sent < 1.03, found
    assert {path: (root / "models/slow" / path).read_bytes() for path in files} == files
    assert 0 < hedged(running) <= 2 * MIB
    assert not running.metrics.refetched_bytes.labels("source")._value.get()


def test_a_slow_connection_holds_the_end_of_one_large_file_up_no_longer(
    engine: Start, origin: Origin, root: Path
) -> None:
    content = noise(24 * MIB)
    origin.rate = 4.0 * MIB
    running = engine(streams=4, retries=0)
    ref = origin.add_model("it", {"model.safetensors": content})
    origin.fault("*", Throttled())
    pull = running.begin(spec_of(ref, name="it"))
    pull.done.result(PATIENCE_SECONDS)
    assert (root / "models/it/model.safetensors").read_bytes() == content
    assert pull.progress.now.hedged > 3 * MIB
    assert pull.progress.fetched == len(content)
    assert origin.bytes_sent("/it/model.safetensors") < 1.03 * len(content)


def test_an_origin_whose_connections_are_all_slow_is_left_alone(engine: Start, origin: Origin) -> None:
    origin.rate = 100.0 * KIB
    running = engine(streams=4, retries=0)
    seconds_of(running, origin, "it", files_of(8, 150 * KIB))
    assert not hedged(running)


@pytest.mark.parametrize(
    ("rest", "pace", "usual", "taken", "behind"),
    [
        (4 * MIB, 20_000.0, 4.0 * MIB, 0, True),
        (4 * MIB, 0.0, 4.0 * MIB, 0, True),
        (4 * MIB, 2.0 * MIB, 4.0 * MIB, 0, False),  # half as fast
        (10 * KIB, 20_000.0, 4.0 * MIB, 0, False),  # about to end
        (4 * MIB, 20_000.0, 20_000.0, 0, False),  # as slow as all
        (4 * MIB, 20_000.0, 0.0, 0, False),  # nothing is known of others
        (4 * MIB, 500.0 * KIB, 4.0 * MIB, 0, True),
        (4 * MIB, 500.0 * KIB, 4.0 * MIB, 1, False),  # the second connection is not better
    ],
)
def test_a_part_is_far_behind_when_another_connection_would_bring_it_much_earlier(
    rest: int, pace: float, usual: float, taken: int, behind: bool
) -> None:
    assert is_far_behind(rest, pace, usual, taken=taken) is behind


@pytest.mark.parametrize(
    ("waited", "usual", "taken", "late"),
    [
        (2.0, 4.0 * MIB, 0, False),
        (5.0, 4.0 * MIB, 0, True),
        (5.0, 4.0 * MIB, 1, False),
        (5.0, 1.0 * MIB, 0, False),
        (60.0, 0.0, 0, False),
    ],
)
def test_an_answer_is_late_when_the_others_have_brought_whole_parts_meanwhile(
    waited: float, usual: float, taken: int, late: bool
) -> None:
    assert answers_late(4 * MIB, waited, usual, taken=taken) is late
