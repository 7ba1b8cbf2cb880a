"""Scrubs: damage on the disk is found, the model withdrawn, one part fetched, the model whole again."""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cachd.errors import InUse, NotFound
from cachd.kernel.calls import resident_bytes
from cachd.model import Digest
from cachd.store import catalog
from cachd.store.reads import Reads
from cachd.store.scrub import Replaced, verify_blob
from cachd.store.scrub_log import ScrubLog
from cachd.store.withdrawals import Withdrawals
from tests.conftest import Engine, spec_of
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Status
from tests.ground.pause import paused_before
from tests.ground.site import (
    LONGEST_LOOK_SECONDS,
    MIB,
    PATIENCE_SECONDS,
    Ground,
    assert_problem,
    mapped,
    remove,
    until,
)

SIZE, PART = 24 * MIB, 4 * MIB
DAMAGED_AT = 9 * MIB + 77


CONTENT = noise(SIZE, 5)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def content_of(name: str) -> bytes:
    return noise(SIZE, zlib.crc32(name.encode()))


def have(ground: Ground, name: str, *, verified: bool = True) -> Path:
    """Pull a file with a digest under a name of its own; its blob. The first look at all is over by then."""
    until(lambda: ground.node.metric("cachd_view_watches"))
    content = content_of(name)
    ref = ground.origin.add(f"/{name}", content)
    ground.node.pull(f"{ref}#sha256={sha256(content)}" if verified else ref)
    assert ground.node.ready(name).status == 200
    ground.origin.forget()
    return blob_of(ground.node, name)


def blob_of(node: Node, name: str) -> Path:
    """The blob that a model of one file shows."""
    shown = (node.root / f"models/{name}/{name}").stat()
    return next(path for path in blobs(node) if path.stat().st_ino == shown.st_ino)


def blobs(node: Node) -> Iterator[Path]:
    return (path for path in (node.root / ".cachd/blobs").glob("*/*") if path.suffix != ".parts")


def flip(path: Path, at: int = DAMAGED_AT) -> None:
    """Turn over one bit, as a failing disk does: the file stays the same, its times aside, and nobody is
    told, since it is done through a mapping."""
    path.chmod(0o644)
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as seen:
        seen[at] ^= 4
    path.chmod(0o444)


def flipped(content: bytes, at: int = DAMAGED_AT) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def verify(ground: Ground, name: str) -> Any:
    """Verify a model to the end; the verification."""
    ground.node.log.clear()
    started = ground.node.ask("POST", f"/v1/models/{name}/verify")
    assert started.status == 202, started
    ground.node.wait_for("verified", name=name)
    return ground.show(name)["verification"]


def assert_whole(ground: Ground, name: str) -> None:
    """Ready, with the right bytes in both views, and nothing left of the damage."""
    content = content_of(name)
    assert ground.node.ready(name).status == 200
    for view in (f"models/{name}", f"hub/models--{name}"):
        shown = [path for path in (ground.node.root / view).resolve().rglob(name) if path.is_file()]
        assert shown
        assert all(path.read_bytes() == content for path in shown)
    assert list((ground.node.root / ".cachd/damaged").iterdir()) == []
    assert not (ground.node.root / f".cachd/quarantined/{name}.json").exists()


def test_one_flipped_bit_costs_one_part_and_disturbs_no_reader(ground: Ground) -> None:
    """Promised: A damaged file costs only its damaged part; its models are not ready until it is repaired,
    and a process that has the old file open keeps it."""
    blob = have(ground, "flipped")
    shown = (ground.node.root / "models/flipped/flipped").resolve()
    flip(blob)
    before = blob.stat().st_ino
    hold = ground.origin.hold("/flipped", after=0)
    with mapped(shown) as reader:
        told = verify(ground, "flipped")
        assert told["state"] == "damaged"
        assert [each["path"] for each in told["damaged"]] == ["flipped"]
        assert hold.reached.wait(PATIENCE_SECONDS)
        assert_problem(ground.node.ready("flipped", wait=0), 503, "damaged")
        assert not (ground.node.root / "ready/flipped.json").exists()
        assert not shown.exists()
        assert not blob.exists()
        hold.release()
        assert_whole(ground, "flipped")
        seen, _ = reader.communicate(timeout=30)
        assert seen.strip() == sha256(flipped(content_of("flipped")))
    assert [seen.extent for seen in ground.origin.requests if seen.method == "GET"] == [(8 * MIB, 12 * MIB)]
    assert blob.stat().st_ino != before
    assert verify(ground, "flipped")["state"] == "intact"


