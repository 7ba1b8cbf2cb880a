"""What the kernel says of the views: who opens a model, and who changes what pods see."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import InUse, NoSpace
from cachd.model import Snapshot
from cachd.policy.eviction import OPENED_SECONDS
from cachd.store.disk_store import DiskStore
from cachd.transfer.usage import record_opens
from tests.conftest import Engine, paused_without_ready_file
from tests.ground.models import noise
from tests.ground.needs import needs
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.pod import pod, run_in_pod
from tests.ground.site import LONGEST_LOOK_SECONDS, MIB, Ground, remove, until

Engines = Callable[..., Engine]
FILES = {"config.json": b"{}", "model.safetensors": noise(MIB), "sub/deep/tokenizer.json": b"{}"}
MAX_QUEUED = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())

in_a_pod = needs("pods")


@pytest.fixture
def watching(engine: Engines, origin: Origin) -> Callable[..., tuple[Engine, Snapshot]]:
    """An engine that watches its views, with a model: `watching("m", limit_bytes="4MiB")`."""

    def opened(name: str, **options: object) -> tuple[Engine, Snapshot]:
        started = engine(**options)
        started.store.watch.start()
        return started, started.pull(origin.add_model(name, FILES), name=name)

    return opened


@pytest.fixture
def watched(alone: Callable[..., Ground]) -> Callable[..., Ground]:
    """Starts a daemon, and waits until it watches its views."""

    def started(**options: object) -> Ground:
        ground = alone(**options)
        until(lambda: ground.node.metric("cachd_view_watches"))
        return ground

    return started


@pytest.fixture(scope="module")
def watched_for_all(ground: Ground) -> Ground:
    """The daemon of this file, with a model that several tests take from its pods."""
    until(lambda: ground.node.metric("cachd_view_watches"))
    have(ground)
    wait_for_looks(ground.node.root / "models/m", lambda: ground.node.metric("cachd_views_changed_total"))
    return ground


def wait_for_looks(model: Path, looks: Callable[[], float]) -> None:
    """Until cachd has looked at all that changed so far."""
    before = looks()
    os.utime(model / "config.json")
    until(lambda: looks() > before)


def have(ground: Ground, name: str = "m") -> None:
    ground.hub.add(f"org/{name}", FILES)
    ground.node.pull(f"hf://org/{name}", name=name)
    assert ground.node.ready(name).status == 200


def opened_at(engine: Engine, snapshot: Snapshot) -> float | None:
    return engine.store.watch.opened_at(snapshot.manifest, time.time())


def places(root: Path, name: str = "m") -> dict[str, Path]:
    """A model's directory in either view."""
    repo = root / f"hub/models--{name}"
    return {"plain": (root / "models" / name).resolve(), "hub": next((repo / "snapshots").iterdir())}


# --- who opens a model ---


@in_a_pod
@pytest.mark.parametrize("place", ["models/m/config.json", "hub/SNAPSHOT/sub/deep/tokenizer.json"])
def test_an_open_in_a_pod_shows_at_once_though_it_was_closed(
    watched: Callable[..., Ground], place: str
) -> None:
    """In another mount namespace, as another user, through a read-only mount; over before anybody asks."""
    ground = watched()
    have(ground)
    before = ground.show("m")
    assert before["last_opened"] is None
    snapshot = next(ground.node.root.glob("hub/models--org--m/snapshots/*")).relative_to(
        ground.node.root / "hub"
    )
    script = f"import os; open(os.environ['CACHE'] + '/{place.replace('SNAPSHOT', str(snapshot))}').read()"
    assert run_in_pod(ground.node.root, script).returncode == 0
    shown = until(lambda: (now := ground.show("m"))["last_opened"] and now)
    assert shown["last_used"] >= shown["last_opened"] > before["last_used"]
    assert shown["in_use"] is False
    (told,) = ground.node.ask("GET", "/v1/capacity").document["snapshots"]
    assert told["last_opened"] == shown["last_opened"]
    assert told["protected_by"].startswith("opened ")


STARTING = """
import os, sys
for name in ("config.json", "model.safetensors"):
    with open(os.environ["CACHE"] + "/models/m/" + name, "rb") as file:
        file.read()
    print(name, flush=True)
    sys.stdin.readline()
"""


