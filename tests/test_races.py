"""Races of two threads over one model. Each race runs once, one step at a time.

One thread is stopped before one of its steps (ground/pause.py) while the other acts. Without the lock or the
second check that a test is about, the other thread gets in between, and the test fails.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.errors import Cancelled, InUse, NotFound
from cachd.kernel import durable
from cachd.model import Extent, ModelSpec
from cachd.sources.cancel import CancelToken
from cachd.sources.connection import Connection, origin_of
from cachd.sources.http1 import Request
from cachd.sources.routes import Dialled
from cachd.sources.wire import Wire
from cachd.store.content.removal import Removal
from cachd.store.digests import PartHash
from cachd.store.disk_store import DiskStore
from cachd.store.ingest.about import About
from cachd.store.ingest.data_file import DataFile
from cachd.store.ingest.journal import Journal
from cachd.store.leases import Leases
from cachd.store.withdrawals import Withdrawals
from cachd.transfer.slots import SlotQueue
from tests.attacks.test_waits import Asked, silent
from tests.conftest import Engine, paused_without_ready_file, spec_of
from tests.ground.hub import EVERY_METHOD
from tests.ground.models import noise
from tests.ground.origin import Origin, Status
from tests.ground.pause import at_event, paused_before
from tests.ground.scripted import Scripted
from tests.ground.site import until
from tests.ground.stored import file_of, keep, manifest_of, publish

LET_IN_SECONDS = 0.5  # given to a thread that a lock should keep out; without the lock, it needs less
PATIENCE_SECONDS = 60.0
FILES = {"model.bin": noise(10_000)}


@pytest.fixture
def store(root: Path) -> Iterator[DiskStore]:
    with DiskStore(root) as opened:
        yield opened


def taken(store: DiskStore, name: str = "m", *, seconds: float = 60.0) -> str:
    """Take a lease of so many seconds from now on; its id."""
    return store.leases.take(name, "pod/a", until=time.time() + seconds).id


# --- two parts that end at once ---


def test_a_part_that_ends_after_a_sync_found_nothing_more_to_write_is_in_the_journal(tmp_path: Path) -> None:
    """The thread that syncs is asked again, but has written the lines of that request already."""
    file, hashed = file_of(noise(300)), PartHash(None)
    data = DataFile(tmp_path, lambda: None)
    journal = Journal(tmp_path, file, data, About(tmp_path, file))
    journal.keep(Extent(0, 100), hashed)
    with paused_before(durable.append, journal.sync) as syncing:
        journal.sync()
    syncing.result(PATIENCE_SECONDS)
    journal.keep(Extent(100, 200), hashed)
    journal.sync()
    journal.close()
    data.close()
    assert [each.start for each in journal.recorded() if each.synced_stop > each.start] == [0, 100]


# --- a blob that goes, and a pull that comes to need it ---


def test_a_claim_that_comes_while_a_blob_goes_finds_it_gone(store: DiskStore) -> None:
    manifest, (file,) = manifest_of(FILES), [file_of(content, path) for path, content in FILES.items()]
    keep(store, FILES)
    claimed = threading.Event()

    def claim() -> list[str]:
        with store.content.claim(manifest, "it"):
            claimed.set()
            return [f.path for f in store.content.missing(manifest)]

    with ThreadPoolExecutor(1) as pulls:
        with paused_before(durable.take_away, lambda: store.content.removal.drop(file.blob)) as dropping:
            claiming = pulls.submit(claim)
            assert not claimed.wait(LET_IN_SECONDS), "the claim counts on a blob that is being deleted"
        assert dropping.result(PATIENCE_SECONDS) > 0
        assert claiming.result(PATIENCE_SECONDS) == ["model.bin"]


def test_a_blob_is_not_taken_away_once_it_is_claimed(store: DiskStore) -> None:
    manifest, file = manifest_of(FILES), file_of(FILES["model.bin"])
    keep(store, FILES)
    claimed, over = threading.Event(), threading.Event()

    def claim() -> None:
        with store.content.claim(manifest, "it"):
            claimed.set()
            assert over.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as pulls:
        with paused_before(Removal._discard_blob, lambda: store.content.removal.drop(file.blob)) as dropping:
            claiming = pulls.submit(claim)
            assert claimed.wait(PATIENCE_SECONDS)
        freed, is_here = dropping.result(PATIENCE_SECONDS), store.content.has(file)
        over.set()
        claiming.result(PATIENCE_SECONDS)
    assert (freed, is_here) == (0, True)


# --- a model that goes, and somebody who comes to need it ---

GO: dict[str, Callable[[DiskStore, str], object]] = {
    "deleted": lambda store, _: store.withdraw("m"),
    "evicted": lambda store, manifest: store.evict(manifest),
}


@pytest.mark.parametrize("go", GO.values(), ids=GO)
def test_a_lease_that_is_taken_while_the_ready_file_is_away_keeps_the_model(
    store: DiskStore, go: Callable[[DiskStore, str], object]
) -> None:
    """After cachd removes the ready file it checks the leases again: a pod may have read the file before."""
    snapshot = publish(store, FILES, name="m")
    ready = store.layout.ready_file("m")
    with paused_without_ready_file(lambda: go(store, snapshot.manifest)) as going:
        assert not ready.exists()
        taken(store)
    with pytest.raises(InUse) as refusal:
        going.result(PATIENCE_SECONDS)
    assert refusal.value.code == "leased"
    assert ready.exists()
    assert (store.layout.model("m") / "model.bin").read_bytes() == FILES["model.bin"]
    assert store.names.get("m") == snapshot


@pytest.mark.parametrize("go", GO.values(), ids=GO)
def test_a_pin_that_comes_while_the_ready_file_is_away_keeps_the_model(
    store: DiskStore, go: Callable[[DiskStore, str], object]
) -> None:
    snapshot = publish(store, FILES, name="m")
    with paused_without_ready_file(lambda: go(store, snapshot.manifest)) as going:
        store.pins.add("m")
    with pytest.raises(InUse) as refusal:
        going.result(PATIENCE_SECONDS)
    assert refusal.value.code == "pinned"
    assert store.layout.ready_file("m").exists()


def test_two_changes_of_the_names_come_one_after_the_other(store: DiskStore) -> None:
    """A publish in the middle of a withdrawal would lose files that the withdrawal takes away."""
    snapshot = publish(store, FILES, name="m")
    manifest = store.manifests.of(snapshot)
    with store.content.claim(manifest, "n"), ThreadPoolExecutor(1) as other:
        with paused_before(
            durable.remove, lambda: store.withdraw("m", force=True), within=Withdrawals._remove_names
        ) as going:
            publishing = other.submit(store.publish, ModelSpec(snapshot.spec.ref, "n"), manifest, now=2.0)
            with pytest.raises(TimeoutError):
                publishing.result(LET_IN_SECONDS)
        going.result(PATIENCE_SECONDS)
        publishing.result(PATIENCE_SECONDS)
    assert [each.name for each in store.names.all()] == ["n"]
    assert (store.layout.model("n") / "model.bin").read_bytes() == FILES["model.bin"]


# --- leases ---


def test_a_lease_that_is_over_is_not_renewed_and_keeps_nothing(store: DiskStore) -> None:
    publish(store, FILES, name="m")
    leases, now = store.leases, time.time()
    lease = leases.take("m", "pod/a", until=now - 1)
    for until_then in (now + 60, now - 0.5):
        with pytest.raises(NotFound) as refusal:
            leases.renew("m", lease.id, until=until_then, now=now)
        assert refusal.value.code == "no_such_lease"
    assert leases.of("m", now) == []
    assert leases.count(now) == 0
    store.withdraw("m")


def test_a_lease_is_renewed_to_the_very_moment_it_ends(store: DiskStore) -> None:
    leases = store.leases
    lease = leases.take("m", "pod/a", until=100.0)
    assert leases.renew("m", lease.id, until=200.0, now=99.9).expires_at == 200.0
    with pytest.raises(NotFound):
        leases.renew("m", lease.id, until=300.0, now=200.0)
    with pytest.raises(NotFound):
        leases.renew("other", lease.id, until=300.0, now=150.0)


def test_a_lease_that_is_renewed_while_it_expires_is_either_there_or_refused(store: DiskStore) -> None:
    """The renewal arrives before the lease ends and is served after: if it succeeds, the lease must exist."""
    leases = store.leases
    lease = leases.take("m", "pod/a", until=100.0)
    with ThreadPoolExecutor(1) as pods:
        with paused_before(Leases._remove, lambda: leases.expire(101.0)) as expiring:
            renewing = pods.submit(leases.renew, "m", lease.id, until=200.0, now=99.0)
            with pytest.raises(TimeoutError):
                renewing.result(LET_IN_SECONDS)
        assert expiring.result(PATIENCE_SECONDS) == [lease]
        with pytest.raises(NotFound):
            renewing.result(PATIENCE_SECONDS)
    assert leases.of("m", 101.0) == []


def test_leases_end_with_a_model_that_is_deleted_by_force(store: DiskStore, root: Path) -> None:
    publish(store, FILES, name="m")
    other = taken(store, "other")
    for _ in range(2):
        taken(store)
    with pytest.raises(InUse):
        store.withdraw("m")
    store.withdraw("m", force=True)
    assert [path.stem for path in (root / ".cachd/leases").iterdir()] == [other]
    publish(store, FILES, name="m")
    assert store.leases.of("m", time.time()) == []
    store.withdraw("m")


# --- a cancel, and a pull that is on its way into a wait ---


def test_a_cancel_that_comes_just_before_a_long_wait_ends_it(
    engine: Callable[..., Engine], origin: Origin
) -> None:
    """The origin asks for a wait of ten minutes. The cancel comes before the wait begins."""
    running = engine()
    ref = origin.add("/it", noise(1000))
    origin.fault("*", Status(503, {"Retry-After": "600"}), methods=EVERY_METHOD)
    with at_event("resolve will be retried", lambda: running.pulls.cancel("it", force=True)) as cancelled:
        pull = running.pulls.start(spec_of(ref, name="it"))
        assert pull is not None
        with pytest.raises(Cancelled):
            pull.done.result(PATIENCE_SECONDS / 4)
    assert cancelled.is_set()
    assert pull.progress.state == "cancelled"
    assert running.pulls.running() == []


def test_a_cancel_ends_the_wait_for_a_slot_that_never_comes() -> None:
    """Another pull has the slot that this one lent, and its origin hangs."""
    line: SlotQueue[Asked] = SlotQueue(1, lambda _: None)
    slow, other, token = Asked("http", "slow"), Asked("http", "other"), CancelToken()
    line.add(slow)
    assert line.next() is slow
    line.lend(slow)
    line.add(other)
    assert line.next() is other
    with ThreadPoolExecutor(1) as pulls:
        waiting = pulls.submit(line.take_when_free, slow, token)
        until(lambda: line.returning)
        token.cancel()
        with pytest.raises(Cancelled):
            waiting.result(PATIENCE_SECONDS)
    assert line.returning == 0
    assert set(line.at_work()) == {slow, other}


def test_a_cancel_that_comes_while_a_connection_is_dialled_ends_the_request_on_it() -> None:
    """The origin accepts the connection and never answers. At the cancel, there is none to close yet."""
    with ThreadPoolExecutor(1) as streams, Scripted(silent) as server:
        url = urlsplit(server.url)
        connection = Connection(origin_of(url), None, stall_seconds=PATIENCE_SECONDS)

        def dialled() -> Dialled:
            connected = socket.create_connection((url.hostname or "", url.port or 0))
            connection.abort()
            return Dialled(Wire(connected, PATIENCE_SECONDS), ("127.0.0.1",))

        asking = streams.submit(connection.exchange, Request("GET", url, {}), dialled)
        assert asking.exception(PATIENCE_SECONDS / 6) is not None
        connection.close()
