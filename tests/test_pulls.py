"""Pulls are started, joined, replaced, cancelled and resumed; and what each of that leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from structlog.contextvars import bound_contextvars

from cachd.errors import (
    Busy,
    CachdError,
    Cancelled,
    DaemonDied,
    DiskFailed,
    Forbidden,
    InUse,
    Invalid,
    NotFound,
)
from cachd.model import Manifest, ModelSpec, Snapshot
from cachd.transfer.progress import State
from cachd.transfer.pulls import Pulls
from cachd.transfer.request import Pull
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.pause import at_event
from tests.ground.site import until

SMALL, OTHER = noise(3 << 10), noise(5 << 10, seed=2)
Engines = Callable[..., Engine]


@pytest.fixture
def on(engine: Engines) -> Engine:
    return engine(retries=0, pulls=2, queued_pulls=2, streams=2)


def add(origin: Origin, path: str = "m", content: bytes = SMALL, *, name: str = "m") -> ModelSpec:
    return spec_of(origin.add(f"/{path}", content), name=name)


@contextmanager
def held(on: Engine, origin: Origin, path: str = "held", *, name: str = "m", **how: bool) -> Iterator[Pull]:
    """A pull of `name` whose origin sends no byte of its file until the end of the block."""
    spec, hold = add(origin, path, name=name), origin.hold(f"/{path}", after=0)
    pull = on.begin(spec, **how)
    assert hold.reached.wait(PATIENCE_SECONDS)
    try:
        yield pull
    finally:
        hold.release()


def ended(pull: Pull | None) -> CachdError | None:
    """The error in which a pull has ended; None if it is ready."""
    assert pull is not None
    error = pull.done.exception(PATIENCE_SECONDS)
    assert error is pull.error
    return pull.error


def count(metric: object) -> float:
    value: float = metric._value.get()  # type: ignore[attr-defined]
    return value


def pending(on: Engine) -> set[str]:
    return {path.name for path in on.store.layout.pending.iterdir()}


def marked(on: Engine) -> set[str]:
    return on.store.changes.take(0)


# --- start ---


def test_a_model_that_is_ready_is_pulled_again_only_if_it_is_asked_anew(on: Engine, origin: Origin) -> None:
    spec = add(origin)
    assert ended(on.pulls.start(spec)) is None
    assert (count(on.metrics.misses), count(on.metrics.hits), count(on.metrics.saved_bytes)) == (1, 0, 0)
    usage = on.store.usage_log.of("m")
    assert usage is not None
    before = usage.last
    assert on.pulls.start(spec) is None
    assert (count(on.metrics.hits), count(on.metrics.saved_bytes)) == (1, len(SMALL))
    used = on.store.usage_log.of("m")
    assert used is not None
    assert used.last > before
    again = on.pulls.start(spec, refresh=True)
    assert ended(again) is None
    assert on.pulls.get("m") is again
    assert (count(on.metrics.misses), count(on.metrics.hits), count(on.metrics.joins)) == (2, 1, 0)


@pytest.mark.parametrize("pins", [False, True])
def test_a_request_for_what_is_being_pulled_joins_it(on: Engine, origin: Origin, pins: bool) -> None:
    with held(on, origin) as pull:
        assert marked(on) >= {"m"}
        assert on.pulls.start(pull.spec, pins=pins) is pull
        assert pull.priority == 0
        assert (pull.joins, pull.permit.pins, count(on.metrics.joins)) == (1, pins, 1)
        assert (on.pulls.get("m"), on.pulls.known(), on.pulls.running()) == (pull, [pull], [pull])
        assert (on.pulls.at_work(), pending(on)) == ([pull], {"m.json", "m.began"})
        for _ in range(2):
            assert on.pulls.awaited("m") is pull
        assert pull.awaited_since is not None
    assert ended(pull) is None
    assert (on.pulls.running(), on.pulls.awaited("m"), pending(on)) == ([], None, set())
    until(lambda: not on.pulls.at_work())


def test_a_name_that_another_model_has_is_taken_only_by_force(on: Engine, origin: Origin) -> None:
    assert ended(on.pulls.start(add(origin))) is None
    other = add(origin, "other", OTHER)
    with pytest.raises(InUse):
        on.pulls.start(other)
    replacing = on.begin(other, priority=3, replace=True, pins=True)
    assert (replacing.priority, replacing.permit.replace, replacing.permit.pins) == (3, True, True)
    assert ended(replacing) is None
    ready = on.store.names.get("m")
    assert ready is not None
    assert ready.spec == other


def test_a_pull_that_is_replaced_ends_and_the_next_one_runs(on: Engine, origin: Origin) -> None:
    with held(on, origin) as first:
        other = add(origin, "other", OTHER)
        with pytest.raises(InUse):
            on.pulls.start(other)
        second = on.begin(other, replace=True)
        assert (first.is_cancelled, on.pulls.get("m")) == (True, second)
        assert isinstance(ended(first), CachdError)
        assert ended(second) is None
    assert on.pulls.get("m") is second


def test_when_the_ready_model_is_asked_for_the_pull_that_would_replace_it_ends(
    on: Engine, origin: Origin
) -> None:
    ready = add(origin)
    assert ended(on.pulls.start(ready)) is None
    with held(on, origin, replace=True) as pull:
        assert on.pulls.start(ready, replace=True) is None
        assert count(on.metrics.hits) == 1
        assert isinstance(ended(pull), CachdError)
        assert on.pulls.get("m") is None
    snapshot = on.store.names.get("m")
    assert snapshot is not None
    assert snapshot.spec == ready


def test_one_more_than_may_run_and_wait_is_refused_and_a_queued_one_ends_at_once(
    on: Engine, origin: Origin
) -> None:
    with held(on, origin, "a", name="a") as first, held(on, origin, "b", name="b") as second:
        third, fourth = (on.begin(add(origin, name, name=name)) for name in "cd")
        assert set(on.pulls.at_work()) == {first, second}
        with pytest.raises(Busy) as refusal:
            on.pulls.start(add(origin, "e", name="e"))
        assert "2 pulls are waiting" in refusal.value.detail
        assert on.pulls.start(third.spec) is third, "to join one needs no place"
        assert on.pulls.cancel("c") is third
        assert third.done.done(), "it was queued: no thread must end it"
        assert (third.progress.state, isinstance(third.error, Cancelled)) == (State.cancelled, True)
        assert on.pulls.stop("d") is fourth
        assert fourth.done.done()
        fifth = on.begin(add(origin, "e", name="e"))
        sixth = on.begin(add(origin, "f", name="e"), replace=True)
        assert fifth.done.done()
    assert [ended(each) for each in (first, second, sixth)] == [None] * 3


def test_a_pull_whose_spec_cannot_be_kept_on_disk_fails_at_once(on: Engine, origin: Origin) -> None:
    shutil.rmtree(on.store.layout.pending)
    with pytest.raises(DiskFailed) as refusal:
        on.pulls.start(add(origin))
    pull = on.pulls.get("m")
    assert pull is not None
    assert (pull.error, pull.progress.state, on.pulls.running()) == (refusal.value, State.failed, [])


def test_a_hit_ends_the_show_of_a_later_failure(on: Engine, origin: Origin) -> None:
    ready = add(origin)
    assert ended(on.pulls.start(ready)) is None
    lost = spec_of(f"{origin.url}/nothing", name="m")
    assert isinstance(ended(on.pulls.start(lost, replace=True)), NotFound)
    assert pending(on) == {"m.failed"}
    assert on.pulls.start(ready, replace=True) is None
    assert (on.pulls.get("m"), pending(on)) == (None, set())


def test_what_cachd_asks_by_itself_begins_only_while_it_is_wanted(on: Engine, origin: Origin) -> None:
    lost = spec_of(f"{origin.url}/nothing", name="m")
    failed = on.begin(lost)
    assert isinstance(ended(failed), NotFound)
    retry = on.pulls.start(lost, retried=failed)
    assert retry is not None
    assert retry.retries == 1
    ended(retry)
    assert on.pulls.start(lost, retried=failed) is None, "another pull is the newest by now"
    assert on.pulls.start(lost, repairs=True) is None, "it is not quarantined"
    assert on.pulls.start_by_itself(lost, repairs=True) is None
    own = on.pulls.start_by_itself(lost, priority=4, replace=True)
    assert own is not None
    assert (own.priority, own.permit.replace) == (4, True)
    ended(own)


# --- after a restart ---


def test_unfinished_pulls_are_resumed_and_one_that_killed_the_daemon_is_not(
    on: Engine, origin: Origin
) -> None:
    good, bad, other = (add(origin, name, name=name) for name in ("good", "bad", "other"))
    on.store.pending.remember(good, replace=True, pins=True)
    on.store.pending.remember(bad)
    for _ in range(3):
        on.store.pending.begins("bad")
    with bound_contextvars(who="somebody"):
        on.pulls.resume()
    resumed, died = on.pulls.get("good"), on.pulls.get("bad")
    assert resumed is not None
    assert (resumed.asked_by, resumed.permit.replace, resumed.permit.pins) == ("cachd:restart", True, True)
    assert ended(resumed) is None
    assert isinstance(ended(died), DaemonDied)
    assert "bad.json" in pending(on), "so that the next start shows it, too"
    with pytest.raises(DaemonDied):
        on.pulls.start_by_itself(bad)
    own = on.pulls.start_by_itself(other)
    assert own is not None
    assert (own.priority, ended(own)) == (0, None)
    assert ended(on.pulls.start(bad)) is None, "somebody asks for it"
    assert on.pulls.start_by_itself(bad) is None


def test_a_resumed_pull_does_not_wait_for_somebody_and_failed_ones_are_shown(
    engine: Engines, origin: Origin
) -> None:
    first = engine(retries=0)
    lost = spec_of(f"{origin.url}/nothing", name="lost")
    assert isinstance(ended(first.pulls.start(lost)), NotFound)
    known = first.store.pending.failed()
    assert [each.spec for each in known] == [lost]
    first.pulls._newest.drop("lost")
    assert first.pulls.get("lost") is None
    first.pulls.resume()
    shown = first.pulls.get("lost")
    assert shown is not None
    assert (shown.spec, shown.progress.state) == (lost, State.failed)


def test_a_start_removes_replaced_snapshots_that_somebody_had_open(engine: Engines, origin: Origin) -> None:
    on = engine(retries=0, keep_previous=0)
    assert ended(on.pulls.start(add(origin))) is None
    with (on.store.layout.model("m") / "m").open("rb"):
        assert ended(on.pulls.start(add(origin, "other", OTHER), replace=True)) is None
        until(lambda: not on.pulls.at_work())
        on.pulls.resume()
        assert len(list(on.store.manifests.with_names())) == 2
    on.pulls.resume()
    assert len(list(on.store.manifests.with_names())) == 1


def test_after_an_interrupt_nothing_starts_and_what_ran_is_still_pending(on: Engine, origin: Origin) -> None:
    assert not on.pulls.are_stopping
    with held(on, origin) as pull:
        on.pulls.interrupt()
        assert on.pulls.are_stopping
        error = ended(pull)
        assert (error and error.code, pull.progress.state) == ("interrupted", State.queued)
        with pytest.raises(Busy) as refusal:
            on.pulls.start(add(origin, "other"))
        assert refusal.value.code == "stopping"
        with pytest.raises(Cancelled):
            on.pulls.previews.resolve(pull.spec)
    on.pulls.close()
    assert pending(on) == {"m.json"}
    assert not [thread for thread in on.pulls._runner._threads if thread.is_alive()]


# --- the end of a pull, and of a model ---


def test_only_a_known_name_can_be_cancelled_stopped_or_deleted(on: Engine, origin: Origin) -> None:
    calls: list[Callable[[Pulls, str], object]] = [Pulls.cancel, Pulls.stop, Pulls.delete]
    for call in calls:
        with pytest.raises(NotFound):
            call(on.pulls, "m")
    pull = on.begin(add(origin))
    ended(pull)
    with pytest.raises(NotFound) as refusal:
        on.pulls.stop("m")
    assert refusal.value.code == "no_pull"
    assert on.pulls.cancel("m") is pull, "it has ended"
    assert on.store.names.has("m")


def test_a_stopped_pull_leaves_the_ready_snapshot(on: Engine, origin: Origin) -> None:
    ended(on.pulls.start(add(origin)))
    with held(on, origin, replace=True) as pull:
        assert on.pulls.stop("m") is pull
        assert isinstance(ended(pull), Cancelled)
    assert on.store.names.has("m")


def test_a_deleted_model_leaves_nothing(on: Engine, origin: Origin) -> None:
    assert ended(on.pulls.start(add(origin))) is None
    on.store.pins.add("m")
    with pytest.raises(InUse):
        on.pulls.delete("m")
    assert on.store.names.has("m")
    marked(on)
    assert on.pulls.delete("m", force=True) >= len(SMALL)
    assert (on.pulls.get("m"), on.store.names.has("m"), on.store.pins.has("m")) == (None, False, False)
    assert "m" in marked(on)
    with pytest.raises(NotFound):
        on.pulls.delete("m")


def test_a_delete_ends_the_pull_and_frees_what_it_had_fetched(on: Engine, origin: Origin) -> None:
    files = {"a.bin": SMALL, "b.bin": OTHER}
    ref, hold = origin.add_model("shelf", files), origin.hold("/shelf/b.bin", after=9)
    pull = on.begin(spec_of(ref, name="m"))
    assert hold.reached.wait(PATIENCE_SECONDS)
    until(lambda: pull.progress.done >= len(SMALL))
    until(lambda: any(on.store.layout.blobs.rglob("*/*")))
    assert on.pulls.delete("m") >= len(SMALL)
    hold.release()
    assert isinstance(ended(pull), Cancelled)
    assert (on.pulls.running(), pending(on)) == ([], set())
    assert on.pulls.get("m") is None


def test_a_failed_pull_that_is_deleted_is_not_shown_after_a_restart(on: Engine, origin: Origin) -> None:
    ended(on.pulls.start(spec_of(f"{origin.url}/nothing", name="m")))
    assert pending(on) == {"m.failed"}
    assert on.pulls.delete("m") == 0
    assert pending(on) == set()


def test_an_evicted_model_that_is_deleted_is_unknown(on: Engine, origin: Origin) -> None:
    pull = on.begin(add(origin))
    ended(pull)
    on.pulls._newest.drop("m")
    snapshot = on.store.names.ready("m")
    on.store.evict(snapshot.manifest)
    assert on.pulls.cancel("m") is None
    assert on.pulls.delete("m") == 0
    with pytest.raises(NotFound):
        on.pulls.cancel("m")


def test_a_rollback_is_refused_while_the_name_is_pulled(engine: Engines, origin: Origin) -> None:
    on = engine(retries=0, keep_previous=1)
    before = add(origin)
    assert ended(on.pulls.start(before)) is None
    with held(on, origin, replace=True) as pull:
        with pytest.raises(InUse) as refusal:
            on.pulls.rollback("m")
        assert refusal.value.code == "name_busy"
    assert ended(pull) is None
    assert on.pulls.rollback("m").spec == before
    with pytest.raises(NotFound):
        on.pulls.rollback("other")


def test_a_rollback_waits_for_the_end_of_a_publish(engine: Engines, origin: Origin) -> None:
    on = engine(retries=0, keep_previous=1)
    before, after = add(origin), add(origin, "after", OTHER)
    assert ended(on.pulls.start(before)) is None
    with ThreadPoolExecutor(1) as pool:
        rolling: list[Future[Snapshot]] = []

        def roll_back() -> None:
            rolling.append(pool.submit(on.pulls.rollback, "m"))
            (pull,) = on.pulls.running()
            until(lambda: pull.done._waiters or rolling[0].done())

        with at_event("published", roll_back):
            assert ended(on.pulls.start(after, replace=True)) is None
        assert rolling[0].result(PATIENCE_SECONDS).spec == before


def refuse(_: Manifest) -> None:
    raise Forbidden("refused", code="source_forbidden")


def test_running_pulls_whose_manifest_is_refused_fail(on: Engine, origin: Origin) -> None:
    with held(on, origin) as pull:
        on.pulls.end_refused(lambda _: None)
        assert not pull.is_cancelled
        on.pulls.end_refused(refuse)
        error = ended(pull)
    assert (error and error.detail, pull.progress.state) == ("refused", State.failed)


def test_a_model_is_shown_as_failed_unless_it_is_being_pulled(on: Engine, origin: Origin) -> None:
    spec = add(origin)
    with held(on, origin) as pull:
        on.pulls.show_as_failed(spec, Invalid("no such thing"))
        assert on.pulls.get("m") is pull
    ended(pull)
    marked(on)
    on.pulls.show_as_failed(spec, Invalid("no such thing"))
    shown = on.pulls.get("m")
    assert shown is not None
    assert (shown.spec, shown.error and shown.error.detail, marked(on)) == (spec, "no such thing", {"m"})