@in_a_pod
def test_an_engine_that_starts_finds_its_next_file_though_it_had_none_open(
    watching: Callable[..., tuple[Engine, Snapshot]],
) -> None:
    """Between two opens nothing is open, and an eviction looks."""
    engine, snapshot = watching("m", limit_bytes=16 * MIB)
    with pod(engine.store.layout.root, STARTING) as starting:
        assert starting.stdin is not None
        assert starting.stdout is not None
        assert starting.stdout.readline() == "config.json\n"
        assert not engine.store.protection.is_in_use(engine.store.manifests.of(snapshot))
        need = engine.store.space.capacity().available + 1
        with pytest.raises(NoSpace) as refusal:
            engine.reclaim.make_available(need)
        assert "opened 0 s ago" in refusal.value.detail
        with pytest.raises(InUse) as kept:
            engine.store.evict(snapshot.manifest)
        assert kept.value.code == "opened_lately"
        starting.stdin.write("\n")
        starting.stdin.flush()
        assert starting.stdout.readline() == "model.safetensors\n"
        starting.communicate("\n")
    assert opened_at(engine, snapshot)
    engine.store.usage_log.opened(snapshot.manifest, time.time() - OPENED_SECONDS)
    assert engine.store.evict(snapshot.manifest) > MIB


def test_what_is_opened_and_closed_while_it_is_withdrawn_stays_ready(
    watching: Callable[..., tuple[Engine, Snapshot]],
) -> None:
    """By whoever saw the ready file just before it went, in the moment in which it is away."""
    engine, snapshot = watching("m")
    ready, file = engine.store.layout.ready_file("m"), engine.store.layout.model("m") / "config.json"
    store = engine.store
    with paused_without_ready_file(lambda: store.evict(snapshot.manifest)) as evicting:
        assert not ready.exists()
        assert file.read_bytes() == FILES["config.json"]
    with pytest.raises(InUse) as kept:
        evicting.result(60)
    assert kept.value.code == "opened_lately"
    assert ready.exists()
    assert opened_at(engine, snapshot)
    engine.store.usage_log.opened(snapshot.manifest, 0)
    assert store.evict(snapshot.manifest) > MIB


def test_nothing_that_cachd_does_itself_counts_as_an_open(watched: Callable[..., Ground]) -> None:
    ground = watched(scrub_bytes_per_second="1GB", scrub_interval_seconds=0.1)
    have(ground)
    node = ground.node
    node.ask("POST", "/v1/models/m/verify")
    node.wait_for("verified", name="m")
    node.ask("POST", "/v1/models/m/warm")
    until(lambda: ground.show("m")["warming"]["state"] != "running")
    ground.hub.add("org/m", {**FILES, "config.json": b'{"new": 1}'})
    node.pull("hf://org/m", name="m", refresh=True)
    until(lambda: len(ground.show("m")["previous"]) == 1)
    node.ask("POST", "/v1/models/m/rollback")
    node.ask("POST", "/v1/evictions?dry_run=true", {"bytes": "1GB"})
    node.ask("POST", "/v1/sweeps", {"everything": True})
    node.cli("doctor")
    node.log.clear()
    (node.root / "hub/models--org--m").rename(node.root / "cache")  # in one step: cachd puts it back
    remove(node.root / "cache")
    node.wait_for("published", name="m")
    node.stop()
    node.start()
    until(lambda: node.metric("cachd_scrub_bytes_total") > 2 * MIB)
    told = node.ask("GET", "/v1/capacity").document["snapshots"]
    assert [each["last_opened"] for each in told] == [None, None]


def test_who_lists_a_model_s_directory_or_asks_for_its_times_does_not_use_it(
    watching: Callable[..., tuple[Engine, Snapshot]],
) -> None:
    """As du, find and a backup's first pass do, every hour on every node."""
    engine, snapshot = watching("m")
    for place in places(engine.store.layout.root).values():
        for _, _, files in os.walk(place):
            assert files or place
        (place / "config.json").stat()
    assert opened_at(engine, snapshot) is None
    (places(engine.store.layout.root)["hub"] / "config.json").read_bytes()
    assert opened_at(engine, snapshot) is not None


