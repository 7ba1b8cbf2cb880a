"""What several threads of pulls share is changed and read with its lock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cachd.errors import NotFound, Unavailable
from cachd.metrics import Metrics
from cachd.model import ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.supplier import Supply
from cachd.transfer.download.tally import Tally
from cachd.transfer.events import Meters
from cachd.transfer.origins import Origin, Origins
from cachd.transfer.pending import PendingSpecs
from cachd.transfer.progress import State
from cachd.transfer.request import Pull
from cachd.transfer.running import RunningPulls
from cachd.transfer.streams import StreamQuota
from tests.ground.counted import counted
from tests.test_downloads import AWAY, SMALL, Source, file_of, opened

REF = Ref.parse("hf://org/m")
BUSY = Unavailable("busy", code="origin_failed", origin_status=503)
Step = Callable[[], object]


def check_taken(owner: object, *steps: tuple[Step, int], name: str = "_lock") -> None:
    """Fail unless each step takes the lock of the owner so many times."""
    with counted(owner, name) as lock:
        for step, times in steps:
            before = lock.here
            step()
            assert lock.here - before == times


def served(origin: Origin) -> None:
    with origin.serving():
        pass


def test_origins() -> None:
    origins = Origins(lambda: 1000.0)
    origin = origins.of("https://host/x")
    check_taken(origins, (lambda: origins.of("https://host/x"), 1))
    check_taken(
        origin,
        (origin.begin, 1),
        (origin.end, 1),
        (lambda: served(origin), 2),
        (lambda: origin.refused(BUSY), 1),
    )
    with origin.serving():
        for _ in range(2):
            origin.refused(BUSY)
    check_taken(origin, (origin.allows, 1))


def test_meters() -> None:
    meters = Meters(Metrics())
    check_taken(meters, (lambda: meters.of(REF), 1))


def test_the_tally_of_a_download() -> None:
    tally = Tally(file_of(SMALL))
    check_taken(tally, (lambda: tally.add(5), 1), (lambda: tally.forget(2), 1), (lambda: tally.hedge(7), 1))
    assert (tally.fetched, tally.received, tally.hedged) == (5, 3, 7)


def test_running_pulls() -> None:
    running, pull = RunningPulls(), Pull(ModelSpec(REF, "m"))

    def without_repairs() -> None:
        with running.without_repairs("m"):
            assert not running.may_repair("m")

    running.add(pull)
    check_taken(
        running,
        (running.all, 1),
        (without_repairs, 2),
        (running.close, 2),
        (lambda: running.remove(pull), 1),
        name="changing",
    )
    assert running.may_repair("m")


def test_records_of_pulls(store: DiskStore) -> None:
    running, pull = RunningPulls(), Pull(ModelSpec(REF, "m"))
    pending = PendingSpecs(store, running)
    error = NotFound("absent", code="repo_not_found")
    check_taken(
        pending,
        (lambda: pending.record(pull), 1),
        (lambda: pending.note_begin(pull), 1),
        (lambda: pending.fail(pull, State.failed, error), 1),
        (lambda: pending.delete_failure("m"), 1),
        (lambda: pending.delete("m"), 1),
    )


def test_a_record_of_a_pull_that_runs_is_neither_failed_nor_deleted(store: DiskStore) -> None:
    running, pull, other = RunningPulls(), Pull(ModelSpec(REF, "m")), Pull(ModelSpec(REF, "m"))
    pending = PendingSpecs(store, running)
    pending.record(pull)
    running.add(other)
    pending.note_begin(pull)
    assert [each.began for each in pending.all()] == [0], "a newer one has its name"
    pending.fail(pull, State.failed, NotFound("absent", code="repo_not_found"))
    pending.delete("m")
    assert ([each.spec for each in pending.all()], pending.failed()) == ([pull.spec], [])
    pending.note_begin(other)
    assert [each.began for each in pending.all()] == [1]
    pending.note_clean_stop("m")
    assert [each.began for each in pending.all()] == [0]
    running.remove(other)
    pending.delete("m")
    assert pending.all() == []


def test_the_failure_of_a_name_that_is_pulled_again_stays(store: DiskStore) -> None:
    running, pull = RunningPulls(), Pull(ModelSpec(REF, "m"))
    pending = PendingSpecs(store, running)
    pending.fail(pull, State.cancelled, NotFound("absent", code="repo_not_found"))
    running.add(pull)
    pending.delete_failure("m")
    assert [each.progress.state for each in pending.failed()] == [State.cancelled]
    running.remove(pull)
    pending.delete_failure("m")
    assert pending.failed() == []


def test_downloads(store: DiskStore) -> None:
    with opened(store, streams=1) as ground:
        downloads, file = ground.downloads, file_of(SMALL)
        reservation = ground._stack.enter_context(store.space.reserve(1 << 20, total=1 << 20))

        def join() -> None:
            supply = Supply(Source(AWAY), REF, StreamQuota(), reservation, Outcomes())
            downloads.leave([downloads.join(file, supply)])

        check_taken(
            downloads,
            (lambda: downloads.hasten(file), 1),
            (lambda: downloads.claim(StreamQuota()), 1),
            (downloads.interrupt, 1),
        )
        downloads._interrupted = False
        with counted(downloads) as lock:
            join()
            assert sum(lock.taken.values()) == 2, "to join, and when the download is closed"


@pytest.mark.parametrize("number", ["1", None, 1.5, True, [1]])
def test_a_figure_of_a_failed_pull_that_cannot_be_read_is_0(store: DiskStore, number: object) -> None:
    pending = PendingSpecs(store, RunningPulls())
    pull = Pull(ModelSpec(REF, "m"), priority=3)
    pull.began_at, pull.ended_at, pull.retries = 5.0, 7.0, 2
    pull.progress.restore(4, 9)
    pending.fail(pull, State.failed, NotFound("absent", code="repo_not_found"))
    (found,) = pending.failed()
    figures = (found.priority, found.retries, found.progress.done, found.progress.total)
    assert (figures, found.began_at, found.ended_at) == ((3, 2, 4, 9), 5.0, 7.0)
    (record,) = store.pending.failed()
    wrong = {"priority": number, "retries": number, "done": number, "began_at": "x"}
    store.pending.fail(replace(record, ended={**record.ended, **wrong}))
    (found,) = pending.failed()
    assert (found.priority, found.retries, found.progress.done, found.began_at) == (0, 0, 0, None)
