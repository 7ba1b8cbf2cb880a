"""How far a pull is, how fast, and what it waits for."""

from __future__ import annotations

import pytest

from cachd.model import Digest, File, Manifest
from cachd.transfer.download.tally import Tally
from cachd.transfer.progress import Figures, Progress, State
from cachd.transfer.waits import Reason, Waits

KIB = 1 << 10
SIZE = 1000 * KIB


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def file_of(path: str, digit: str, size: int = SIZE) -> File:
    return File(path, size, f"hf://org/m@{'a' * 40}/{path}", Digest("sha256", digit * 64))


FILES = (file_of("a", "a"), file_of("b", "b"), file_of("copy of b", "b"), file_of("here", "c"))
MANIFEST = Manifest("hf://org/m", "a" * 40, FILES)


def downloading(clock: Clock) -> tuple[Progress, Tally, Tally]:
    """A pull that lacks `a` and `b`, with their downloads."""
    progress, tallies = Progress(clock), (Tally(FILES[0]), Tally(FILES[1]))
    progress.begin_download(MANIFEST, 2 * SIZE)
    for tally in tallies:
        progress.watch(tally)
    return progress, *tallies


def test_bytes_and_files_are_counted() -> None:
    progress, a, b = downloading(Clock())
    present = MANIFEST.size - 2 * SIZE
    assert progress.total == MANIFEST.size
    assert (progress.done, progress.fetched, progress.now.resumed) == (present, 0, 0)
    assert progress.now.files_done == 1, "the one that is here"
    a.resumed = 100
    a.add(50)
    b.add(SIZE)
    b.forget(SIZE)
    now = progress.now
    assert (now.done, now.fetched, now.resumed, now.files_done) == (present + 150, SIZE + 50, 100, 1)
    b.add(SIZE)
    b.is_over = True
    assert progress.now.files_done == 3, "equal files are complete together"
    assert not progress.now.is_paused
    a.is_waiting_for_space = True
    assert progress.now.is_paused
    progress.end(State.failed)
    frozen = progress.now
    a.add(50)
    assert progress.now == frozen
    assert (frozen.done, progress.state) == (present + SIZE + 150, State.failed)


def test_a_download_that_is_begun_again_replaces_the_one_that_failed() -> None:
    progress, a, _ = downloading(Clock())
    a.add(500)
    again = Tally(FILES[0])
    progress.watch(again)
    assert progress.fetched == 0
    again.add(7)
    assert progress.fetched == 7


def test_bytes_that_a_source_proved_to_have_are_here() -> None:
    progress, a, _ = downloading(Clock())
    before = progress.done
    a.is_proven = True
    assert progress.done == before + SIZE


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    clock = Clock()
    progress, a, _ = downloading(clock)
    assert (progress.rate, progress.eta_seconds(progress.now)) == (0.0, None)
    for _ in range(2):
        progress.sample()
        assert progress.rate == 0.0, "no time has passed"
    for _ in range(5):
        clock.now += 2
        a.add(100)
        progress.sample()
    assert progress.rate == 50
    assert progress.eta_seconds(progress.now) == pytest.approx((2 * SIZE - 500) / 50)
    clock.now += 2
    progress.sample()
    assert progress.rate == 40, "the first sample is too old by now"
    progress.end(State.cancelled)
    assert progress.rate == 0


@pytest.mark.parametrize(
    ("seconds", "received", "is_slow"),
    [(4.9, 0, False), (5.0, 0, True), (5.0, 5 * 64 * KIB - 1, True), (5.0, 5 * 64 * KIB, False)],
)
def test_a_pull_is_slow_if_it_received_next_to_nothing_for_five_seconds(
    seconds: float, received: int, is_slow: bool
) -> None:
    clock = Clock()
    progress, a, _ = downloading(clock)
    assert not progress.is_slow
    progress.sample()
    clock.now += seconds
    a.add(received)
    progress.sample()
    assert progress.is_slow == is_slow
    assert progress.waits(progress.now) == (Waits(Reason.slow) if is_slow else None)


def test_a_pull_with_all_its_bytes_is_not_slow() -> None:
    clock = Clock()
    progress, a, b = downloading(clock)
    a.add(SIZE)
    b.add(SIZE)
    progress.sample()
    clock.now += 9
    progress.sample()
    assert not progress.is_slow
    progress.begin_publish()
    assert (progress.state, progress.is_slow) == (State.publishing, False)