def test_an_open_counts_for_every_name_of_the_snapshot(
    watching: Callable[..., tuple[Engine, Snapshot]], origin: Origin
) -> None:
    engine, _ = watching("m")
    engine.pull(f"{origin.url}/m/", name="other")
    log, now = engine.store.usage_log, time.time()
    for name in ("m", "other"):
        log._by_name.pop(name)
        log.used(name, now - 10_000)
    (engine.store.layout.model("other") / "config.json").read_bytes()
    record_opens(engine.store, time.time())
    uses = [use for name in ("m", "other") if (use := log.of(name))]
    assert [use.last >= now for use in uses] == [True, True]
    assert 1.9 < uses[0].weight < 2


def test_when_a_model_was_opened_outlives_the_daemon(watched: Callable[..., Ground]) -> None:
    ground = watched()
    have(ground)
    (ground.node.root / "models/m/config.json").read_bytes()
    opened = until(lambda: ground.show("m")["last_opened"])
    assert ground.node.stop() == 0
    ground.node.start()
    assert ground.show("m")["last_opened"] == opened


def test_a_revision_that_somebody_opened_lately_outlives_the_sweep_that_follows_a_new_one(
    watching: Callable[..., tuple[Engine, Snapshot]], origin: Origin
) -> None:
    """An engine read its config.json, and will open the weights by the path that it resolved then."""
    engine, old = watching("m", keep_previous=0)
    (places(engine.store.layout.root)["plain"] / "config.json").read_bytes()
    files = {**FILES, "config.json": b'{"new": 1}'}
    engine.pull(origin.add_model("new", files), name="m", replace=True)
    assert engine.store.sweep_snapshots() == 0
    assert engine.store.layout.tree(old.manifest).is_dir()
    engine.store.usage_log.opened(old.manifest, time.time() - OPENED_SECONDS)
    engine.store.sweep_snapshots()
    assert not engine.store.layout.tree(old.manifest).exists()


def test_a_model_that_was_opened_lately_can_be_deleted_all_the_same(
    watching: Callable[..., tuple[Engine, Snapshot]],
) -> None:
    engine, snapshot = watching("m")
    (engine.store.layout.model("m") / "config.json").read_bytes()
    assert opened_at(engine, snapshot)
    assert engine.pulls.delete("m") > MIB


def test_how_long_an_opened_model_is_kept_is_an_option(
    watching: Callable[..., tuple[Engine, Snapshot]],
) -> None:
    engine, snapshot = watching("m", keep_opened_seconds=0)
    (engine.store.layout.model("m") / "config.json").read_bytes()
    assert opened_at(engine, snapshot)
    assert engine.store.evict(snapshot.manifest) > MIB