def truncate(blob: Path, size: int = 10 * MIB) -> None:
    blob.chmod(0o644)  # root may write what its owner may not
    os.truncate(blob, size)


def extend(blob: Path) -> None:
    blob.chmod(0o644)
    with blob.open("ab") as opened:
        opened.write(noise(5000))


def write(blob: Path) -> None:
    blob.chmod(0o644)
    with blob.open("r+b") as opened:
        opened.seek(DAMAGED_AT)
        opened.write(b"somebody")


def replace(blob: Path) -> None:
    other = blob.with_name("other")
    other.write_bytes(flipped(blob.read_bytes()))
    other.replace(blob)


def delete(blob: Path) -> None:
    blob.unlink()


def link(blob: Path) -> None:
    blob.unlink()
    blob.symlink_to("/etc/hostname")


@pytest.mark.parametrize(("damage", "fetched"), [(flip, PART), (replace, PART), (delete, SIZE), (link, SIZE)])
def test_a_damaged_blob_is_found_and_only_what_is_wrong_of_it_fetched(
    ground: Ground, damage: Callable[[Path], None], fetched: int
) -> None:
    name = f"blob-{damage.__name__}"
    damage(have(ground, name))
    # The watch may withdraw the model before the verification begins, which then finds no model.
    assert verify(ground, name)["state"] in ("damaged", "failed")
    assert_whole(ground, name)
    assert ground.origin.bytes_sent(f"/{name}") == fetched


@pytest.mark.parametrize(("damage", "fetched"), [(truncate, 16 * MIB), (extend, 0), (write, PART)])
@pytest.mark.parametrize("place", ["blob", "plain", "hub"])
def test_what_somebody_writes_into_a_published_file_withdraws_it_at_once(
    ground: Ground, damage: Callable[[Path], None], fetched: int, place: str
) -> None:
    """Through any of its names in the root; nobody asks for a verification, and no scrub is due."""
    name = f"{place}-{damage.__name__}"
    blob = have(ground, name)
    files = {
        "blob": blob,
        "plain": ground.node.root / f"models/{name}/{name}",
        "hub": next((ground.node.root / f"hub/models--{name}/snapshots").glob(f"*/{name}")),
    }
    ground.node.log.clear()
    damage(files[place])
    assert ground.node.wait_for("blob damaged", models=[name])["wrong"] == "somebody wrote into it"
    until(lambda: ground.node.ready(name).status == 200)
    assert_whole(ground, name)
    assert ground.origin.bytes_sent(f"/{name}") == fetched


def test_a_blob_that_only_got_another_time_is_whole(ground: Ground) -> None:
    blob = have(ground, "touched")
    os.utime(blob, (1, 1))
    assert verify(ground, "touched")["state"] == "intact"
    assert ground.node.ready("touched", wait=0).status == 200
    assert ground.origin.bytes_sent() == 0


