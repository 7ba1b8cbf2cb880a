"""A pod of the daemon's own uid, with the mount, that holds kernel leases on the files.

Whoever opens a leased file waits until the holder gives it back, or for fs.lease-break-time (45 s). Only the
file's owner may hold one, or a process with CAP_LEASE.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachd.errors import InUse, Leased
from cachd.kernel.leases import is_open, reports_open_files, unlinked_unless_open
from cachd.model import Extent, File, Snapshot
from cachd.sources.beneath import open_file
from cachd.store.disk_store import DiskStore
from cachd.store.residency import load, resident
from cachd.store.scrub import verify_blob
from tests.ground import mount
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.needs import needs
from tests.ground.node import Node
from tests.ground.pod import run_in_pod
from tests.ground.site import PATIENCE_SECONDS, Ground
from tests.ground.stored import SMALL, B, manifest_of, publish

PROMPT_SECONDS = 20.0  # a machine that is busy takes its time; a lease would take 45 s

HOLD = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, lambda *_: os.write(1, b"wanted\\n"))  # somebody opens it, and waits
kind = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK}[sys.argv[1]]
for path in sys.argv[2:]:
    fd = os.open(path, os.O_RDONLY)
    for _ in range(1000):
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
            break
        except BlockingIOError:  # the daemon has it open just now
            time.sleep(0.01)
    else:
        sys.exit(f"no lease on {path}")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def leased(kind: str, paths: Iterable[Path]) -> Iterator[subprocess.Popen[str]]:
    """Another process of the same user holds leases, and gives none back."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


@contextmanager
def prompt() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < PROMPT_SECONDS


def published(root: Path) -> list[Path]:
    """Every file that pods see: of the views, hold files, ready files, status files, branches and lists."""
    return files_below(root, "models", "hub", "ready", "status")


def files_below(root: Path, *tops: str) -> list[Path]:
    """Every file, once however many names it has."""
    seen: dict[int, Path] = {}
    for top in tops:
        for path in (root / top).rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name != "CACHEDIR.TAG":
                seen.setdefault(path.stat().st_ino, path)
    return list(seen.values())


@pytest.fixture(autouse=True)
def _kernel_has_leases(tmp_path: Path) -> None:
    if not reports_open_files(tmp_path / "probe"):
        pytest.skip("this file system has no leases")


@pytest.fixture
def store(root: Path) -> Iterator[DiskStore]:
    with DiskStore(root) as opened:
        yield opened


# --- what the kernel does ---


HARMLESS: dict[str, Callable[[Path], object]] = {
    "link": lambda path: os.link(path, path.with_name("linked")),
    "rename": lambda path: path.rename(path.with_name("renamed")),
    "replace": lambda path: (path.with_name("new").touch(), path.with_name("new").rename(path)),
    "unlink": lambda path: path.unlink(),
    "chmod": lambda path: path.chmod(0o600),
    "stat": lambda path: path.lstat(),
}


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("do", HARMLESS.values(), ids=HARMLESS)
def test_no_call_but_open_and_truncate_waits_for_a_lease(
    tmp_path: Path, kind: str, do: Callable[[Path], object]
) -> None:
    path = tmp_path / "file"
    path.touch()
    with leased(kind, [path]), prompt():
        do(path)


TRY_ALL = """
import fcntl, os
found = taken = 0
for at, _, names in os.walk(os.environ["CACHE"]):
    for name in names:
        for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK):
            fd = os.open(f"{at}/{name}", os.O_RDONLY)
            found += 1
            try:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
                taken += 1
            except PermissionError:
                pass
            os.close(fd)
print(taken, "of", found)
"""


@needs("users")
def test_a_pod_of_another_uid_can_hold_no_lease(store: DiskStore, root: Path) -> None:
    publish(store, SMALL)
    ended = run_in_pod(root, TRY_ALL)
    taken, _, found = ended.stdout.split()
    assert (taken, int(found) > 8) == ("0", True), ended.stderr


# --- what the store does ---


def blob_of(store: DiskStore, snapshot: Snapshot) -> tuple[Path, File]:
    file = max(store.manifests.of(snapshot).files, key=lambda f: f.size)
    return store.content.path(file.blob), file


def test_a_file_under_a_lease_counts_as_open(store: DiskStore) -> None:
    snapshot = publish(store, SMALL)
    blob, _ = blob_of(store, snapshot)
    hold = store.layout.hold(snapshot.manifest)
    with leased("write", [blob, hold]), prompt():
        assert is_open([blob])
        assert is_open([hold])
        assert not unlinked_unless_open(hold)
        assert store.protection.is_in_use(store.manifests.of(snapshot))
        for take in (store.withdraw, store.evict):
            with pytest.raises(InUse):
                take(snapshot.name if take == store.withdraw else snapshot.manifest)
        store.withdraw(snapshot.name, force=True)
    assert not hold.exists()


def test_a_blob_under_a_lease_is_neither_read_again_nor_warmed(store: DiskStore) -> None:
    blob, file = blob_of(store, publish(store, SMALL))
    reads = store.content.reads
    with leased("write", [blob]), prompt():
        with pytest.raises(Leased):
            verify_blob(blob, file, reads, lambda _: None)
        with pytest.raises(Leased):
            load(blob, Extent(0, file.size), reads)
        assert resident(blob, reads) == 0
    assert verify_blob(blob, file, reads, lambda _: None) is None