def test_a_pod_that_opens_files_in_a_loop_costs_little_and_hides_no_deletion(
    watching: Callable[..., tuple[Engine, Snapshot]],
) -> None:
    """More opens than the queue holds: who has a model open is then asked of the kernel, and soon."""
    engine, snapshot = watching("m")
    plain = places(engine.store.layout.root)["plain"]
    for _ in range(MAX_QUEUED // 2 + 100):  # two by turns: the kernel makes one of equal events in a row
        for name in ("config.json", "model.safetensors"):
            os.close(os.open(plain / name, os.O_RDONLY))
    remove(plain / "config.json")
    began = time.thread_time()
    record_opens(engine.store, time.time())
    assert time.thread_time() - began < 0.5
    assert engine.store.usage_log.opened_at(snapshot.manifest)
    assert engine.reclaim.watch.seconds_between_checks() < 10
    engine.reclaim.watch.check_usage()
    assert engine.reclaim.watch.seconds_between_checks() > 10
    changes = engine.store.watch.changes()
    assert (changes.everything, changes.manifests) == (False, {snapshot.manifest})


# --- who changes what pods see ---


def change_ref(root: Path) -> None:
    (root / "hub/models--org--m/refs/main").write_text("0" * 40)


def delete_ref(root: Path) -> None:
    (root / "hub/models--org--m/refs/main").unlink()


def empty_list(root: Path) -> None:
    (next((root / "hub/models--org--m/trees").glob("*.json"))).write_text("{}")


def delete_list(root: Path) -> None:
    shutil.rmtree(root / "hub/models--org--m/trees")


def close_file(root: Path) -> None:
    (root / "models/m/config.json").chmod(0)


def close_directory(root: Path) -> None:
    (root / "models/m/sub/deep").resolve().chmod(0o700)


def close_hub(root: Path) -> None:
    (root / "hub").chmod(0o700)


def close_ready_file(root: Path) -> None:
    (root / "ready/m.json").chmod(0o600)


def seen_by_pods(root: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of everything that pods may see, but for when it was published."""
    found = {}
    for place in ("models", "hub", "ready"):
        for at, _, files in os.walk(root / place):
            for path in (Path(at), *(Path(at, name) for name in files if name != "CACHEDIR.TAG")):
                try:
                    content = path.read_bytes() if path.is_file() else b""
                except PermissionError:  # until it is put right, its owner may not read it
                    content = b"closed"
                found[str(path)] = (path.stat().st_mode, b"" if place == "ready" else content)
    return found


@pytest.mark.parametrize(
    "change",
    [
        *(change_ref, delete_ref, empty_list, delete_list),
        *(close_file, close_directory, close_hub, close_ready_file),
    ],
)
def test_what_needs_no_byte_is_put_right_at_once_and_the_model_stays_ready(
    watched_for_all: Ground, change: Callable[[Path], None]
) -> None:
    ground, root = watched_for_all, watched_for_all.node.root
    before, published_at = seen_by_pods(root), ground.show("m")["ready"]["published_at"]
    change(root)
    assert seen_by_pods(root) != before
    began = time.monotonic()
    until(lambda: seen_by_pods(root) == before)
    assert time.monotonic() - began < LONGEST_LOOK_SECONDS
    assert ground.show("m")["ready"]["published_at"] == published_at


def lie(root: Path) -> None:
    told = (root / "ready/m.json").read_text()
    (root / "ready/m.json").write_text(told.replace('"verified": true', '"verified": false'))


def empty_ready_file(root: Path) -> None:
    os.truncate(root / "ready/m.json", 0)


def lead_elsewhere(root: Path) -> None:
    os.symlink("/etc", root / "models/elsewhere")
    (root / "models/elsewhere").rename(root / "models/m")


def move_tree(root: Path) -> None:
    tree = (root / "models/m").resolve()
    tree.chmod(0o755)
    tree.rename(root / "cache")


def move_models(root: Path) -> None:
    (root / "models").rename(root / "cache")


def move_hub(root: Path) -> None:
    (root / "hub").rename(root / "cache")


def move_ready_files(root: Path) -> None:
    (root / "ready").rename(root / "cache")


@pytest.mark.parametrize(
    "change",
    [
        *(lie, empty_ready_file, lead_elsewhere, move_tree),
        *(move_models, move_hub, move_ready_files),
    ],
)
def test_what_takes_a_model_from_pods_withdraws_it_at_once_and_it_comes_back_without_a_byte(
    watched_for_all: Ground, change: Callable[[Path], None]
) -> None:
    ground, root = watched_for_all, watched_for_all.node.root
    ground.hub.cdn.forget()
    ground.node.log.clear()
    before = seen_by_pods(root)
    wait_for_looks(root / "models/m", lambda: ground.node.metric("cachd_views_changed_total"))
    began = time.monotonic()
    change(root)
    ground.node.wait_for("readiness withdrawn", name="m")
    assert time.monotonic() - began < LONGEST_LOOK_SECONDS
    ground.node.wait_for("published", name="m")
    until(lambda: seen_by_pods(root) == before)
    assert ground.hub.cdn.bytes_sent() == 0
    if (root / "cache").exists():
        remove(root / "cache")


def test_what_cachd_changes_itself_withdraws_nothing(watched: Callable[..., Ground]) -> None:
    """Published, moved, rolled back, evicted, deleted: each is looked at a few times at most."""
    ground = watched(limit_bytes="40MiB")
    node = ground.node
    for number in range(20):
        ground.hub.add(f"org/m{number}", FILES | {"own": noise(100_000, number + 1)})
        node.pull(f"hf://org/m{number}", name=f"m{number}")
    for number in range(20):
        assert node.ready(f"m{number}").status == 200
    ground.hub.add("org/m0", FILES | {"own": noise(100_000, 50)})
    node.pull("hf://org/m0", name="m0", refresh=True)
    until(lambda: len(ground.show("m0")["previous"]) == 1)
    for _ in range(3):
        node.ask("POST", "/v1/models/m0/rollback")
    for number in range(1, 10):
        node.ask("DELETE", f"/v1/models/m{number}")
    node.ask("POST", "/v1/evictions", {"bytes": "39MiB"})
    node.ask("POST", "/v1/sweeps", {"everything": True})
    assert not [entry for entry in node.log if entry["event"] == "readiness withdrawn"]
    assert not [entry for entry in node.log if entry["event"] in ("mode restored", "directory recreated")]
    assert node.metric("cachd_verify_failures_total", stage="scrub") == 0
    assert node.metric("cachd_view_unwatched") == 0
    (directories,) = {node.metric("cachd_view_watches")}
    assert directories <= 7 + 6 * len(ground.node.ask("GET", "/v1/models").document["models"])


def test_more_changes_than_the_queue_holds_let_everything_be_looked_at(
    watching: Callable[..., tuple[Engine, Snapshot]], origin: Origin
) -> None:
    engine, _ = watching("m")
    engine.pull(origin.add_model("other", {"config.json": b"[]"}), name="other")
    plain, ready = places(engine.store.layout.root)["plain"], engine.store.layout.ready_file("other")
    engine.scrubs.start()
    until(lambda: engine.scrubs.as_document()["blobs"])
    wait_for_looks(plain, lambda: engine.metrics.view_changes._value.get())
    with engine.store.names.changing():  # the look at the first of them waits, and the queue fills
        for _ in range(MAX_QUEUED + 100):
            for name in ("config.json", "model.safetensors"):
                os.utime(plain / name)
        ready.unlink()
    until(ready.exists)


def test_a_file_that_is_gone_withdraws_its_model_though_the_disk_has_no_room_to_put_the_rest_right(
    watching: Callable[..., tuple[Engine, Snapshot]],
) -> None:
    engine, _ = watching("m")
    root = engine.store.layout.root
    remove((root / "models/m").resolve() / "config.json")
    remove(root / "hub/models--m/trees")
    (root / "hub/models--m/trees").touch()  # what no file can be written into
    assert "config.json is gone" in (engine.store.check("m", now=1.0) or "")
    assert not (root / "ready/m.json").exists()


def test_no_descriptor_is_left_of_a_watch(root: Path) -> None:
    def queues() -> int:
        links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return sum("inotify" in link for link in links)

    before = queues()
    with DiskStore(root) as store:
        for _ in range(2):
            store.watch.start()
        assert queues() == before + 2
    assert queues() == before


# --- limits of the kernel ---


def limited(root: Path, **limits: int) -> Node:
    """A daemon in a user namespace whose user may have no more of inotify than this."""
    written = "".join(f"echo {value} > /proc/sys/user/{name}; " for name, value in limits.items())
    return Node(root, before=("unshare", "-Ur", "sh", "-c", f'{written}exec "$@"', "sh"))


@pytest.mark.parametrize(
    ("limit", "most", "setting"),
    [
        ("max_inotify_watches", 12, "fs.inotify.max_user_watches"),
        ("max_inotify_instances", 1, "fs.inotify.max_user_instances"),
    ],
)
def test_what_the_kernel_does_not_watch_is_told_once_and_looked_at_all_the_same(
    tmp_path: Path, origin: Origin, limit: str, most: int, setting: str
) -> None:
    with limited(tmp_path / "node", **{limit: most}) as node:
        for name in ("one", "two"):
            node.pull(origin.add_model(name, FILES), name=name)
            assert node.ready(name).status == 200
        assert setting in node.wait_for("some directories of the views are not watched")["reason"]
        views = node.ask("GET", "/v1/capacity").document["views"]
        assert views["unwatched"] == node.metric("cachd_view_unwatched") > 0
        assert views["reason"].count(setting) == 1
        assert views["reason"] in node.cli("doctor").stdout
        (node.root / "ready/two.json").unlink()
        node.ask("POST", "/v1/models/two/verify")
        node.wait_for("readiness withdrawn", name="two")
        assert until(lambda: node.ready("two").status == 200)
        with (node.root / "models/two/model.safetensors").open("rb"):
            used = node.ask("GET", "/v1/models/two").document["last_used"]
            until(lambda: node.ask("GET", "/v1/models/two").document["last_used"] > used)
        event = "some directories of the views are not watched"
        assert len([e for e in node.log if e["event"] == event]) == 1
