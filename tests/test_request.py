"""One pull as an object: how it ends, who waits for it, and which pulls are remembered."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from cachd.errors import CachdError, Cancelled, Changed, Forbidden, NoSpace, Unavailable
from cachd.model import Digest, File, Manifest, ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.store.pending import PendingPull
from cachd.transfer.newest import MAX_REMEMBERED, NewestPulls
from cachd.transfer.pending import PendingSpecs, crash_loop
from cachd.transfer.progress import State
from cachd.transfer.request import Pull
from cachd.transfer.running import RunningPulls
from tests.ground.stored import publish

AWAY = Unavailable("away", code="origin_failed")
MANIFEST = Manifest("hf://org/m", "a" * 40, (File("x", 9, "hf://org/m/x", Digest("sha256", "0" * 64)),))


def asked(name: str = "m", ref: str = "hf://org/m") -> ModelSpec:
    return ModelSpec(Ref.parse(ref), name)


def ended(state: State, error: CachdError) -> Pull:
    pull = Pull(asked())
    pull.end(state, error)
    return pull


@pytest.mark.parametrize(
    ("state", "error", "may_be_retried"),
    [
        (State.failed, AWAY, True),
        (State.failed, NoSpace("full"), NoSpace("full").retryable),
        (State.failed, Forbidden("no", code="source_forbidden"), False),
        (State.failed, Changed("changed"), False),
        (State.cancelled, AWAY, False),
    ],
)
def test_only_a_failure_that_may_pass_is_retried(
    state: State, error: CachdError, may_be_retried: bool
) -> None:
    assert ended(state, error).may_be_retried is may_be_retried


def test_a_pull_that_runs_or_is_ready_is_not_retried(store: DiskStore) -> None:
    pull = Pull(asked())
    assert not pull.may_be_retried
    pull.end(State.ready, publish(store, {"x": b"x"}, "hf://org/m", "m"))
    assert not pull.may_be_retried
    assert (pull.error, pull.progress.state) == (None, State.ready)


def test_the_end_of_a_pull_is_shown_before_its_waiters_wake(store: DiskStore) -> None:
    pull, snapshot = Pull(asked()), publish(store, {"x": b"x"}, "hf://org/m", "m")
    pull.end(State.ready, snapshot)
    assert not pull.done.done()
    pull.wake(snapshot)
    assert pull.done.result(0) is snapshot
    failed = Pull.failed(asked(), AWAY)
    assert (failed.progress.state, failed.error, failed.done.exception(0)) == (State.failed, AWAY, AWAY)
    assert not failed.done.cancel()


def test_an_error_that_is_kept_holds_no_memory_of_where_it_was_raised() -> None:
    try:
        raise AWAY from ValueError("x")
    except Unavailable as error:
        kept = ended(State.failed, error).error
    assert kept is AWAY
    assert (kept.__traceback__, kept.__cause__, kept.__context__) == (None, None, None)


def test_a_cancelled_pull_says_whether_it_had_begun() -> None:
    pull = Pull(asked())
    assert not pull.is_cancelled
    assert pull.failure(AWAY) == (State.failed, AWAY)
    assert pull.cancelled().detail == "m: cancelled before it began"
    pull.began = 1.0
    assert pull.cancelled().detail == "m: cancelled while it waited"
    pull.cancel()
    assert pull.is_cancelled
    assert pull.failure(AWAY) == (State.cancelled, AWAY)


def test_a_pull_whose_manifest_is_refused_fails_with_that_refusal() -> None:
    refusal = Forbidden("refused", code="source_forbidden")

    def refuse(_: Manifest) -> None:
        raise refusal

    pull = Pull(asked())
    pull.refuse_by(refuse)
    assert not pull.is_cancelled, "it has no manifest yet"
    pull.progress.begin_download(MANIFEST, 9)
    pull.refuse_by(lambda _: None)
    assert not pull.is_cancelled
    pull.refuse_by(refuse)
    assert pull.is_cancelled
    assert pull.failure(Cancelled("x")) == (State.failed, refusal)


@pytest.mark.parametrize("pins", [True, False])
def test_a_request_that_joins_may_pin(pins: bool) -> None:
    pull = Pull(asked())
    assert (pull.joins, pull.retries, pull.permit.pins, pull.permit.replace) == (0, 0, False, False)
    pull.note_join(pins=pins)
    assert (pull.joins, pull.permit.pins) == (1, pins)
    pull.note_join(pins=False)
    assert (pull.joins, pull.permit.pins) == (2, pins), "a pin stays"


def test_a_retry_counts_those_before_it() -> None:
    first = Pull(asked())
    assert (first.priority, first.quota.priority) == (0, 0)
    second = Pull(asked(), after=first, priority=3, replace=True, pins=True)
    assert (second.retries, Pull(asked(), after=second).retries) == (1, 2)
    assert (second.priority, second.quota.priority) == (3, 3)
    assert (second.permit.replace, second.permit.pins) == (True, True)


@pytest.mark.parametrize(
    ("ref", "scheme", "host"),
    [
        ("https://host:8443/x", "https", "host:8443"),
        ("http://host/x", "http", "host"),
        ("hf://org/m", "hf", "hf"),
        ("s3://bucket/x", "s3", "s3"),
    ],
)
def test_pulls_of_one_web_server_or_of_one_scheme_have_the_same_host(
    ref: str, scheme: str, host: str
) -> None:
    pull = Pull(asked(ref=ref))
    assert (pull.scheme, pull.host) == (scheme, host)


# --- the running ones ---


def test_a_name_has_at_most_one_running_pull() -> None:
    running, first, second = RunningPulls(), Pull(asked()), Pull(asked())
    assert (len(running), running.of("m"), running.all()) == (0, None, [])
    running.add(first)
    assert (len(running), running.of("m"), running.all()) == (1, first, [first])
    running.add(second)
    running.remove(first)
    assert running.of("m") is second, "a newer one has its name"
    assert not running.is_closed
    assert running.close() == [second]
    assert running.is_closed
    running.remove(second)
    assert (len(running), running.of("m")) == (0, None)


def test_no_repair_starts_while_anybody_deletes_the_name() -> None:
    running = RunningPulls()
    assert running.may_repair("m")
    with running.without_repairs("m"):
        with running.without_repairs("m"):
            assert not running.may_repair("m")
            assert running.may_repair("other")
        assert not running.may_repair("m")
    assert running.may_repair("m")
    with pytest.raises(KeyError), running.without_repairs("m"):
        raise KeyError
    assert running.may_repair("m")


# --- the newest ones ---


def test_the_newest_pull_of_a_name_is_remembered_after_its_end(store: DiskStore) -> None:
    newest, first = NewestPulls(store), Pull(asked())
    assert (newest.of("m"), newest.unfinished("m"), newest.awaited("m", 1.0), newest.shown("m")) == (
        None,
    ) * 4
    newest.add(first)
    assert (newest.of("m"), newest.unfinished("m"), newest.shown("m")) == (first,) * 3
    assert newest.all_shown() == [first]
    for now in (5.0, 6.0):
        assert newest.awaited("m", now) is first
    assert first.awaited_since == 5.0
    first.end(State.failed, AWAY)
    first.wake(AWAY)
    assert (newest.of("m"), newest.unfinished("m"), newest.shown("m")) == (first, None, first)
    assert newest.awaited("m", 7.0) is None
    second = Pull(asked())
    newest.drop_if_newest(second)
    assert newest.of("m") is first
    newest.add(second)
    newest.drop_if_newest(first)
    assert newest.of("m") is second
    newest.drop_if_newest(second)
    assert newest.of("m") is None
    newest.drop("m")


def test_a_successful_pull_is_shown_while_its_snapshot_is_ready(store: DiskStore) -> None:
    newest, pull, other = NewestPulls(store), Pull(asked()), Pull(asked("a"))
    newest.add(pull)
    newest.add(other)
    snapshot = publish(store, {"x": b"x"}, "hf://org/m", "m")
    pull.end(State.ready, snapshot)
    assert newest.all_shown() == [other, pull]
    store.evict(snapshot.manifest)
    assert (newest.shown("m"), newest.of("m")) == (None, pull)
    assert newest.all_shown() == [other]


def test_a_bounded_number_of_ended_pulls_is_remembered(store: DiskStore) -> None:
    newest, pulls = NewestPulls(store), [Pull(asked(f"m-{number}")) for number in range(MAX_REMEMBERED + 1)]
    for pull in pulls:
        newest.add(pull)
    assert newest.count_ended(Pull(asked("m-0"))) == [], "an older pull of the name"
    for pull in pulls[:-1]:
        assert newest.count_ended(pull) == []
    assert newest.count_ended(pulls[0]) == [], "it counts once, as the newest now"
    assert newest.count_ended(pulls[-1]) == ["m-1"]
    assert (newest.of("m-1"), newest.of("m-0"), newest.of("m-2")) == (None, pulls[0], pulls[2])


def test_the_memory_of_ended_pulls_is_bounded_and_the_last_one_stays(store: DiskStore) -> None:
    newest = NewestPulls(store)
    large = [
        Pull(ModelSpec.asked("hf://org/m", f"m-{number}", include=("x" * 999,) * 30)) for number in range(200)
    ]
    found: list[str] = []
    for pull in large:
        newest.add(pull)
        found += newest.count_ended(pull)
    assert 0 < len(found) < 200
    assert found == [f"m-{number}" for number in range(len(found))]
    files = tuple(File(f"{n:05}", 1, f"hf://org/m/{n}", Digest("sha256", "0" * 64)) for n in range(17_000))
    huge = Pull(asked("huge"))
    huge.progress.begin_download(Manifest("hf://org/m", "a" * 40, files), 1)
    newest.add(huge)
    assert newest.count_ended(huge) == [f"m-{number}" for number in range(len(found), 200)]
    assert newest.of("huge") is huge


# --- on disk ---


@pytest.fixture
def pending(store: DiskStore) -> tuple[PendingSpecs, RunningPulls]:
    running = RunningPulls()
    return PendingSpecs(store, running), running


def test_a_pull_is_on_disk_until_it_ends(pending: tuple[PendingSpecs, RunningPulls]) -> None:
    specs, running = pending
    pull = Pull(asked(), replace=True, pins=True)
    specs.record(pull)
    (found,) = specs.all()
    assert (found.spec, found.replace, found.pins, found.began) == (pull.spec, True, True, 0)
    specs.note_begin(pull)
    assert specs.all()[0].began == 0, "it is not the running pull of its name"
    running.add(pull)
    for count in (1, 2):
        specs.note_begin(pull)
        assert specs.all()[0].began == count
    specs.note_clean_stop("m")
    assert specs.all()[0].began == 0
    specs.delete("m")
    assert len(specs.all()) == 1, "a pull of the name runs"
    running.remove(pull)
    specs.delete("m")
    assert specs.all() == []


def test_how_a_pull_failed_is_known_after_a_restart(pending: tuple[PendingSpecs, RunningPulls]) -> None:
    specs, running = pending
    pull = Pull(asked(), priority=4, replace=True)
    pull.retries, pull.began_at, pull.ended_at = 2, 5.0, 6.5
    pull.progress.restore(3, 9)
    pull.end(State.cancelled, AWAY)
    running.add(pull)
    specs.fail(pull, State.cancelled, AWAY)
    assert specs.failed() == []
    running.remove(pull)
    specs.fail(pull, State.cancelled, AWAY)
    (found,) = specs.failed()
    assert (found.spec, found.priority, found.retries) == (pull.spec, 4, 2)
    assert (found.began_at, found.ended_at, found.progress.state) == (5.0, 6.5, State.cancelled)
    assert (found.progress.done, found.progress.total) == (3, 9)
    assert (found.permit.replace, found.permit.pins) == (True, False)
    assert found.error is not None
    assert (found.error.code, found.error.detail) == (AWAY.code, AWAY.detail)
    assert found.done.exception(0) is found.error
    running.add(pull)
    specs.delete_failure("m")
    assert len(specs.failed()) == 1
    running.remove(pull)
    specs.delete_failure("m")
    assert specs.failed() == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda ended: ended.update(done="x", total=True, priority=None, retries=1.5), (0, 0, 0, 0)),
        (lambda ended: ended.update(began_at="x", ended_at=None), (3, 9, 0, 0)),
        (lambda ended: ended.update(state="unheard of", error="x"), (3, 9, 0, 0)),
    ],
)
def test_what_cannot_be_read_of_a_failure_is_nothing(
    store: DiskStore,
    pending: tuple[PendingSpecs, RunningPulls],
    change: Callable[[dict[str, object]], object],
    expected: tuple[int, ...],
) -> None:
    specs, _ = pending
    pull = Pull(asked())
    pull.progress.restore(3, 9)
    pull.end(State.failed, AWAY)
    specs.fail(pull, State.failed, AWAY)
    file = store.layout.failed("m")
    document = json.loads(file.read_text())
    change(document["ended"])
    file.write_text(json.dumps(document))
    (found,) = specs.failed()
    assert (found.progress.done, found.progress.total, found.priority, found.retries) == expected
    assert (found.began_at, found.ended_at, found.progress.state) == (None, None, State.failed)
    assert found.error is not None


@pytest.mark.parametrize(("deaths", "is_loop"), [(0, False), (2, False), (3, True), (4, True)])
def test_a_pull_is_not_resumed_after_three_deaths_of_the_daemon(deaths: int, is_loop: bool) -> None:
    error = crash_loop(PendingPull(asked(), replace=False, pins=False, began=deaths))
    assert (error is not None) is is_loop
    if error is not None:
        assert error.facts["deaths"] == deaths
        assert f"died {deaths} times" in error.detail