@pytest.mark.parametrize(
    "gone",
    ["models/NAME", "models/NAME/NAME", "models/.trees/ID", "hub/models--NAME", "ready/NAME.json"],
    ids=lambda gone: gone.replace("/", "-"),
)
def test_what_an_operator_deleted_under_a_ready_model_comes_back_without_a_byte(
    ground: Ground, gone: str
) -> None:
    """Promised: A model stops being ready within two seconds after somebody deletes one of its files."""
    name = "deleted-" + gone.replace("/", "-").replace("--", "-").lower()
    have(ground, name)
    tree = (ground.node.root / "models" / name).readlink().name
    ground.node.log.clear()
    began = time.monotonic()
    remove(ground.node.root / gone.replace("NAME", name).replace("ID", tree))
    ground.node.wait_for("readiness withdrawn", name=name)
    assert time.monotonic() - began < LONGEST_LOOK_SECONDS
    until(lambda: ground.node.ready(name).status == 200)
    assert_whole(ground, name)
    assert ground.origin.bytes_sent() == 0


def test_a_file_of_a_view_that_was_replaced_is_the_blob_again(ground: Ground) -> None:
    have(ground, "swapped")
    shown = (ground.node.root / "models/swapped/swapped").resolve()
    other = ground.node.root / "swapped"
    other.write_bytes(flipped(content_of("swapped")))
    ground.node.log.clear()
    shown.parent.chmod(0o755)  # root may change what its owner may not
    other.replace(shown)
    ground.node.wait_for("readiness withdrawn", name="swapped")
    until(lambda: ground.node.ready("swapped").status == 200)
    assert_whole(ground, "swapped")
    assert ground.origin.bytes_sent() == 0


def test_a_model_without_digests_is_verified_by_the_hashes_of_its_parts(ground: Ground) -> None:
    blob = have(ground, "undigested", verified=False)
    assert verify(ground, "undigested")["state"] == "intact"
    flip(blob)
    assert verify(ground, "undigested")["state"] == "damaged"
    assert_whole(ground, "undigested")
    assert ground.origin.bytes_sent("/undigested") == PART


def is_ready(ground: Ground, name: str) -> bool:
    return ground.node.ready(name).status == 200


def test_two_models_that_share_a_damaged_blob_are_both_withdrawn_and_both_come_back(ground: Ground) -> None:
    ground.hub.add("org/one", {"model.safetensors": CONTENT, "config.json": b'{"of": 1}'})
    ground.hub.add("org/two", {"model.safetensors": CONTENT, "config.json": b'{"of": 2}'})
    for name in ("one", "two"):
        ground.node.pull(f"hf://org/{name}", name=name)
        assert ground.node.ready(name).status == 200
    shared = (ground.node.root / "models/one/model.safetensors").stat().st_ino
    flip(next(path for path in blobs(ground.node) if path.stat().st_ino == shared))
    ground.hub.cdn.forget()
    verify(ground, "one")
    assert ground.node.wait_for("readiness withdrawn", name="two")
    for name in ("one", "two"):
        until(functools.partial(is_ready, ground, name))  # it is damaged until its repair has begun
        assert (ground.node.root / f"models/{name}/model.safetensors").read_bytes() == CONTENT
    assert ground.hub.cdn.bytes_sent() == PART


def test_a_scrub_finds_the_damage_by_itself(hub: Hub, node: Callable[..., Node]) -> None:
    hub.add("org/model", {"model.safetensors": CONTENT})
    running = node(hf_endpoint=hub.url, streams=4, scrub_bytes_per_second="1GB", scrub_interval_seconds=0.2)
    running.pull("hf://org/model")
    assert running.ready("org--model").status == 200
    running.kill()
    hub.cdn.forget()
    flip(max(blobs(running), key=lambda path: path.stat().st_size))
    running.start()
    assert running.wait_for("blob damaged")["models"] == ["org--model"]
    assert running.ready("org--model").status == 200
    assert (running.root / "models/org--model/model.safetensors").read_bytes() == CONTENT
    assert hub.cdn.bytes_sent() == PART
    assert running.metric("cachd_verify_failures_total", stage="scrub") == 1
    assert running.metric("cachd_scrub_bytes_total") >= SIZE
    told = running.ask("GET", "/v1/scrubs").document
    assert (told["bytes_per_second"], told["blobs"], told["damaged"]) == (10**9, 1, [])


