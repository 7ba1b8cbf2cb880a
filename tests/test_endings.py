"""What the end of a pull leaves: in the metrics, on disk, and for whoever waits."""

from __future__ import annotations

import errno

import pytest

from cachd.errors import CachdError, Cancelled, DiskFailed, NoSpace, TooBig, Unavailable
from cachd.metrics import Metrics
from cachd.model import ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.transfer.endings import Endings
from cachd.transfer.newest import NewestPulls
from cachd.transfer.pending import PendingSpecs
from cachd.transfer.progress import State
from cachd.transfer.request import Pull
from cachd.transfer.running import RunningPulls
from tests.ground.stored import publish

SPEC = ModelSpec(Ref.parse("hf://org/m"), "m")
AWAY = Unavailable("away", code="origin_failed")


class Ground:
    """The ends of a store's pulls, at the time 50."""

    def __init__(self, store: DiskStore) -> None:
        self.store, self.metrics, self.running = store, Metrics(), RunningPulls()
        self.newest, self.pending = NewestPulls(store), PendingSpecs(store, self.running)
        self.endings = Endings(
            store,
            self.running,
            self.newest,
            self.pending,
            self.metrics,
            clock=lambda: 50.0,
            now=lambda: 1000.0,
        )

    def begin(self) -> Pull:
        pull = Pull(SPEC)
        pull.began = 20.0
        self.running.add(pull)
        self.newest.add(pull)
        self.pending.record(pull)
        self.store.content.owners.expect("m")
        return pull

    def total(self, metric: str) -> float:
        """The sum of all samples of a metric."""
        lines = self.metrics.text().decode().splitlines()
        found = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return sum(float(value) for name, _, value in found if name.partition("{")[0] == metric)


@pytest.fixture
def ground(store: DiskStore) -> Ground:
    return Ground(store)


def test_a_ready_pull_wakes_its_waiters_and_is_no_longer_pending(ground: Ground) -> None:
    pull, snapshot = ground.begin(), publish(ground.store, {"x": b"x" * 9}, "hf://org/m", "m")
    pull.progress.begin_download(ground.store.manifests.of(snapshot), 9)
    pull.note_join(pins=False)
    pull.note_join(pins=False)
    pull.awaited_since = 40.0
    ground.endings.end(pull, State.ready, snapshot)
    assert pull.done.result(0) is snapshot
    assert (pull.progress.state, pull.ended_at) == (State.ready, 1000.0)
    assert (ground.running.of("m"), ground.newest.of("m"), ground.pending.all()) == (None, pull, [])
    assert ground.total("cachd_saved_bytes_total") == 2 * 9
    assert ground.total("cachd_ready_wait_seconds_sum") == 10.0
    assert ground.total("cachd_pull_duration_seconds_sum") == 30.0
    used = ground.store.usage_log.of("m")
    assert used is not None
    assert used.last == 1000.0


def test_a_failed_pull_is_known_after_a_restart(ground: Ground) -> None:
    pull = ground.begin()
    ground.endings.end(pull, State.failed, AWAY)
    assert pull.done.exception(0) is AWAY
    assert ground.pending.all() == []
    (found,) = ground.pending.failed()
    assert (found.spec, found.ended_at) == (SPEC, 1000.0)
    assert ground.total("cachd_saved_bytes_total") == 0
    later = Ground(ground.store)
    later.endings.show_earlier()
    shown = later.newest.of("m")
    assert shown is not None
    assert shown.progress.state is State.failed
    later.endings.show_earlier()
    assert later.newest.of("m") is shown, "a pull that is known stays"


@pytest.mark.parametrize(
    ("error", "failures", "full"),
    [
        (AWAY, 0, 0),
        (DiskFailed("disk", errno=errno.EIO), 1, 0),
        (NoSpace("full"), 0, 1),
        (TooBig("large"), 0, 1),
    ],
)
def test_failures_of_the_disk_and_a_full_one_are_counted(
    ground: Ground, error: CachdError, failures: int, full: int
) -> None:
    ground.endings.end(ground.begin(), State.failed, error)
    assert ground.metrics.disk_failures._value.get() == failures
    assert ground.metrics.no_space._value.get() == full


def test_a_pull_that_another_one_replaced_ends_with_that_reason(ground: Ground) -> None:
    pull = ground.begin()
    pull.permit.revoke()
    newer = ground.begin()
    ground.endings.end(pull, State.cancelled, Cancelled("x"))
    assert isinstance(pull.error, CachdError)
    assert pull.error.detail != "x"
    assert (ground.running.of("m"), ground.newest.of("m")) == (newer, newer)
    assert len(ground.pending.all()) == 1, "the newer one is still pending"
    assert ground.pending.failed() == []


def test_a_pull_that_the_stop_of_the_daemon_cancels_is_resumed(ground: Ground) -> None:
    pull = ground.begin()
    ground.pending.note_begin(pull)
    ground.running.close()
    ground.endings.end(pull, State.cancelled, Cancelled("x"))
    assert (pull.progress.state, pull.error and pull.error.code) == (State.queued, "interrupted")
    (found,) = ground.pending.all()
    assert (found.spec, found.began) == (SPEC, 0)


def test_a_pull_that_is_cancelled_in_the_queue_says_so(ground: Ground) -> None:
    pull = ground.begin()
    pull.began = None
    pull.cancel()
    ground.endings.end_cancelled(pull)
    assert pull.progress.state is State.cancelled
    assert pull.error is not None
    assert pull.error.detail == "m: cancelled before it began"
    assert [each.progress.state for each in ground.pending.failed()] == [State.cancelled]
