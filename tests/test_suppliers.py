"""A file that several pulls ask for: who supplies its bytes, and what a bad supplier costs the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from cachd.errors import CachdError, Cancelled, Corrupt, NotFound
from cachd.model import Extent, Percentage
from cachd.policy.outrun import SLOW_BYTES_PER_SECOND, is_outrun
from cachd.transfer.download.vouchers import Vouchers
from cachd.transfer.request import Pull
from tests.attacks.test_identity import inode_of
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Fault, Flip, Hold, Origin, Short, Stall, Status, Trickle, Zeroed
from tests.ground.site import until
from tests.ground.weights import weights_of

KIB, MIB = 1 << 10, 1 << 20
CONTENT = noise(8 * MIB)
PROMPT_SECONDS = 25.0
LIE = Zeroed(0, 4 * MIB)  # half of the file: no proof by samples passes
PROOF_BYTES = 32 * 16 * KIB
IN_FLIGHT_BYTES = 4 * MIB  # of one connection: sent by the origin, and lost when its part moves elsewhere
EVIL, GOOD = "/evil/model.safetensors", "/good/model.safetensors"
Start = Callable[..., Engine]


@pytest.fixture
def started(engine: Callable[..., Engine]) -> Iterator[Start]:
    """An engine whose pulls are all stopped in the end."""
    with ExitStack() as stack:

        def opened(**options: object) -> Engine:
            running = engine(**{"pulls": 4, "streams": 4, **options})
            stack.callback(running.pulls.interrupt)
            return running

        yield opened


def begin(running: Engine, origin: Origin, name: str, content: bytes = CONTENT) -> Pull:
    """Start a pull of a directory that lists the sha256 of `content`."""
    pull = running.pulls.start(spec_of(origin.add_model(name, {"model.safetensors": content})))
    assert pull is not None
    return pull


def held_half_way(running: Engine, origin: Origin, name: str) -> tuple[Pull, Hold]:
    """A pull that has two of its eight MiB, and what keeps the others back."""
    hold = origin.hold(f"/{name}/model.safetensors", after=3 * MIB)
    pull = begin(running, origin, name)
    assert hold.reached.wait(PATIENCE_SECONDS)
    until(lambda: pull.progress.done >= 2 * MIB)
    return pull, hold


def ended(pull: Pull, seconds: float = PROMPT_SECONDS) -> None:
    pull.done.result(seconds)


@pytest.mark.parametrize("streams", [1, 4])
def test_a_stranger_who_drips_a_file_of_a_healthy_origin_does_not_hold_it_up(
    started: Start, origin: Origin, root: Path, streams: int
) -> None:
    origin.fault(EVIL, Trickle(2400))
    running = started(streams=streams)
    evil = begin(running, origin, "evil")
    until(lambda: origin.bytes_sent(EVIL) > KIB)
    ended(begin(running, origin, "good"))
    assert weights_of(root, "good") == CONTENT
    assert not (root / "models/evil").exists()
    assert origin.bytes_sent(GOOD) <= len(CONTENT) + PROOF_BYTES + MIB
    assert not evil.done.done(), "it must prove on its own that it has the file"


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize(
    "fault",
    [Flip(5 * MIB), LIE, Stall(64 * KIB), Stall(0), Status(404), Status(403), Short(0), Status(503)],
    ids=lambda fault: f"{type(fault).__name__}{list(vars(fault).values())[:1]}",
)
def test_a_bad_first_supplier_costs_the_next_little(
    started: Start, origin: Origin, root: Path, fault: Fault, streams: int
) -> None:
    origin.fault(EVIL, fault)
    running = started(streams=streams)
    hold = origin.hold(EVIL, after=0)
    evil = begin(running, origin, "evil")
    assert hold.reached.wait(PATIENCE_SECONDS)
    good = begin(running, origin, "good")
    until(lambda: good.progress.state == "downloading")
    hold.release()
    ended(good)
    assert weights_of(root, "good") == CONTENT
    assert origin.bytes_sent(GOOD) <= len(CONTENT) + PROOF_BYTES + MIB
    if fault in (LIE, Status(403), Status(404)):
        with pytest.raises(CachdError):
            evil.done.result(PATIENCE_SECONDS)
    if fault != Flip(5 * MIB):  # one bit: it has the file, but for that
        assert not (root / "models/evil").exists()


def test_a_first_supplier_whose_pull_is_cancelled_leaves_its_bytes(
    started: Start, origin: Origin, root: Path
) -> None:
    running = started(streams=1)
    first, hold = held_half_way(running, origin, "evil")
    second = begin(running, origin, "good")
    until(lambda: second.progress.state == "downloading")
    running.pulls.cancel("evil")
    with pytest.raises(Cancelled):
        first.done.result(PATIENCE_SECONDS)
    ended(second)
    hold.release()
    assert weights_of(root, "good") == CONTENT
    assert origin.bytes_sent(GOOD) <= len(CONTENT) - 2 * MIB + PROOF_BYTES + MIB


@pytest.mark.parametrize("fault", [Trickle(2400), Zeroed(0, 20 * MIB), Stall(0), Status(404)], ids=repr)
def test_a_bad_supplier_that_joins_neither_slows_nor_spoils_a_healthy_one(
    started: Start, origin: Origin, root: Path, fault: Fault
) -> None:
    content = noise(40 * MIB)
    running = started()
    hold = origin.hold(GOOD, after=MIB)
    good = begin(running, origin, "good", content)
    assert hold.reached.wait(PATIENCE_SECONDS)
    origin.fault(EVIL, fault)
    evil = begin(running, origin, "evil", content)
    until(lambda: evil.progress.state == "downloading" or evil.done.done())
    hold.release()
    ended(good)
    assert weights_of(root, "good") == content
    assert origin.bytes_sent(GOOD) <= len(content) + PROOF_BYTES + 4 * IN_FLIGHT_BYTES
    assert not (root / "models/evil").exists()


def test_what_a_slow_supplier_sent_is_not_fetched_again(started: Start, origin: Origin, root: Path) -> None:
    origin.fault(EVIL, Stall(3 * MIB))
    running = started(streams=2)
    evil = begin(running, origin, "evil")
    until(lambda: evil.progress.done >= 5 * MIB)
    ended(begin(running, origin, "good"))
    assert weights_of(root, "good") == CONTENT
    assert origin.bytes_sent(GOOD) <= 3 * MIB + PROOF_BYTES + MIB


def test_the_parts_of_a_liar_are_the_only_ones_fetched_again(
    started: Start, origin: Origin, root: Path
) -> None:
    content = noise(40 * MIB)
    origin.fault(EVIL, Zeroed(0, 20 * MIB))
    running = started(streams=1)
    hold = origin.hold(EVIL, after=2 * MIB)
    evil = begin(running, origin, "evil", content)
    assert hold.reached.wait(PATIENCE_SECONDS)
    until(lambda: evil.progress.done >= MIB)
    good = begin(running, origin, "good", content)
    ended(good)
    hold.release()
    assert weights_of(root, "good") == content
    assert origin.bytes_sent(GOOD) <= len(content) + PROOF_BYTES + 2 * MIB
    with pytest.raises(Corrupt):
        evil.done.result(PATIENCE_SECONDS)


def test_a_pull_is_ready_by_what_another_supplied_only_after_it_has_proven_to_have_it(
    started: Start, origin: Origin, root: Path
) -> None:
    origin.fault(EVIL, Stall(0))
    running = started()
    hold = origin.hold(GOOD, after=MIB)
    good = begin(running, origin, "good")
    assert hold.reached.wait(PATIENCE_SECONDS)
    evil = begin(running, origin, "evil")
    honest = begin(running, origin, "honest")
    until(lambda: honest.progress.state == evil.progress.state == "downloading")
    hold.release()
    ended(good)
    ended(honest)
    assert inode_of(root, "good") == inode_of(root, "honest")
    assert not evil.done.done()
    assert not (root / "models/evil").exists()


def test_a_stranger_who_drips_its_proof_holds_up_nobody_elses(
    started: Start, origin: Origin, root: Path
) -> None:
    origin.fault(EVIL, Trickle(2400))
    running = started()
    ended(begin(running, origin, "real"))
    evil = begin(running, origin, "evil")
    until(lambda: origin.bytes_sent(EVIL) > KIB)
    ended(begin(running, origin, "good"))
    assert inode_of(root, "good") == inode_of(root, "real")
    assert not evil.done.done()


@pytest.mark.parametrize("size", [24 * MIB, 200 * KIB], ids=["large", "small"])
def test_a_download_that_is_paused_for_space_asks_its_origin_for_nothing(
    started: Start, origin: Origin, root: Path, size: int
) -> None:
    content = noise(size)
    running = started(streams=1)
    hold = origin.hold(GOOD, after=100 * KIB)
    pull = begin(running, origin, "good", content)
    assert hold.reached.wait(PATIENCE_SECONDS)
    running.store.space.change(reserve_free=Percentage(99.9), limit=None, reserve_inodes=0)
    hold.release()
    until(lambda: pull.progress.now.is_paused)
    asked, sent = len(origin.requests), origin.bytes_sent(GOOD)
    time.sleep(3)  # no event says that nothing was asked: six pauses between two looks for space
    assert len(origin.requests) - asked <= 1
    assert origin.bytes_sent(GOOD) - sent <= IN_FLIGHT_BYTES + MIB
    running.store.space.change(reserve_free=0, limit=None, reserve_inodes=0)
    ended(pull)
    assert weights_of(root, "good") == content
    assert origin.bytes_sent(GOOD) <= size + 2 * IN_FLIGHT_BYTES


def test_a_source_that_lacks_the_file_fails_its_pull_at_once_while_another_is_slow(
    started: Start, origin: Origin
) -> None:
    """Else a pull could not resolve again, and would hang on a stranger's source."""
    origin.fault(EVIL, Trickle(2400))
    running = started()
    begin(running, origin, "evil")
    until(lambda: origin.bytes_sent(EVIL) > KIB)
    origin.fault(GOOD, Status(404))
    with pytest.raises(NotFound):
        ended(begin(running, origin, "good"))