@pytest.mark.parametrize("what", ["view", "blob"])
def test_the_periodic_check_finds_what_an_operator_deleted(
    origin: Origin, engine: Callable[..., Engine], root: Path, what: str
) -> None:
    """With no scrub at all."""
    opened = engine(scrub_bytes_per_second=0, streams=4)
    snapshot = opened.pull(f"{origin.add('/model.bin', CONTENT)}#sha256={sha256(CONTENT)}")
    blob = opened.store.content.path(opened.store.manifests.of(snapshot).files[0].blob)
    shown = (root / "models/model.bin/model.bin").resolve()
    origin.forget()
    if what == "view":
        remove(shown)
    else:
        truncate(blob, PART)
    before = opened.pulls.get("model.bin")
    opened.scrubs.start()
    while (repair := opened.pulls.get("model.bin")) is before or repair is None:
        pass
    assert repair.done.result(PATIENCE_SECONDS).manifest == snapshot.manifest
    assert shown.read_bytes() == CONTENT
    assert origin.bytes_sent("/model.bin") == (SIZE - PART if what == "blob" else 0)


def test_a_restart_does_not_begin_the_scrub_anew(alone: Callable[..., Ground]) -> None:
    ground = alone()
    have(ground, "read.bin")
    pulled_at = ground.show("read.bin")["verified_at"]
    verify(ground, "read.bin")
    read_at = ground.show("read.bin")["verified_at"]
    assert read_at > pulled_at
    assert ground.node.stop() == 0
    ground.node.start()
    assert ground.show("read.bin")["verified_at"] == read_at


def test_a_repair_that_is_killed_goes_on_with_the_same_revision_though_its_branch_moved(
    hub: Hub, node: Callable[..., Node]
) -> None:
    commit = hub.add("org/model", {"model.safetensors": CONTENT})
    path = hub.cdn_path("org/model", "model.safetensors")
    running = node(hf_endpoint=hub.url, streams=4)
    running.pull("hf://org/model")
    assert running.ready("org--model").status == 200
    hub.cdn.forget()
    hub.add("org/model", {"model.safetensors": noise(SIZE, 6)})
    hold = hub.cdn.hold(path, after=MIB)
    flip(max(blobs(running), key=lambda path: path.stat().st_size))
    running.ask("POST", "/v1/models/org--model/verify")
    assert hold.reached.wait(PATIENCE_SECONDS)
    running.kill()
    hold.release()
    assert not (running.root / "ready/org--model.json").exists()
    hub.cdn.forget()
    running.start()
    told = running.ready("org--model")
    assert (told.status, told.document["revision"]) == (200, commit)
    assert (running.root / "models/org--model/model.safetensors").read_bytes() == CONTENT
    assert PART - MIB <= hub.cdn.bytes_sent() <= PART  # what was received before the kill may be here


def test_a_model_whose_source_is_away_stays_damaged_and_is_repaired_when_it_is_back(
    alone: Callable[..., Ground],
) -> None:
    ground = alone(sweep_interval_seconds=0, keep_unfinished_seconds=0)
    blob = have(ground, "away")
    ground.origin.fault("*", Status(503))
    flip(blob)
    verify(ground, "away")
    ground.node.wait_for("pull ended", state="failed")
    assert "hashes to" in ground.show("away")["damage"]["reason"]
    assert ground.node.ready("away", wait=0).document["code"] in ("damaged", "not_ready")  # tried again now
    assert ground.node.ask("POST", "/v1/sweeps", {"everything": True}).document["swept"] == []
    ground.node.log.clear()
    ground.origin.clear()
    ground.node.wait_for("published", name="away")
    assert_whole(ground, "away")


