"""What several threads use at once: while one of them has its lock, every call of the others waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from cachd.errors import CachdError, DiskFailed, Unavailable
from cachd.kernel import threads
from cachd.kernel.durable import Notes
from cachd.model import Digest, Extent, File, ModelSpec, Ref
from cachd.store.changes import Changes
from cachd.store.content.claims import Claims
from cachd.store.content.offers import Offers
from cachd.store.content.owners import Owners
from cachd.store.copies import Copies
from cachd.store.digests import PartHash
from cachd.store.disk_store import DiskStore
from cachd.store.hashes import Hashes
from cachd.store.ingest.about import About
from cachd.store.ingest.data_file import DataFile
from cachd.store.ingest.ingest import Ingest
from cachd.store.ingest.journal import Journal
from cachd.store.ingest.offer import Offer
from cachd.store.ingest.part_hashes import PartHashes
from cachd.store.ingest.records import Records
from cachd.store.leases import Leases
from cachd.store.names import Names
from cachd.store.permit import Permit
from cachd.store.proven import Proven
from cachd.store.reads import Reads
from cachd.store.scrub_log import ScrubLog
from cachd.store.space import Space
from cachd.store.usage_log import UsageLog
from cachd.store.watch import Watch
from cachd.upkeep.jobs import Job, Jobs, JobState
from cachd.upkeep.sweeps import Sweeps
from cachd.upkeep.verifications import Verification
from cachd.upkeep.warms import Warming
from tests.conftest import Engine
from tests.ground.pause import paused_before
from tests.ground.stored import manifest_of

LET_IN_SECONDS = 0.3  # given to threads that a lock should keep out; without the lock, the first needs less
PATIENCE_SECONDS = 60.0

Calls = Sequence[Callable[[], object]]
Lock = AbstractContextManager[Any]
CONTENT = b"content"
SHA256, OTHER = Digest("sha256", "1" * 64), Digest("sha256", "2" * 64)
FILE = File("model.bin", 100, "https://host/model.bin", SHA256, base="https://host/")
FROM_ELSEWHERE = File("model.bin", 100, "https://other/model.bin", SHA256, base="https://other/")
PART = Extent(0, 50)
SPEC = ModelSpec(Ref.parse("hf://org/model"), "m")


def assert_all_wait(lock: Lock, *calls: Callable[[], object]) -> None:
    """No call ends while another thread has the lock, and each does when it is free."""
    with ThreadPoolExecutor(len(calls)) as others:
        with lock:
            running = [others.submit(call) for call in calls]
            done = wait(running, LET_IN_SECONDS, FIRST_COMPLETED).done
        for each in running:
            each.result(PATIENCE_SECONDS)
    assert [running.index(each) for each in done] == [], "these calls did not wait"


def entered(*contexts: AbstractContextManager[Any]) -> Calls:
    """Calls that each enter a context and leave it."""

    def enter(context: AbstractContextManager[Any]) -> None:
        with context:
            pass

    return [lambda context=context: enter(context) for context in contexts]


def begun(*contexts: AbstractContextManager[Any]) -> Iterator[Calls]:
    """Calls that each enter a context, which is left when the next ones are asked for."""
    yield [context.__enter__ for context in contexts]
    for context in contexts:
        context.__exit__(None, None, None)


def left(*contexts: AbstractContextManager[Any]) -> Calls:
    """Calls that each leave a context, which is entered now."""
    exits = [contextlib.ExitStack() for _ in contexts]
    for stack, context in zip(exits, contexts, strict=True):
        stack.enter_context(context)
    return [stack.close for stack in exits]


# --- of the store ---


def leases(of: Leases, _: Path) -> Iterator[tuple[Lock, Calls]]:
    renewed, released = of.take("m", "pod", until=9e9), of.take("m", "pod", until=9e9)
    yield (
        of._lock,
        [
            lambda: of.take("m", "pod", until=9e9),
            lambda: of.renew("m", renewed.id, until=9e9, now=1.0),
            lambda: of.release("m", released.id),
            lambda: of.release_all("other"),
            lambda: of.expire(1.0),
        ],
    )


def changes(of: Changes, _: Path) -> Iterator[tuple[Lock, Calls]]:
    yield (
        of._changed,
        [lambda: of.mark("m"), of.wake, lambda: of.take(0.0), lambda: of.settle(0.0), of.close],
    )


def claims(of: Claims, _: Path) -> Iterator[tuple[Lock, Calls]]:
    inside = left(of.claimed([OTHER], "n"))
    asking: Calls = [lambda: of.is_claimed(SHA256), of.blobs, lambda: of.names(SHA256)]
    yield of._lock, [*asking, *inside, *entered(of.paused())]
    for calls in begun(of.claimed([SHA256], "m")):
        yield of._lock, calls


def offers(of: Offers, _: Path) -> Iterator[tuple[Lock, Calls]]:
    yield of._lock, [lambda: of.of(FILE), lambda: of.tell(FILE)]


def owners(of: Owners, place: Path) -> Iterator[tuple[Lock, Calls]]:
    yield (
        of._lock,
        [
            lambda: of.expect("m"),
            lambda: of.expect_no_more("n"),
            lambda: of.is_expected(SHA256, place),
        ],
    )
    yield of._writing, [lambda: of.add(place, {"m"}), lambda: of.remove(place, ["n"])]


def copies(of: Copies, _: Path) -> Iterator[tuple[Lock, Calls]]:
    nothing = manifest_of({"config.json": b"{}"})
    inside = left(of.staged(nothing, "folder", lambda _: nullcontext()))
    yield of._lock, [lambda: of.shares_blocks, *inside]


def hashes(of: Hashes, _: Path) -> Iterator[tuple[Lock, Calls]]:
    recorded = File("a", 1, "https://host/a", Digest("crc32", "0" * 8), sha256=SHA256)
    yield (
        of._lock,
        [
            lambda: of.note(SHA256, OTHER),
            lambda: of.read(recorded),
            lambda: of.forget(OTHER),
            of.unrecorded,
            lambda: of.recorded([OTHER]),
        ],
    )


def reads(of: Reads, _: Path) -> Iterator[tuple[Lock, Calls]]:
    for calls in begun(of.reading()):
        yield of._changed, calls
    yield of._changed, left(of.reading())
    yield of._answering, entered(of.paused())


def permit(of: Permit, _: Path) -> Iterator[tuple[Lock, Calls]]:
    yield of._lock, [lambda: of.use(None, SPEC)]
    yield of._lock, [of.revoke]


def usage_log(of: UsageLog, _: Path) -> Iterator[tuple[Lock, Calls]]:
    yield (
        of._lock,
        [
            lambda: of.seen("m", 1.0),
            lambda: of.used("m", 2.0),
            lambda: of.opened("m", 1.0),
            of.newly_opened,
            lambda: of.set_priority("m", 1),
            lambda: of.brought("hf", 1 << 30, 60.0),
            lambda: of.lost("hf://org/model", "evicted"),
            of.save,
        ],
    )


def space(of: Space, _: Path) -> Iterator[tuple[Lock, Calls]]:
    with of.reserve(10, total=10) as reservation, of.reserve(10, total=10) as other:
        yield (
            of._lock,
            [
                lambda: of.spend(reservation, 1),
                lambda: of.change_left(reservation, 1),
                lambda: of.change_beside(reservation, SHA256, 1),
                lambda: of.forget(other),
                lambda: of.begin_grant(reservation, 1, 1),
                lambda: of.end_grant(0),
                lambda: of.most_of(reservation, 1),
                lambda: of.has_space_for(reservation, 1),
                lambda: of.take_unclaimed(reservation),
            ],
        )
        for calls in begun(of.reserve(1, total=1), of.freeing(reservation, 1)):
            yield of._lock, calls
        yield of._lock, left(of.freeing(reservation, 1))


def watch(of: Watch, _: Path) -> Iterator[tuple[Lock, Calls]]:
    manifest = manifest_of({"config.json": b"{}"})
    yield (
        of._lock,
        [
            of.start,
            lambda: of.cover(manifest, []),
            lambda: of.leave(manifest.id),
            lambda: of.keep_only([]),
            of.watched,
            of.changes,
            lambda: of.note_opens(1.0),
            *entered(of.own_opens([])),
        ],
    )
    yield of._lock, [of.close]


def names(of: Names, _: Path) -> Iterator[tuple[Lock, Calls]]:
    yield of._lock, entered(of.changing())


STORED: dict[str, tuple[Callable[[DiskStore], Any], Callable[[Any, Path], Iterator[tuple[Lock, Calls]]]]] = {
    "leases": (lambda store: store.leases, leases),
    "changes": (lambda store: store.changes, changes),
    "claims": (lambda _: Claims(), claims),
    "offers": (lambda store: store.content.offers, offers),
    "owners": (lambda store: store.content.owners, owners),
    "copies": (lambda store: store.copies, copies),
    "hashes": (lambda store: store.content.hashes, hashes),
    "reads": (lambda store: store.content.reads, reads),
    "permit": (lambda _: Permit(), permit),
    "usage log": (lambda store: store.usage_log, usage_log),
    "space": (lambda store: store.space, space),
    "watch": (lambda store: store.watch, watch),
    "names": (lambda store: store.names, names),
}


@pytest.mark.parametrize(("part", "cases"), STORED.values(), ids=STORED)
def test_who_changes_a_part_of_the_store_keeps_the_others_waiting(
    store: DiskStore,
    tmp_path: Path,
    part: Callable[[DiskStore], Any],
    cases: Callable[[Any, Path], Iterator[tuple[Lock, Calls]]],
) -> None:
    for lock, calls in cases(part(store), tmp_path):
        assert_all_wait(lock, *calls)


def test_proofs_are_noted_one_after_the_other(tmp_path: Path) -> None:
    proven = Proven(tmp_path / "proven", lambda blob: blob != OTHER)
    inside = left(proven.during_pull())
    proven.add(FILE)
    assert_all_wait(
        proven._lock,
        lambda: proven.begin_proof(FILE),
        lambda: proven.add(FROM_ELSEWHERE),
        lambda: proven.forget(OTHER),
        proven.drop_stale,
        *inside,
    )
    for calls in begun(proven.during_pull()):
        assert_all_wait(proven._lock, *calls)


def test_the_scrub_log_is_read_and_changed_by_one_thread_at_a_time(tmp_path: Path) -> None:
    log = ScrubLog(tmp_path / "scrub")
    assert_all_wait(
        log._lock,
        lambda: log.know([SHA256]),
        log.times,
        lambda: log.oldest([SHA256]),
        lambda: log.verified(SHA256),
        lambda: log.forget(OTHER),
        log.save,
    )


# --- of an ingest ---


@pytest.fixture
def ingest(tmp_path: Path) -> Iterator[Ingest]:
    with contextlib.closing(Ingest(tmp_path / "ingest", FILE)) as made:
        yield made


def test_the_received_extents_are_counted_by_one_thread_at_a_time(ingest: Ingest) -> None:
    calls: Calls = [lambda: ingest.prefix, ingest.gaps, lambda: ingest.received(PART)]
    assert_all_wait(ingest._lock, *calls)
    assert_all_wait(ingest._lock, lambda: ingest.forget(frozenset()))


def test_part_hashes_are_changed_by_one_thread_at_a_time() -> None:
    parts = PartHashes(None)
    assert_all_wait(
        parts._lock,
        lambda: parts.record(PART, PartHash(None)),
        lambda: parts.replace({}),
        lambda: parts.forget([PART]),
        parts.extents,
        parts.in_order,
    )


def test_the_journal_is_written_by_one_thread_at_a_time(tmp_path: Path) -> None:
    data = DataFile(tmp_path, lambda: None)
    with (
        contextlib.closing(data),
        contextlib.closing(Journal(tmp_path, FILE, data, About(tmp_path, FILE))) as journal,
    ):
        hashed = PartHash(None)
        assert_all_wait(
            journal._lock,
            lambda: journal.add_unsynced(PART, PartHash(None)),
            lambda: journal.keep(PART, hashed),
            journal.sync,
        )
        journal.keep(PART, hashed)
        with paused_before(DataFile.sync, journal.sync):
            assert_all_wait(journal._lock, journal.sync)  # it asks the other thread to sync once more
        with paused_before(Notes.append, lambda: journal.keep(PART, hashed)):
            assert journal._lock.locked(), "lines are noted one after the other"


@pytest.mark.parametrize("error", [Unavailable("later", code="busy"), DiskFailed("broken")])
def test_a_sync_that_fails_is_noted_by_one_thread_at_a_time(tmp_path: Path, error: CachdError) -> None:
    begun, gate = threading.Event(), threading.Event()

    def refused(_: Sequence[Extent]) -> None:
        begun.set()
        assert gate.wait(PATIENCE_SECONDS)
        raise error

    with (
        contextlib.closing(DataFile(tmp_path, lambda: None)) as data,
        contextlib.closing(Journal(tmp_path, FILE, data, About(tmp_path, FILE), refused)) as journal,
        ThreadPoolExecutor(1) as syncs,
    ):
        journal.keep(PART, PartHash(None))
        syncing = syncs.submit(journal.sync)
        assert begun.wait(PATIENCE_SECONDS)

        def ends() -> None:
            gate.set()
            wait([syncing], PATIENCE_SECONDS)

        assert_all_wait(journal._lock, ends)


def test_the_source_of_an_ingest_is_written_down_by_one_thread_at_a_time(tmp_path: Path) -> None:
    about = About(tmp_path, FILE)
    assert_all_wait(about._writing, about.write, lambda: about.comes_from(FROM_ELSEWHERE))


def test_records_of_attempts_are_written_one_after_the_other(tmp_path: Path) -> None:
    records = Records(tmp_path)
    calls: Calls = [lambda: records.write(tmp_path / "a", "1"), lambda: records.remove(tmp_path / "b")]
    assert_all_wait(records._lock, *calls)


def test_an_offer_is_read_and_changed_by_one_thread_at_a_time(tmp_path: Path) -> None:
    offer = Offer(100, tmp_path, tmp_path / "streamed")
    offer.follow(0)
    assert_all_wait(
        offer._changed,
        lambda: offer.open([], is_complete=True),
        lambda: offer.add([PART]),
        lambda: offer.wants_sync(PART),
        offer.verify,
        offer.withdraw,
        offer.tell,
        lambda: offer.next_attempt,
        offer.claim,
        lambda: offer.is_right(1),
        lambda: offer.has_wrong_readers,
        lambda: offer.until(1, 0),
        lambda: offer.wait(-1, 0.0),
    )
    assert_all_wait(offer._changed, offer.close)


# --- of the upkeep ---


def test_jobs_are_counted_and_started_by_one_thread_at_a_time() -> None:
    verification, warming = Verification("m", 10), Warming("m", 10)
    calls: Calls = [lambda: verification.took(1), lambda: verification.found("a", "short")]
    assert_all_wait(verification._lock, *calls)
    assert_all_wait(warming._lock, lambda: warming.took(1, 1))
    with contextlib.closing(Jobs[Job](ThreadPoolExecutor(1))) as jobs:
        assert_all_wait(jobs._lock, lambda: jobs.start(Job("m", 1), lambda job: job.end(JobState.warm)))


def test_one_sweep_at_a_time(engine: Callable[..., Engine]) -> None:
    on = engine()
    sweeps = Sweeps(on.store, on.pulls, on.metrics, interval_seconds=0, keep_seconds=0)
    assert_all_wait(sweeps._sweeping, sweeps.sweep)


def test_threads_in_brief_turns_are_counted_one_after_the_other() -> None:
    for calls in begun(threads.in_brief_turns()):
        assert_all_wait(threads._counting, *calls)
    assert_all_wait(threads._counting, *left(threads.in_brief_turns()))
