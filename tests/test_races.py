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
from cachd.model import ModelSpec
from cachd.sources.cancel import CancelToken
from cachd.sources.connection import Connection, origin_of
from cachd.sources.http1 import Request
from cachd.sources.routes import Dialled
from cachd.sources.wire import Wire
from cachd.store.content import ContentStore
from cachd.store.protection import Leases
from cachd.store.snapshots import Snapshots
from cachd.store.store import Store
from cachd.transfer.line import Line
from tests.attacks.test_waits import Asked, silent
from tests.conftest import Engine, paused_without_ready_file, spec_of
from tests.ground.hub import EVERY_METHOD
from tests.ground.models import noise
from tests.ground.origin import Origin, Status
from tests.ground.pause import at_event, paused_before
from tests.ground.scripted import Scripted
from tests.ground.site import until
from tests.test_store import file_of, keep, manifest_of, publish

LET_IN_SECONDS = 0.5  # given to a thread that a lock should keep out; without the lock, it needs less
PATIENCE_SECONDS = 60.0
FILES = {"model.bin": noise(10_000)}


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with Store(root) as opened:
        yield opened


def taken(store: Store, name: str = "m", *, seconds: float = 60.0) -> str:
    """Take a lease of so many seconds from now on; its id."""
    return store.snapshots.leases.take(name, "pod/a", until=time.time() + seconds).id


# --- a blob that goes, and a pull that comes to need it ---


def test_a_claim_that_comes_while_a_blob_goes_finds_it_gone(store: Store) -> None:
    manifest, (file,) = manifest_of(FILES), [file_of(content, path) for path, content in FILES.items()]
    keep(store, FILES)
    claimed = threading.Event()

    def claim() -> list[str]:
        with store.content.claim(manifest, "it"):
            claimed.set()
            return [f.path for f in store.content.missing(manifest)]

    with ThreadPoolExecutor(1) as pulls:
        with paused_before(durable.take_away, lambda: store.content.drop(file.blob)) as dropping:
            claiming = pulls.submit(claim)
            assert not claimed.wait(LET_IN_SECONDS), "the claim counts on a blob that is being deleted"
        assert dropping.result(PATIENCE_SECONDS) > 0
        assert claiming.result(PATIENCE_SECONDS) == ["model.bin"]


def test_a_blob_is_not_taken_away_once_it_is_claimed(store: Store) -> None:
    manifest, file = manifest_of(FILES), file_of(FILES["model.bin"])
    keep(store, FILES)
    claimed, over = threading.Event(), threading.Event()

    def claim() -> None:
        with store.content.claim(manifest, "it"):
            claimed.set()
            assert over.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as pulls:
        with paused_before(ContentStore._discard_blob, lambda: store.content.drop(file.blob)) as dropping:
            claiming = pulls.submit(claim)
            assert claimed.wait(PATIENCE_SECONDS)
        freed, is_here = dropping.result(PATIENCE_SECONDS), store.content.has(file)
        over.set()
        claiming.result(PATIENCE_SECONDS)
    assert (freed, is_here) == (0, True)


# --- a model that goes, and somebody who comes to need it ---

GO: dict[str, Callable[[Store, str], object]] = {
    "deleted": lambda store, _: store.snapshots.withdraw("m"),
    "evicted": lambda store, manifest: store.snapshots.evict(manifest),
}


@pytest.mark.parametrize("go", GO.values(), ids=GO)
def test_a_lease_that_is_taken_while_the_ready_file_is_away_keeps_the_model(
    store: Store, go: Callable[[Store, str], object]
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
    assert store.snapshots.get("m") == snapshot


@pytest.mark.parametrize("go", GO.values(), ids=GO)
def test_a_pin_that_comes_while_the_ready_file_is_away_keeps_the_model(
    store: Store, go: Callable[[Store, str], object]
) -> None:
    snapshot = publish(store, FILES, name="m")
    with paused_without_ready_file(lambda: go(store, snapshot.manifest)) as going:
        store.snapshots.pin("m")
    with pytest.raises(InUse) as refusal:
        going.result(PATIENCE_SECONDS)
    assert refusal.value.code == "pinned"
    assert store.layout.ready_file("m").exists()


def test_two_changes_of_the_names_come_one_after_the_other(store: Store) -> None:
    """A publish in the middle of a withdrawal would lose files that the withdrawal takes away."""
    snapshot = publish(store, FILES, name="m")
    manifest = store.snapshots.manifest(snapshot)
    with store.content.claim(manifest, "n"), ThreadPoolExecutor(1) as other:
        with paused_before(
            durable.remove, lambda: store.snapshots.withdraw("m", force=True), within=Snapshots._withdraw
        ) as going:
            publishing = other.submit(
                store.snapshots.publish, ModelSpec(snapshot.spec.ref, "n"), manifest, now=2.0
            )
            with pytest.raises(TimeoutError):
                publishing.result(LET_IN_SECONDS)
        going.result(PATIENCE_SECONDS)
        publishing.result(PATIENCE_SECONDS)
    assert [each.name for each in store.snapshots.all()] == ["n"]
    assert (store.layout.model("n") / "model.bin").read_bytes() == FILES["model.bin"]


# --- leases ---


def test_a_lease_that_is_over_is_not_renewed_and_keeps_nothing(store: Store) -> None:
    publish(store, FILES, name="m")
    leases, now = store.snapshots.leases, time.time()
    lease = leases.take("m", "pod/a", until=now - 1)
    for until_then in (now + 60, now - 0.5):
        with pytest.raises(NotFound) as refusal:
            leases.renew("m", lease.id, until=until_then, now=now)
        assert refusal.value.code == "no_such_lease"
    assert leases.of("m", now) == []
    assert leases.count(now) == 0
    store.snapshots.withdraw("m")


def test_a_lease_is_renewed_to_the_very_moment_it_ends(store: Store) -> None:
    leases = store.snapshots.leases
    lease = leases.take("m", "pod/a", until=100.0)
    assert leases.renew("m", lease.id, until=200.0, now=99.9).expires_at == 200.0
    with pytest.raises(NotFound):
        leases.renew("m", lease.id, until=300.0, now=200.0)
    with pytest.raises(NotFound):
        leases.renew("other", lease.id, until=300.0, now=150.0)


def test_a_lease_that_is_renewed_while_it_expires_is_either_there_or_refused(store: Store) -> None:
    """The renewal arrives before the lease ends and is served after: if it succeeds, the lease must exist."""
    leases = store.snapshots.leases
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


def test_leases_end_with_a_model_that_is_deleted_by_force(store: Store, root: Path) -> None:
    publish(store, FILES, name="m")
    other = taken(store, "other")
    for _ in range(2):
        taken(store)
    with pytest.raises(InUse):
        store.snapshots.withdraw("m")
    store.snapshots.withdraw("m", force=True)
    assert [path.stem for path in (root / ".cachd/leases").iterdir()] == [other]
    publish(store, FILES, name="m")
    assert store.snapshots.leases.of("m", time.time()) == []
    store.snapshots.withdraw("m")


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
    line: Line[Asked] = Line(1, lambda _: None)
    slow, other, token = Asked("http", "slow"), Asked("http", "other"), CancelToken()
    line.add(slow)
    assert line.next() is slow
    line.lend(slow)
    line.add(other)
    assert line.next() is other
    with ThreadPoolExecutor(1) as pulls:
        waiting = pulls.submit(line.take_in_turn, slow, token)
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