# --- one digest, two sizes: one of the sources lies ---


@dataclass(frozen=True)
class Lie:
    """A source that lists the sha256 of `content`, and sends `sent`, whose size differs."""

    content: bytes
    sent: bytes


LIES = {
    "a byte too long": Lie(CONTENT, CONTENT + b"x"),
    "cut short": Lie(CONTENT, CONTENT[: 5 * MIB]),
    "empty": Lie(CONTENT, b""),
    "small": Lie(CONTENT[: 40 * KIB], CONTENT[: 30 * KIB]),
    "of a small file": Lie(CONTENT[: 40 * KIB], CONTENT),
}


def begin_lie(running: Engine, origin: Origin, lie: Lie) -> Pull:
    ref = origin.add_model("evil", {"model.safetensors": lie.content})
    origin.add(EVIL, lie.sent)
    pull = running.pulls.start(spec_of(ref))
    assert pull is not None
    return pull


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_source_that_states_another_size_for_a_digest_does_not_hold_up_who_comes_later(
    started: Start, origin: Origin, root: Path, lie: Lie
) -> None:
    origin.add(EVIL, lie.sent)
    hold = origin.hold(EVIL, after=0) if lie.sent else None
    running = started()
    evil = begin_lie(running, origin, lie)
    if hold is not None:
        assert hold.reached.wait(PATIENCE_SECONDS)
    ended(begin(running, origin, "good", lie.content))
    assert weights_of(root, "good") == lie.content
    if hold is not None:
        assert not evil.done.done()
        hold.release()
    with pytest.raises(Corrupt):
        evil.done.result(PATIENCE_SECONDS)
    assert weights_of(root, "good") == lie.content
    assert not (root / "models/evil").exists()


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_source_that_states_another_size_for_a_digest_does_no_harm_to_who_came_first(
    started: Start, origin: Origin, root: Path, lie: Lie
) -> None:
    running = started()
    hold = origin.hold(GOOD, after=len(lie.content) // 3)
    good = begin(running, origin, "good", lie.content)
    assert hold.reached.wait(PATIENCE_SECONDS)
    with pytest.raises(Corrupt):
        ended(begin_lie(running, origin, lie))
    assert not good.done.done()
    hold.release()
    ended(good)
    assert weights_of(root, "good") == lie.content
    assert origin.bytes_sent(GOOD) <= len(lie.content) + IN_FLIGHT_BYTES


def test_what_an_honest_source_sent_stays_when_a_liar_states_another_size(
    started: Start, origin: Origin, root: Path
) -> None:
    running = started(streams=1)
    first, hold = held_half_way(running, origin, "good")
    running.pulls.cancel("good")
    with pytest.raises(Cancelled):
        first.done.result(PATIENCE_SECONDS)
    hold.release()
    with pytest.raises(Corrupt):
        ended(begin_lie(running, origin, LIES["a byte too long"]))
    running.pulls.delete("evil", force=True)
    again = begin(running, origin, "good")
    ended(again)
    assert again.progress.now.resumed >= 2 * MIB
    assert weights_of(root, "good") == CONTENT


# --- which supplier takes a part: decided without a clock, a disk or a network ---

FAST = 4 * SLOW_BYTES_PER_SECOND


@pytest.mark.parametrize(
    ("pace", "best", "another_is_new", "outrun"),
    [
        (2400.0, None, True, True),  # it drips, and the other may be faster
        (2400.0, None, False, False),  # the only one that is left
        (2400.0, 2400.0, False, False),  # the other one drips as well
        (FAST, None, True, False),
        (FAST, 5.0 * FAST, False, True),
        (FAST, 3.0 * FAST, False, False),
    ],
)
def test_a_source_is_outrun_by_one_four_times_as_fast_or_by_any_if_it_hardly_sends(
    pace: float, best: float | None, another_is_new: bool, outrun: bool
) -> None:
    assert is_outrun(pace, best, another_is_new=another_is_new) is outrun


def test_a_part_is_vouched_for_by_all_who_sent_the_same_bytes_of_it() -> None:
    vouchers, parts = Vouchers(), [Extent(0, 10), Extent(10, 20)]
    vouchers.note(parts[0], "same", "a")
    vouchers.note(parts[0], "same", "b")
    vouchers.note(parts[1], "one", "a")
    assert vouchers.complete(parts) == {"a"}
    vouchers.note(parts[1], "other", "b")
    assert vouchers.complete(parts) == {"b"}, "what `a` sent is not on disk any more"
    assert vouchers.not_of("a", parts) == {parts[1]}
    assert vouchers.bytes_of("a", parts) == 10
