"""A queued pull is attempted by a thread until it ends; an attempt that may succeed later is repeated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any, cast

import pytest
import structlog

from cachd.errors import CachdError, Cancelled, Forbidden, NotFound, Unavailable
from cachd.metrics import Metrics
from cachd.model import Digest, Extent, File, Limits, Manifest, ModelSpec, Percentage, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.schemes import Sources
from cachd.sources.table import Table
from cachd.store.disk_store import DiskStore
from cachd.transfer.attempt import PullContext
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.downloads import Downloads
from cachd.transfer.endings import Endings
from cachd.transfer.engine import Engine
from cachd.transfer.newest import NewestPulls
from cachd.transfer.pending import PendingSpecs
from cachd.transfer.progress import State
from cachd.transfer.reclaim import Reclaim
from cachd.transfer.request import Pull
from cachd.transfer.resolves import Resolves
from cachd.transfer.runner import Runner
from cachd.transfer.running import RunningPulls
from cachd.transfer.space_watch import EvictionRules
from cachd.transfer.streams import Streams
from cachd.transfer.waits import Reason
from tests.ground.site import until
from tests.ground.stored import sha256
from tests.ground.weights import lfs_pointer
from tests.shelf import ShelfBody, ShelfSource

PATIENCE_SECONDS = 120.0
NOW = 5000.0
FILES = {"a.bin": b"a" * 100, "b.bin": b"b" * 9}
RULES = EvictionRules(Percentage(100), Percentage(90), 0.0, automatic=False)
SPEC = ModelSpec(Ref.parse("hf://org/m"), "m")


class Scripted(ShelfSource):
    """A source of `files`. Each of `answers` is raised, or called, by one resolve; the last by all others."""

    def __init__(self, files: Mapping[str, bytes] = FILES, *, states_digests: bool = True) -> None:
        self.files, self._states_digests = files, states_digests
        self.answers: list[Exception | Callable[[CancelToken], object]] = [lambda _: None]
        self.resolves, self.revision = 0, "a" * 40

    def manifest(self, ref: Ref) -> Manifest:
        files = [
            File(path, len(content), f"{ref.base}/{path}", sha256(content) if self._states_digests else None)
            for path, content in self.files.items()
        ]
        return Manifest(ref.base, self.revision, tuple(files))

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        self.resolves += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        answer(cancel_token)
        return self.manifest(ref)

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        return ShelfBody(self.files[file.path][extent.start : extent.stop])


class Only:
    """Has the same source for every ref, as a daemon whose `Sources` know no other would."""

    def __init__(self, source: ShelfSource) -> None:
        self._source = source

    def of(self, _ref: Ref) -> ShelfSource:
        return self._source


class Ground:
    """What pulls share, over a real store and one scripted source. Its clocks stand still."""

    def __init__(self, store: DiskStore, source: ShelfSource, stack: ExitStack) -> None:
        self.store, self.source, self.metrics, self.table = store, source, Metrics(), Table()
        self.sources = cast(Sources, Only(source))
        streams, bandwidth = Streams(2, first=2), Bandwidth(Limits(), self.metrics)
        self.engine = stack.enter_context(closing(Engine(streams, bandwidth, self.metrics, retries=0)))
        resolves = stack.enter_context(closing(Resolves(600.0, stall_seconds=60.0)))
        self.context = PullContext(
            store,
            Reclaim(store, self.metrics, RULES),
            Downloads(store.content, self.engine),
            resolves,
            lambda: self.table,
            clock=lambda: 70.0,
            now=lambda: NOW,
        )


class Running(Ground):
    """Pulls of one scripted source, that a runner with one slot runs."""

    source: Scripted

    def __init__(self, store: DiskStore, source: Scripted, stack: ExitStack) -> None:
        super().__init__(store, source, stack)
        self.running, self.newest = RunningPulls(), NewestPulls(store)
        self.pending = PendingSpecs(store, self.running)
        endings = Endings(store, self.running, self.newest, self.pending, self.metrics)
        self.runner = Runner(
            self.context,
            self.sources,
            self.metrics,
            endings,
            self.pending,
            at_once=1,
            chance=lambda: 0.0,
        )
        stack.callback(self.runner.join, PATIENCE_SECONDS)
        stack.callback(self.runner.interrupt)

    def start(self, spec: ModelSpec = SPEC, *, is_cancelled: bool = False) -> Pull:
        pull = Pull(spec)
        self.running.add(pull)
        self.newest.add(pull)
        self.pending.record(pull)
        if is_cancelled:
            pull.cancel()
        self.runner.start(pull)
        return pull

    def ended(self, spec: ModelSpec = SPEC) -> Pull:
        """A pull that has ended."""
        pull = self.start(spec)
        pull.done.exception(PATIENCE_SECONDS)
        until(lambda: not self.runner.at_work())
        return pull

    def figure(self, name: str) -> float:
        return float(getattr(self.metrics, name)._value.get())


Runners = Callable[..., Running]


@pytest.fixture
def runner(store: DiskStore) -> Iterator[Runners]:
    with ExitStack() as stack:

        def made(**how: Any) -> Running:
            return Running(store, Scripted(**how), stack)

        yield made


def away(*, status: int | None = None, code: str = "origin_failed", after: float = 0.0) -> Unavailable:
    return Unavailable("away", code=code, origin_status=status, retry_after=after)


def test_a_pull_that_succeeds_is_ready_and_leaves_its_slot(runner: Runners) -> None:
    on = runner()
    pull = on.ended()
    snapshot = pull.done.result(0)
    assert (pull.progress.state, pull.began, pull.began_at) == (State.ready, 70.0, NOW)
    assert snapshot.published_at == NOW == on.figure("last_pull")
    assert (on.runner.waiting, on.figure("pulls_in_progress"), on.figure("pull_queue_length")) == (0, 0, 0)
    assert (on.source.resolves, on.pending.all()) == (1, [])


def test_a_pull_that_runs_is_counted_and_one_more_waits(runner: Runners) -> None:
    on, go_on = runner(), threading.Event()
    on.source.answers = [lambda _: go_on.wait(PATIENCE_SECONDS)]
    first = on.start()
    until(lambda: on.source.resolves)
    assert "m" in on.store.changes.take(0)
    second = on.start(ModelSpec(SPEC.ref, "other"))
    assert (on.runner.at_work(), on.runner.waiting) == ([first], 1)
    assert (on.figure("pulls_in_progress"), on.figure("pull_queue_length")) == (1, 1)
    assert {each.spec.name: each.began for each in on.pending.all()} == {"m": 1, "other": 0}
    go_on.set()
    for each in (first, second):
        assert each.done.result(PATIENCE_SECONDS).manifest


@pytest.mark.parametrize("failures", [4, 5])
def test_a_source_that_is_away_is_asked_four_times_more(runner: Runners, failures: int) -> None:
    on, errors = runner(), [away() for _ in range(failures)]
    on.source.answers = [*errors, lambda _: None]
    pull = on.ended()
    assert (pull.failed_resolves, on.source.resolves) == (4, 5)
    assert pull.error is (errors[-1] if failures == 5 else None)
    assert pull.began_at == NOW


@pytest.mark.parametrize(
    ("error", "is_serving", "is_failure"),
    [
        (away(status=503), True, False),
        (away(status=429), True, False),
        (away(status=500), True, True),
        (away(status=503), False, True),
        (away(code="rate_limited"), False, False),
        (away(code="rate_limited", status=429), False, True),
    ],
    ids=["busy", "rate limited", "broken", "busy with others", "a pause", "not asked for a pause"],
)
def test_an_origin_that_serves_other_pulls_or_wants_a_pause_has_not_failed(
    runner: Runners, error: Unavailable, is_serving: bool, is_failure: bool
) -> None:
    on = runner()
    on.source.answers = [*[error] * 6, lambda _: None]
    with ExitStack() as stack:
        if is_serving:
            stack.enter_context(on.engine.streams.origins.of(SPEC.ref.base).serving())
        pull = on.ended()
    assert (pull.error, pull.failed_resolves) == ((error, 4) if is_failure else (None, 0))


def test_a_pull_whose_source_is_away_says_so_and_can_be_cancelled_while_it_waits(runner: Runners) -> None:
    on = runner()
    on.source.answers = [away(after=30.0)]
    pull = on.start()
    until(lambda: pull.progress.state is State.waiting and on.runner.waiting)
    waits = pull.progress.waits(pull.progress.now)
    assert waits is not None
    assert (waits.reason, waits.until, waits.detail) == (Reason.origin, NOW + 30.0, "away")
    assert pull.progress.state is State.waiting
    assert "m" in on.store.changes.take(0)
    on.runner.end_if_cancelled(pull)
    assert not pull.done.done(), "nobody has cancelled it"
    pull.cancel()
    on.runner.end_if_cancelled(pull)
    assert isinstance(pull.done.exception(0), Cancelled)
    assert (pull.progress.state, on.runner.waiting) == (State.cancelled, 0)


def test_a_pull_that_was_cancelled_before_it_was_queued_asks_nobody(runner: Runners) -> None:
    on = runner()
    pull = on.start(is_cancelled=True)
    assert isinstance(pull.done.exception(PATIENCE_SECONDS), Cancelled)
    assert (pull.progress.state, on.source.resolves) == (State.cancelled, 0)


def test_a_final_error_ends_the_pull_and_is_not_tried_again(runner: Runners) -> None:
    on, error = runner(), NotFound("absent", code="repo_not_found")
    on.source.answers = [error]
    pull = on.ended()
    assert (pull.error, pull.progress.state, on.source.resolves) == (error, State.failed, 1)
    assert on.figure("last_pull") == 0


def test_an_error_of_cachd_itself_ends_the_pull_and_no_thread(runner: Runners) -> None:
    on = runner()
    on.source.answers = [ZeroDivisionError("secret"), lambda _: None]
    pull = on.ended()
    assert type(pull.error) is CachdError
    assert (pull.error.detail, pull.progress.state) == ("m: ZeroDivisionError", State.failed)
    assert on.ended().progress.state is State.ready
    assert on.figure("pulls_in_progress") == 0


def test_the_bytes_of_a_model_that_the_operator_refuses_are_freed(runner: Runners) -> None:
    on = runner(states_digests=False)
    on.table = Table(refuse=[str(sha256(FILES["b.bin"]))])
    pull = on.ended()
    assert isinstance(pull.error, Forbidden)
    assert (pull.error.code, pull.progress.state) == ("refused_digest", State.failed)
    assert not [path for path in on.store.layout.blobs.rglob("*") if path.is_file()]


def test_the_bytes_of_a_model_that_fails_otherwise_stay(runner: Runners) -> None:
    on = runner(files={"a.bin": b"a" * 100, "model.safetensors": lfs_pointer(b"a")})
    assert on.ended().progress.state is State.failed
    assert [path for path in on.store.layout.blobs.rglob("*") if path.is_file()]


def test_a_thread_that_hangs_is_waited_for_no_longer_than_the_caller_says(runner: Runners) -> None:
    on, go_on = runner(), threading.Event()
    on.source.answers = [lambda _: go_on.wait(PATIENCE_SECONDS)]
    pull = on.start()
    until(lambda: on.source.resolves)
    on.runner.interrupt()
    with structlog.testing.capture_logs() as logs:
        on.runner.join(0.0)
    assert logs
    assert not pull.done.done()
    go_on.set()
    assert pull.done.result(PATIENCE_SECONDS).manifest
    with structlog.testing.capture_logs() as logs:
        on.runner.join(PATIENCE_SECONDS)
    assert not [each for each in logs if "did not end" in each["event"]]
    assert not [thread for thread in on.runner._threads if thread.is_alive()]


def test_a_digest_that_is_not_refused_is_no_matter(runner: Runners) -> None:
    on = runner(states_digests=False)
    on.table = Table(refuse=[str(Digest("sha256", "0" * 64))])
    assert on.ended().progress.state is State.ready