def test_a_damaged_model_that_waits_for_its_repair_is_kept_across_sweeps_and_restarts(
    origin: Origin, engine: Callable[..., Engine], root: Path
) -> None:
    opened = engine()
    snapshot = opened.pull(f"{origin.add('/model.bin', CONTENT)}#sha256={sha256(CONTENT)}")
    file = opened.store.manifests.of(snapshot).files[0]
    blob = opened.store.content.path(file.blob)
    assert opened.store.quarantine(file, "wrong", blob.stat().st_ino, now=5.0) == ["model.bin"]
    assert opened.store.sweep_snapshots() == 0
    with closing(opened.store.content.begin(file)) as ingest:
        assert ingest.gaps() == []
    assert (root / "models/.trees" / snapshot.manifest).is_dir()
    again = catalog.read_quarantined(opened.store.layout, {})["model.bin"]
    assert (again.snapshot.spec, again.since, again.reason) == (snapshot.spec, 5.0, "model.bin: wrong")


def test_a_damaged_model_can_be_deleted(alone: Callable[..., Ground]) -> None:
    ground = alone()
    blob = have(ground, "away")
    ground.origin.fault("*", Status(503))
    flip(blob)
    verify(ground, "away")
    ground.node.wait_for("pull ended", state="failed")
    assert ground.node.ask("DELETE", "/v1/models/away").status == 200
    assert_problem(ground.node.ask("GET", "/v1/models/away"), 404, "no_such_model")
    left = ground.node.ask("POST", "/v1/sweeps", {"everything": True}).document
    assert left["swept"] == []
    assert list(blobs(ground.node)) == list((ground.node.root / ".cachd/damaged").iterdir()) == []


def test_no_repair_brings_a_model_back_that_is_being_deleted(
    engine: Callable[..., Engine], origin: Origin, root: Path
) -> None:
    opened = engine()
    spec = opened.pull(f"{origin.add('/m', CONTENT)}#sha256={sha256(CONTENT)}").spec
    origin.fault("*", Status(404))
    flip(next((root / ".cachd/blobs/sha256").iterdir()))
    opened.scrubs.verify("m")
    until(lambda: (pull := opened.pulls.get("m")) is not None and pull.error)
    with paused_before(Withdrawals.withdraw, lambda: opened.pulls.delete("m")) as deleting:
        assert opened.store.names.quarantine_of("m")
        assert opened.pulls.start_by_itself(spec, repairs=True) is None
    deleting.result(PATIENCE_SECONDS)
    assert opened.pulls.start_by_itself(spec, repairs=True) is None
    assert opened.pulls.get("m") is None


def test_the_command_verifies_and_its_exit_code_tells(ground: Ground) -> None:
    blob = have(ground, "commanded")
    ended = ground.node.cli("verify", "commanded", "-o", "json")
    assert (ended.returncode, json.loads(ended.stdout)["state"]) == (0, "intact")
    assert json.loads(ended.stdout)["bytes"] == {"total": SIZE, "done": SIZE}
    flip(blob)
    ended = ground.node.cli("verify", "commanded")
    assert ended.returncode == 8
    assert "commanded: it hashes to sha256:" in ended.stdout
    assert ground.node.cli("wait", "commanded").returncode == 0
    assert ground.node.cli("verify", "unheard-of").returncode == 3


@contextmanager
def reading(path: Path, engine: Engine, spec: str) -> Iterator[threading.Event]:
    """A thread that reads a blob over and over until it is deleted; the event is set once it has begun."""
    store = engine.store
    manifest = store.manifests.of(next(s for s in store.names.all() if s.name == spec))
    began, over = threading.Event(), threading.Event()

    def read() -> None:
        with suppress(Replaced):
            while not over.is_set():
                wrong = verify_blob(path, manifest.files[0], store.content.reads, lambda _: began.set())
                assert wrong is None or not path.exists(), wrong

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert began.wait(PATIENCE_SECONDS)
        yield began
    finally:
        over.set()
        thread.join()