def test_a_pull_says_what_it_waits_for() -> None:
    clock = Clock()
    progress = Progress(clock)
    assert progress.waits(progress.now) == Waits(Reason.slot)
    progress.begin_resolve()
    assert (progress.state, progress.waits(progress.now)) == (State.resolving, None)
    progress.pause_resolve(Waits(Reason.slow))
    assert progress.waits(progress.now) == Waits(Reason.slow)
    later = Waits(Reason.origin, 900.0, "502")
    progress.await_retry(later)
    assert (progress.state, progress.waits(progress.now)) == (State.waiting, later)
    progress, a, b = downloading(clock)
    progress.sample()
    clock.now += 6
    progress.sample()
    a.waits, b.waits = Waits(Reason.origin, 700.0), Waits(Reason.origin, 600.0)
    assert progress.waits(progress.now) == b.waits, "the one that goes on first"
    b.is_over = True
    assert progress.waits(progress.now) == a.waits
    a.is_waiting_for_space = True
    assert progress.waits(progress.now) == Waits(Reason.space)


def test_bytes_that_another_connection_takes_over_are_shown_until_the_end() -> None:
    progress, a, b = downloading(Clock())
    assert (progress.now.hedged, Figures(1, 2, 3, 4, is_paused=False).hedged) == (0, 0)
    a.hedge(5)
    b.hedge(7)
    assert progress.now.hedged == 12
    assert progress.fetched == 0
    progress.end(State.ready)
    assert progress.now.hedged == 12


def test_a_file_that_is_received_twice_counts_once() -> None:
    progress, a, _ = downloading(Clock())
    before = progress.done
    a.resumed = SIZE
    a.add(10)
    assert (progress.done, progress.now.fetched, progress.now.resumed) == (before + SIZE, 10, SIZE)


def test_a_pull_of_an_earlier_process_is_shown_as_it_ended() -> None:
    progress = Progress(Clock())
    assert (progress.total, progress.done) == (0, 0)
    progress.restore(3, 9)
    assert (progress.total, progress.now) == (9, Figures(3, 0, 0, 0, is_paused=False))
    progress.end(State.failed)
    assert (progress.total, progress.now.done, progress.state) == (9, 3, State.failed)
    assert progress.now.hedged == 0


@pytest.mark.parametrize(
    ("state", "waits"), [(State.queued, Waits(Reason.origin, 9.0, "502")), (State.failed, None)]
)
def test_only_a_pull_that_will_go_on_still_waits_after_its_end(state: State, waits: Waits | None) -> None:
    progress = Progress(Clock())
    progress.await_retry(Waits(Reason.origin, 9.0, "502"))
    progress.end(state)
    assert (progress.waits(progress.now), progress.state) == (waits, state)


def test_a_retry_still_shows_the_error_of_the_attempt_before() -> None:
    progress = Progress(Clock())
    progress.await_retry(Waits(Reason.origin, 9.0, "502"))
    progress.begin_resolve()
    assert progress.waits(progress.now) == Waits(Reason.origin, None, "502")
    progress.begin_resolve()
    assert progress.waits(progress.now) is None
    progress.begin_download(MANIFEST, SIZE)
    assert (progress.state, progress.waits(progress.now)) == (State.downloading, None)


def test_a_download_that_receives_a_byte_waits_no_longer() -> None:
    clock = Clock()
    progress, a, b = downloading(clock)
    progress.sample()
    clock.now += 6
    progress.sample()
    a.waits, b.waits = Waits(Reason.origin, 700.0), Waits(Reason.origin, None)
    assert progress.waits(progress.now) == b.waits, "one whose end is unknown comes first"
    b.add(1)
    assert progress.waits(progress.now) == a.waits


def test_the_rate_needs_two_samples_and_a_model_of_known_size() -> None:
    clock = Clock()
    progress, a, _ = downloading(clock)
    progress.sample()
    clock.now += 1
    a.add(64)
    assert (progress.rate, progress.eta_seconds(progress.now)) == (0.0, None)
    progress.sample()
    assert progress.rate == 64
    progress.manifest = None
    assert progress.eta_seconds(progress.now) is None


def test_a_sample_of_ten_seconds_ago_counts_and_an_older_one_does_not() -> None:
    clock = Clock()
    progress, a, _ = downloading(clock)
    progress.sample()
    a.add(100)
    clock.now += 10
    progress.sample()
    assert progress.rate == 10
    clock.now += 0.5
    progress.sample()
    assert progress.rate == 0
