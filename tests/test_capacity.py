"""What models take of a disk, what they may take, and what happens under pressure."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachd.errors import NoSpace, TooBig
from cachd.model import Digest, Percentage
from cachd.store.space import Space
from tests.conftest import spec_of
from tests.ground.disks import fill, remount
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import mapped, until
from tests.ground.small import MIB, PATIENCE_SECONDS, Disks, Engines, Nodes, Small, on_disk, ready_names

KIB = 1 << 10
BLOB = Digest("sha256", "0" * 64)

# --- what is taken and may be ---


def test_what_is_taken_is_what_du_and_the_file_system_count(
    disk: Disks, engine: Engines, origin: Origin
) -> None:
    """Two models share a file, a third was interrupted, a fourth is deleted and still mapped."""
    root = disk(96 * MIB, kind="ext4")
    on_it = Small(engine(root=root), origin)
    space, private = on_it.engine.store.space, root / ".cachd"
    empty = space.capacity()
    assert empty.usage.total == 0
    shared = noise(8 * MIB, 1)
    for name in ("one", "two"):
        on_it.engine.pull(
            origin.add_model(name, {"shared": shared, "own": noise(2 * MIB, len(name) + ord(name[0]))})
        )
    hold = origin.hold("/begun/f", after=3 * MIB)  # of each part
    pulling = on_it.engine.pulls.start(spec_of(origin.add_model("begun", {"f": noise(12 * MIB, 3)})))
    assert pulling is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    until(lambda: space.capacity().usage.ingests >= 12 * MIB)
    on_it.pull("mapped", 4 * MIB)
    with mapped(on_it.engine.store.layout.model("mapped") / "mapped"):
        on_it.engine.pulls.delete("mapped", force=True)
        now = space.capacity()
        assert now.usage.blobs == on_disk(private / "blobs") >= 12 * MIB
        assert now.usage.ingests == on_disk(private / "ingest") >= 12 * MIB
        assert now.usage.held == on_disk(private / "trash") >= 4 * MIB
        taken, counted = empty.free - now.free, now.usage.total
        assert counted <= taken < counted + MIB, "the rest is directories and what is written of models"
    hold.release()
    pulling.done.result(PATIENCE_SECONDS)


@pytest.mark.parametrize(
    ("limit", "reserve", "usable"),
    [
        (None, 0, 40),
        (20 * MIB, 0, 20),
        (None, 30 * MIB, 10),
        (Percentage(50), 0, 20),
        (20 * MIB, Percentage(75), 10),
    ],
)
def test_the_limit_and_the_reserve_bound_what_can_ever_be_held(
    disk: Disks, limit: int | Percentage | None, reserve: int | Percentage, usable: int
) -> None:
    space = Space(disk(40 * MIB), limit=limit, reserve_free=reserve)
    assert space.capacity().usable == usable * MIB
    with pytest.raises(TooBig) as refusal, space.reserve(0, total=usable * MIB + 1):
        pass
    assert refusal.value.facts == {"need": usable * MIB + 1, "usable": usable * MIB}


def test_a_model_that_can_never_fit_is_refused_before_its_first_byte(small: Small) -> None:
    small.pull("kept", 8 * MIB)
    with pytest.raises(TooBig):
        small.pull("big", 37 * MIB)
    assert small.origin.bytes_sent("/big") == 0
    assert small.names == ["kept"]


def test_a_limit_holds_though_the_disk_has_room(disk: Disks, engine: Engines, origin: Origin) -> None:
    limited = Small(engine(root=disk(64 * MIB), limit_bytes="20MiB", evict=False), origin)
    limited.pull("a")
    limited.pull("b")
    with pytest.raises(NoSpace) as refusal:
        limited.pull("c")
    taken = limited.engine.store.space.capacity().usage.total
    assert f"{taken} of limit_bytes {20 * MIB} used" in refusal.value.detail
    assert limited.origin.bytes_sent("/c") == 0


@pytest.mark.parametrize("evict", [False, True], ids=["evict: false", "evict: true"])
def test_only_where_cachd_may_evict_do_pressure_and_long_disuse_take_a_model(
    evict: bool, engine: Engines, origin: Origin
) -> None:
    store = Small(engine(evict=evict, evict_unused_seconds=60), origin)
    store.pull("a", MIB)
    store.age("a", 3600)
    store.engine.reclaim.watch.check_usage()
    assert store.names == ([] if evict else ["a"])
    store.pull("b", MIB)
    store.engine.store.space.change(reserve_free=0, limit=MIB // 2, reserve_inodes=0)
    store.engine.reclaim.watch.relieve()
    assert store.names == ([] if evict else ["a", "b"])
    reasons = [gone.reason for gone in store.engine.reclaim.evicted()]
    assert reasons == (["pressure", "unused"] if evict else [])


def test_an_operator_makes_room_though_cachd_may_evict_nothing_by_itself(
    engine: Engines, origin: Origin
) -> None:
    store = Small(engine(evict=False), origin)
    store.pull("a", MIB)
    store.engine.store.space.change(reserve_free=0, limit=MIB // 2, reserve_inodes=0)
    (gone,) = store.engine.reclaim.make_available(1)
    assert (gone.names, gone.reason, store.names) == (("a",), "asked", [])


def test_inodes_are_kept_free_too(disk: Disks, engine: Engines, origin: Origin) -> None:
    poor = Small(engine(root=disk(64 * MIB, inodes=300), reserve_inodes=150), origin)
    poor.pull("a", MIB)
    free = poor.engine.store.space.capacity().available_inodes
    assert free is not None
    root = poor.engine.store.layout.root
    for number in range(free - 60):
        (root.parent / f"file-{number}").touch()
    with pytest.raises(NoSpace) as refusal:
        poor.pull("b", MIB)
    assert "inodes are needed" in refusal.value.detail
    assert poor.names == ["a"], "what cannot make enough room stays"


def test_what_another_process_takes_of_a_promise_stops_grants_before_the_reserve(disk: Disks) -> None:
    root = disk(40 * MIB)
    space = Space(root, reserve_free=4 * MIB)
    with (
        space.reserve(30 * MIB, total=30 * MIB) as one,
        one.grant(20 * MIB, 20 * MIB) as first,
        one.grant(20 * MIB, 20 * MIB) as second,
    ):
        assert (first, second) == (20 * MIB, 0), "two at once would take the same bytes"
    with space.reserve(20 * MIB, total=20 * MIB) as reservation:
        (root.parent / "foreign").write_bytes(noise(20 * MIB))
        with reservation.grant(17 * MIB, 17 * MIB) as granted:
            assert not granted
        with reservation.grant(MIB, 15 * MIB) as granted:
            assert granted == 15 * MIB


def test_a_pull_that_lacks_less_than_its_overhead_is_made_room_for(small: Small, tmp_path: Path) -> None:
    """Bytes that fit on the disk, but not together with the overhead of their own pull, lack space."""
    for name in "abcd":
        small.pull(name)
    space = small.engine.store.space
    now = space.capacity()
    with space.reserve(now.available - MIB, total=MIB, files={BLOB: 24 * KIB}) as reservation:
        least = reservation.left - reservation.beside
        other = small.engine.store.layout.root / "of another process"
        other.write_bytes(noise(space.capacity().allocatable - least - reservation.beside // 2))
        with reservation.grant(least, least) as granted:
            assert not granted
        assert space.capacity().allocatable > least, "the bytes alone would fit"
        small.engine.reclaim.watch.relieve()
        with reservation.grant(least, least) as granted:
            assert granted == least


def test_grants_from_one_measurement_stop_soon_after_another_process_fills_a_large_disk(disk: Disks) -> None:
    root = disk(600 * MIB, kind="ext4")
    space = Space(root)
    with space.reserve(100 * MIB, total=100 * MIB) as reservation:

        def is_granted() -> bool:
            with reservation.grant(4096, 4096) as granted:
                return bool(granted)

        assert all(is_granted() for _ in range(100))
        filler = fill(root.parent)
        until(lambda: not is_granted())
        filler.unlink()
        assert is_granted()


# --- under pressure ---


def test_while_another_process_fills_the_disk_models_go_down_to_the_low_watermark(
    disk: Disks, engine: Engines, origin: Origin
) -> None:
    root = disk(64 * MIB, kind="ext4")
    store = Small(engine(root=root, reserve_free="8MiB", low_watermark="80%"), origin)
    for name, age in (("a", 5000), ("b", 4000), ("c", 3000)):
        store.pull(name)
        store.age(name, age)
    store.engine.reclaim.watch.relieve()
    assert store.names == ["a", "b", "c"], "no pressure, no eviction"
    free = store.engine.store.space.capacity().free
    (root.parent / "foreign").write_bytes(noise(free - 4 * MIB))
    store.engine.reclaim.watch.relieve()
    now = store.engine.store.space.capacity()
    room = now.total - now.reserve_free
    assert now.free - now.reserve_free >= room - Percentage(80).of(room)
    assert store.names == ["c"]
    assert [e.reason for e in store.engine.reclaim.evicted()] == ["pressure", "pressure"]


def test_a_limit_lowered_at_run_time_lets_go_what_may_and_keeps_what_is_pinned(
    disk: Disks, node: Nodes, origin: Origin
) -> None:
    running = node(str(disk(64 * MIB)), allow=[f"{origin.url}/"], limit_bytes="40MiB")
    for name in ("a", "b", "c", "kept"):
        running.pull(origin.add(f"/{name}", noise(8 * MIB, seed=ord(name[0]))))
        assert running.ready(name).status == 200
    running.ask("PUT", "/v1/models/kept/pin")
    running.configure(**{**running.options, "limit_bytes": "20MiB"})
    for _ in range(2):
        running.wait_for("evicted", reason="pressure")
    until(lambda: len(ready_names(running)) == 2)
    assert "kept" in ready_names(running)
    running.configure(**{**running.options, "limit_bytes": "9MiB"})
    until(lambda: len(ready_names(running)) == 1)
    running.configure(**{**running.options, "limit_bytes": "4MiB"})
    told = running.wait_for("too little space can be freed: the other models are protected")
    capacity = running.ask("GET", "/v1/capacity").document
    (kept,) = (snapshot["bytes"] for snapshot in capacity["snapshots"])
    assert told["held_by"] == [f"kept ({kept} bytes, pinned as kept)"]
    assert ready_names(running) == ["kept"]
    assert capacity["over_bytes"] == capacity["used_bytes"] - 4 * MIB > 0
    doctor = running.cli("doctor")
    assert (doctor.returncode, "over limit_bytes or reserve_free" in doctor.stdout) == (1, True)


def test_a_limit_that_no_eviction_can_reach_evicts_nothing(engine: Engines, origin: Origin) -> None:
    store = Small(engine(), origin)
    store.pull("kept", 8 * MIB)
    store.engine.store.pins.add("kept")
    store.pull("small", MIB)
    store.age("small", 3600)
    space, watch = store.engine.store.space, store.engine.reclaim.watch
    space.change(reserve_free=0, limit=4 * MIB, reserve_inodes=0)
    watch.relieve()
    assert store.names == ["kept", "small"]
    space.change(reserve_free=0, limit=17 * MIB // 2, reserve_inodes=0)
    watch.relieve()
    assert store.names == ["kept"]


def test_a_refusal_for_the_limit_speaks_of_the_limit(engine: Engines, origin: Origin) -> None:
    store = Small(engine(limit_bytes="12MiB"), origin)
    store.pull("kept", 8 * MIB)
    store.engine.store.pins.add("kept")
    with pytest.raises(NoSpace) as refused:
        store.pull("more", 6 * MIB)
    assert "raise limit_bytes" in refused.value.hint
    assert "other files" not in str(refused.value)


def test_a_pull_pauses_while_another_process_has_its_room_and_goes_on_when_it_is_back(
    disk: Disks, node: Nodes, origin: Origin
) -> None:
    """Its first file is here; the blocks promised to the second are taken. Nothing crosses the reserve."""
    root = disk(64 * MIB, kind="ext4")
    running = node(str(root), streams=1, reserve_free="8MiB")
    ref = origin.add_model("two", {"first.bin": noise(12 * MIB, 1), "second.bin": noise(10 * MIB, 2)})
    hold = origin.hold("/two/second.bin", after=0)
    running.pull(ref)
    assert hold.reached.wait(PATIENCE_SECONDS)
    free = running.ask("GET", "/v1/capacity").document["free_bytes"]
    filler = root.parent / "foreign"
    filler.write_bytes(noise(free - 12 * MIB))
    hold.release()
    running.wait_for("paused: the disk is at its reserve", file="second.bin")
    told = running.ask("GET", "/v1/models/two").document["pull"]
    assert (told["state"], told["paused"]) == ("downloading", True)
    now = running.ask("GET", "/v1/capacity").document
    assert now["free_bytes"] >= now["reserve_free_bytes"]
    assert now["over_bytes"] > 0
    filler.unlink()
    assert running.ready("two").status == 200
    assert running.ask("GET", "/v1/models/two").document["pull"]["paused"] is False
    assert origin.bytes_sent("/two/first.bin") == 12 * MIB, "nothing was fetched twice"


def test_a_disk_that_shrank_while_the_daemon_was_down_is_relieved_at_the_start(
    disk: Disks, node: Nodes, origin: Origin
) -> None:
    root = disk(64 * MIB)
    running = node(str(root), allow=[f"{origin.url}/"], reserve_free="4MiB")
    for name in ("a", "b", "c", "d"):
        running.pull(origin.add(f"/{name}", noise(8 * MIB, seed=ord(name))))
        assert running.ready(name).status == 200
    running.ask("PUT", "/v1/models/c/pin")
    running.kill()
    remount(root.parent, f"size={34 * MIB}")
    running.start()
    until(lambda: len(ready_names(running)) < 4)
    capacity = until(lambda: (now := running.ask("GET", "/v1/capacity").document)["over_bytes"] == 0 and now)
    assert capacity["free_bytes"] >= capacity["reserve_free_bytes"]
    assert "c" in ready_names(running)