def test_our_own_reading_is_never_taken_for_a_pods(origin: Origin, engine: Callable[..., Engine]) -> None:
    url = origin.add("/model.bin", CONTENT)
    opened = engine()
    snapshot = opened.pull(f"{url}#sha256={sha256(CONTENT)}")
    manifest = opened.store.manifests.of(snapshot)
    path = opened.store.content.path(manifest.files[0].blob)
    with reading(path, opened, snapshot.name):
        assert not any(opened.store.protection.is_in_use(manifest) for _ in range(200))
        opened.pulls.delete(snapshot.name)


@pytest.mark.parametrize("direct", [os.O_DIRECT, 0], ids=["past the page cache", "through it"])
@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "not resident"])
def test_a_scrub_changes_nothing_of_what_is_in_memory(
    origin: Origin,
    engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    direct: int,
    is_resident: bool,
) -> None:
    url = origin.add("/model.bin", CONTENT)
    opened = engine()
    snapshot = opened.pull(f"{url}#sha256={sha256(CONTENT)}")
    file = opened.store.manifests.of(snapshot).files[0]
    path = opened.store.content.path(file.blob)
    with path.open("rb") as held:
        if is_resident:
            held.read()
        else:
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = resident_bytes(held.fileno(), 0, SIZE)
        if before and not is_resident:
            pytest.skip("this directory is in memory itself (tmpfs): nothing there is ever cold")
        assert before == (SIZE if is_resident else 0)
        monkeypatch.setattr(os, "O_DIRECT", direct)
        assert verify_blob(path, file, Reads(), lambda _: None) is None
        assert resident_bytes(held.fileno(), 0, SIZE) == before


def test_verifying_while_models_come_and_go_raises_no_false_alarm(
    origin: Origin, engine: Callable[..., Engine]
) -> None:
    opened = engine(scrub_bytes_per_second=10**9, scrub_interval_seconds=0.01)
    refs = {f"model-{i}": f"{origin.add(f'/model-{i}', noise(MIB, i))}" for i in range(2)}
    opened.scrubs.start()
    over = threading.Event()

    def verify_all() -> None:
        while not over.is_set():
            for snapshot in opened.store.names.all():
                opened.scrubs.check_all_soon()
                with suppress(NotFound):  # deleted meanwhile
                    opened.scrubs.verify(snapshot.name)

    thread = threading.Thread(target=verify_all)
    thread.start()
    try:
        for _ in range(3):
            for name, ref in refs.items():
                opened.pull(ref, name=name)
            for name in refs:
                ready = opened.store.names.get(name)
                assert ready is not None
                if name == "model-0":
                    until(lambda ready=ready: unless_read(lambda: opened.store.evict(ready.manifest)))
                else:
                    until(lambda name=name: unless_read(lambda: opened.pulls.delete(name)))
    finally:
        over.set()
        thread.join()
    assert opened.metrics.registry.get_sample_value("cachd_verify_failures_total", {"stage": "scrub"}) == 0
    assert opened.store.names.quarantined() == []
    assert (opened.metrics.registry.get_sample_value("cachd_scrub_bytes_total") or 0) > 0
    assert opened.pulls.start(spec_of(refs["model-0"], name="model-0")) is not None


def unless_read(remove: Callable[[], object]) -> bool:
    """Remove, unless the scrub reads the file right then, for longer than a question to the kernel waits."""
    with suppress(InUse):
        remove()
        return True
    return False


def test_the_scrub_log_is_written_at_most_every_ten_seconds(tmp_path: Path) -> None:
    path, clock = tmp_path / "scrub_log.json", iter([0.0, 9.0, 11.0, 11.0])
    blob = Digest("sha256", "ab" * 32)
    log = ScrubLog(path, now=lambda: 1000.0, clock=lambda: next(clock))
    log.verified(blob)
    assert not path.exists()
    log.verified(blob)
    assert json.loads(path.read_text()) == {str(blob): 1000.0}