def test_a_lease_to_read_keeps_nobody_waiting(store: DiskStore) -> None:
    snapshot = publish(store, SMALL)
    blob, file = blob_of(store, snapshot)
    with leased("read", published(store.layout.root)), prompt():
        assert is_open([blob])
        assert verify_blob(blob, file, store.content.reads, lambda _: None) is None
        assert store.check(snapshot.name, now=1.0) is None


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_check_of_files_under_leases_withdraws_nothing(store: DiskStore, root: Path, kind: str) -> None:
    snapshot = publish(store, SMALL)
    with leased(kind, published(root)), prompt():
        assert store.check(snapshot.name, now=1.0) is None
    assert store.names.get(snapshot.name)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_publish_over_files_under_leases_is_done_at_once(store: DiskStore, root: Path, kind: str) -> None:
    """The same name, the same blobs, the same commit and branch, then another commit of the branch."""
    publish(store, SMALL)
    with leased(kind, published(root)), prompt():
        publish(store, SMALL, name="twin", now=2.0)
        publish(store, SMALL, now=3.0)
        publish(store, {**SMALL, "more": b"more"}, revision=B, now=4.0)
    assert (root / "hub/models--org--model/refs/main").read_text() == B
    assert mount.wrong(root) == []


def test_a_manifest_under_a_lease_holds_up_no_other_model(store: DiskStore) -> None:
    """It is private, but not to who has the daemon's uid."""
    first = publish(store, SMALL)
    other = publish(store, {"x": noise(1000)}, "hf://org/other")
    with leased("write", [store.layout.manifest(first.manifest)]), prompt():
        assert {m.id for m, _ in store.manifests.with_names()} == {other.manifest}
        third = manifest_of({"x": noise(10)}, base="hf://org/third")
        assert store.manifests.as_kept(third) == third
        with pytest.raises(Leased):
            store.check(first.name, now=1.0)
        with pytest.raises(Leased):
            store.withdraw(first.name)
        assert store.withdraw(other.name)
    assert store.names.get(first.name)
    assert store.check(first.name, now=1.0) is None


def test_what_a_pull_left_behind_stays_when_it_is_under_a_lease(store: DiskStore) -> None:
    manifest = manifest_of({"big": noise(100_000)})
    file = manifest.files[0]
    ingest = store.content.begin(file)
    ingest.close()
    left = sorted(ingest.directory.iterdir())
    for path in left:
        with leased("write", [path]), prompt(), pytest.raises(Leased):
            store.content.begin(file)
        assert sorted(ingest.directory.iterdir()) == left


def test_a_file_of_a_share_under_a_lease_of_its_owner_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with leased("write", [path]), prompt(), pytest.raises(BlockingIOError):
        open_file(path)


# --- what the daemon does ---


def test_a_daemon_whose_published_files_are_all_under_leases_does_its_work_promptly(
    alone: Callable[..., Ground],
) -> None:
    """Promised: A kernel lease that a process holds on published files does not delay the daemon."""
    ground = alone(scrub_bytes_per_second="1GB", scrub_interval_seconds=1)
    node = ground.node
    ground.have("held")
    ground.hub.add("org/model", {"config.json": b"{}", "model.safetensors": noise(100_000)})
    node.pull("hf://org/model")
    assert node.ready("org--model").status == 200
    with leased("write", published(node.root)):
        node.wait_for("blob not scrubbed")
        for path in ("/readyz", "/v1/models/held/ready", "/v1/models", "/v1/models/held"):
            with prompt():
                assert node.ask("GET", path).status == 200
        with prompt():
            ground.have("another")
        ground.hub.add("org/model", {"config.json": b"{}", "model.safetensors": noise(200_000)})
        with prompt():
            node.ask("POST", "/v1/models", {"ref": "hf://org/model", "name": "org--model", "refresh": True})
            node.wait_for("published", name="org--model")
        with prompt():
            assert node.ask("DELETE", "/v1/models/held").status == 409
        with prompt():
            assert node.ask("DELETE", "/v1/models/another").status == 200
        with prompt():
            assert node.ask("POST", "/v1/evictions", {"bytes": 1}).status == 200
    assert node.ready("held").status == 200


def test_a_model_whose_manifest_is_under_a_lease_is_listed_as_in_use(alone: Callable[..., Ground]) -> None:
    ground = alone()
    ground.have("held")
    with leased("write", (ground.node.root / ".cachd/manifests").iterdir()), prompt():
        (model,) = ground.node.ask("GET", "/v1/models").document["models"]
        assert (model["name"], model["state"], model["in_use"]) == ("held", "ready", True)
        ground.have("another")
    assert not ground.show("held")["in_use"]


def start_behind(holder: subprocess.Popen[str], node: Node) -> None:
    """Start a node that wants what the holder has leased; the holder ends once it is wanted."""
    starting = threading.Thread(target=node.start)
    starting.start()
    assert holder.stdout is not None
    assert holder.stdout.readline() == "wanted\n"
    holder.kill()
    starting.join(PATIENCE_SECONDS)


def test_a_pull_to_go_on_with_is_not_forgotten_while_it_is_under_a_lease(
    alone: Callable[..., Ground],
) -> None:
    ground = alone()
    node = ground.node
    with ground.held("cut"):
        node.kill()
    with leased("write", (node.root / ".cachd/pending").iterdir()) as holder:
        start_behind(holder, node)
    assert node.ready("cut").status == 200


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_start_waits_for_the_leases_on_what_it_reads_and_loses_nothing(
    node: Callable[..., Node], kind: str, hub: Hub
) -> None:
    """A lease to read is in the way of the lock alone, which is opened to be written."""
    running = node(hf_endpoint=hub.url)
    hub.add("org/model", {"config.json": b"{}"})
    running.pull("hf://org/model")
    assert running.ready("org--model").status == 200
    running.kill()
    with leased(kind, files_below(running.root, "")) as holder:
        start_behind(holder, running)
    assert running.ready("org--model").status == 200
