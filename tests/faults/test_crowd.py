"""Many at once: callers, pulls that share blobs, daemons on one root, a queue, a loop that never waits."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hashlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.errors import CachdError, InUse, NotFound, Unavailable
from cachd.model import Digest, ModelSpec
from cachd.store.disk_store import DiskStore
from cachd.store.overhead import beside_file
from cachd.store.space import bytes_beside
from cachd.transfer.request import Pull
from tests.conftest import Engine, spec_of
from tests.ground.hub import Hub
from tests.ground.models import digests, noise
from tests.ground.needs import needs, refuse
from tests.ground.node import Answer, Node
from tests.ground.origin import Fault, Flip, Origin, Status
from tests.ground.program import CACHD, run
from tests.ground.site import Ground, assert_problem, files_left, names, said, until

MIB = 1 << 20
PATIENCE_SECONDS = 120
Grounds = Callable[..., Ground]
Engines = Callable[..., Engine]
SHARED = noise(6 * MIB, seed=99)


def sent(origin: Origin, file: str) -> int:
    """Bytes of a file that left the origin, whatever the model it was asked for."""
    return sum(seen.sent for seen in origin.requests if seen.path.endswith(f"/{file}"))


# --- one model, many callers ---


async def test_a_thousand_callers_of_a_cold_model_cause_one_transfer_and_get_one_answer_each(
    ground: Ground,
) -> None:
    ref, node = ground.add("thousand.bin"), ground.node
    hold, later = (ground.origin.hold("/thousand.bin", after=after) for after in (MIB, 3 * MIB))
    before = {name: node.metric(f"cachd_{name}_total") for name in ("misses", "joins")}
    done: list[int] = []
    async with aiohttp.ClientSession(node.url, connector=aiohttp.TCPConnector(limit=0)) as crowd:

        async def ask() -> int:
            async with crowd.post("/v1/models", json={"ref": ref, "name": "thousand.bin"}) as answer:
                await answer.read()
                return answer.status

        async def wait() -> tuple[int, str]:
            async with crowd.get("/v1/models/thousand.bin/ready?wait=60") as answer:
                return answer.status, (await answer.json()).get("manifest")

        async def look() -> str:
            async with crowd.get("/v1/models/thousand.bin") as answer:
                shown = await answer.json()
                done.append(shown["pull"]["bytes"]["done"])
                return str(shown["state"])

        async def watch() -> None:
            while await look() != "ready":
                if done[-1] > done[0]:
                    later.release()

        asked = await asyncio.gather(*(ask() for _ in range(1000)))
        callers = [asyncio.create_task(wait()) for _ in range(1000)]
        await look()
        watcher = asyncio.create_task(watch())
        hold.release()
        answers = await asyncio.gather(*callers)
        await watcher
    assert set(asked) == {202}
    assert {status for status, _ in answers} == {200}
    assert len({manifest for _, manifest in answers}) == 1
    assert ground.origin.bytes_sent("/thousand.bin") == 6 * MIB
    assert node.metric("cachd_misses_total") - before["misses"] == 1
    assert node.metric("cachd_joins_total") - before["joins"] == 999
    assert done == sorted(done)
    assert done[-1] == 6 * MIB
    assert len(set(done)) > 1, "it was seen on its way"


def test_the_pull_of_a_name_is_cancelled_and_another_of_the_same_files_goes_on(alone: Grounds) -> None:
    ground = alone()
    ref, node = ground.add("first.bin"), ground.node
    hold = ground.origin.hold("/first.bin", after=MIB)
    node.pull(ref)
    assert hold.reached.wait(PATIENCE_SECONDS)
    node.pull(ref, name="second")
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(node.ready, "second")
        wait_for_state(ground, "second", "downloading")
        assert node.ask("DELETE", "/v1/models/first.bin").status == 200
        hold.release()
        assert waiting.result(PATIENCE_SECONDS).status == 200
    assert names(ground) == ["second"]
    assert ground.origin.bytes_sent("/first.bin") == 6 * MIB, "what the first one fetched was not lost"


def wait_for_state(ground: Ground, name: str, state: str) -> None:
    while ground.show(name)["state"] != state:
        assert ground.show(name)["state"] not in {"failed", "cancelled"}


# --- two models, shared blobs ---

PROOF_BYTES = 32 * (16 << 10)  # which the second source sends of a blob that the first one brought


@pytest.mark.parametrize("end", ["fails", "is cancelled", "is deleted"])
def test_a_model_that_shares_a_blob_with_another_is_unmoved_when_that_one(
    origin: Origin, root: Path, engine: Engines, end: str
) -> None:
    running = engine()
    models = {
        name: {"shared.bin": SHARED, "own.bin": noise(MIB, seed), "small.bin": noise(5000, seed)}
        for seed, name in enumerate(("one", "two"))
    }
    one, two = (spec_of(origin.add_model(name, files)) for name, files in models.items())
    holds = [origin.hold(f"/{name}/shared.bin", after=MIB) for name in models]
    if end == "fails":
        origin.fault("/one/own.bin", Status(404))
    first = began(running, one)
    if end == "fails":
        with pytest.raises(NotFound):
            first.done.result(PATIENCE_SECONDS)
    else:
        assert holds[0].reached.wait(PATIENCE_SECONDS)
    second = began(running, two, downloads=2)
    if end == "is cancelled":
        running.pulls.delete("one")
    for hold in holds:
        hold.release()
    if end == "is deleted":
        first.done.result(PATIENCE_SECONDS)
        running.pulls.delete("one")
    second.done.result(PATIENCE_SECONDS)
    expected = {path: hashlib.sha256(content).hexdigest() for path, content in models["two"].items()}
    assert digests(root / "models/two") == expected
    if end != "fails":
        assert sent(origin, "shared.bin") == len(SHARED) + PROOF_BYTES
        assert running.pulls.get("one") is None
    else:
        running.pulls.delete("one")
    blobs = {path.name for path in (root / ".cachd/blobs/sha256").iterdir() if path.suffix != ".parts"}
    assert blobs == set(expected.values())
    running.pulls.delete("two")
    assert files_left(root) == []


@pytest.mark.parametrize("fault", [Status(404), Status(503), Flip(3 * MIB)], ids=["gone", "failing", "lying"])
def test_a_blob_that_another_models_origin_cannot_give_is_fetched_from_the_models_own(
    origin: Origin, root: Path, engine: Engines, fault: Fault
) -> None:
    running = engine(retries=0)
    bad, good = (spec_of(origin.add_model(name, {"shared.bin": SHARED})) for name in ("bad", "good"))
    hold = origin.hold("/bad/shared.bin", after=0)
    origin.fault("/bad/shared.bin", fault)
    first = began(running, bad)
    assert hold.reached.wait(PATIENCE_SECONDS)
    second = began(running, good, downloads=1)
    hold.release()
    second.done.result(PATIENCE_SECONDS)
    assert digests(root / "models/good") == {"shared.bin": hashlib.sha256(SHARED).hexdigest()}
    try:
        first.done.result(PATIENCE_SECONDS)
    except CachdError:
        assert not (root / "models/bad").exists()
    else:  # it has proven by samples, which may miss a wrong bit, that it has the blob of the other
        assert isinstance(fault, Flip)
        assert digests(root / "models/bad") == digests(root / "models/good")


def beside(pull: Pull) -> int:
    """What is reserved for a model of large files beside their bytes, before one is here."""
    assert pull.progress.manifest is not None
    return bytes_beside({f.blob: beside_file(f, by_ingest=True) for f in pull.progress.manifest.files})


def test_space_promised_to_a_pull_that_joined_a_transfer_stays_promised_when_the_first_leaves(
    origin: Origin, engine: Engines
) -> None:
    """One stream: the first file holds it, so the second file's transfer has not taken its space yet."""
    running = engine(streams=1)
    files = {"large.bin": noise(8 * MIB), "shared.bin": SHARED}
    one, two = (spec_of(origin.add_model(name, files)) for name in ("one", "two"))
    holds = [origin.hold(f"/{name}/large.bin", after=MIB) for name in ("one", "two")]
    began(running, one)
    assert holds[0].reached.wait(PATIENCE_SECONDS)
    second = began(running, two, downloads=2)
    running.pulls.delete("one")
    promised = 8 * MIB + len(SHARED)
    now = running.store.space.capacity()
    assert now.reserved + now.usage.ingests >= promised + beside(second), "what is on disk is paid"
    for hold in holds:
        hold.release()
    second.done.result(PATIENCE_SECONDS)
    assert running.store.space.capacity().reserved == 0


def test_the_blocks_of_a_file_that_two_pulls_wait_for_are_taken_off_both_promises_once(
    origin: Origin, engine: Engines
) -> None:
    """Once the file is there, no pull needs space for it: space still reserved would stay free for nobody."""
    running = engine(streams=4)
    shared, own = noise(2 * MIB, seed=98), 3 * MIB
    one, two = (
        spec_of(origin.add_model(name, {"shared.bin": shared, "own.bin": noise(own, seed=seed)}))
        for seed, name in enumerate(("one", "two"))
    )
    others = [origin.hold(f"/{name}/own.bin", after=0) for name in ("one", "two")]
    hold = origin.hold("/one/shared.bin", after=0)
    first = began(running, one, downloads=2)
    assert hold.reached.wait(PATIENCE_SECONDS)
    second = began(running, two, downloads=2)
    space, promised = running.store.space, len(shared) + own + beside(first)
    assert space.capacity().reserved == 2 * promised
    hold.release()
    blob = running.store.layout.blob(Digest("sha256", hashlib.sha256(shared).hexdigest()))
    until(blob.exists)
    assert first.progress.manifest is not None
    (arrived,) = [f for f in first.progress.manifest.files if f.path == "shared.bin"]
    left = promised - len(shared) - beside_file(arrived, by_ingest=True)
    until(lambda: space.capacity().reserved <= 2 * left)
    assert space.capacity().reserved == 2 * left
    for other in others:
        other.release()
    for pull in (first, second):
        pull.done.result(PATIENCE_SECONDS)
    assert space.capacity().reserved == 0


def began(running: Engine, spec: ModelSpec, *, downloads: int = 0) -> Pull:
    """Start the pull of a spec, and wait until it has so many downloads."""
    pull = running.pulls.start(spec)
    assert pull is not None
    while len(pull.progress._downloads) < downloads:
        assert not pull.done.done()
    return pull


# --- one model, opposite requests ---


def test_a_pull_and_a_delete_of_one_model_at_one_moment_end_with_it_whole_or_gone(alone: Grounds) -> None:
    ground = alone(pulls=1)
    node = ground.node
    files = {"a.bin": noise(300_000), "b.bin": noise(1000, 2)}
    ref = ground.origin.add_model("torn", files)
    expected = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    with ThreadPoolExecutor(4) as both:
        for turn in range(20):
            calls = [
                both.submit(node.pull, ref),
                both.submit(node.ask, "DELETE", "/v1/models/torn?force=true"),
                both.submit(node.pull, ref, refresh=True),
                both.submit(node.ready, "torn", wait=0.01 * (turn % 4)),
            ]
            answers = [call.result(PATIENCE_SECONDS) for call in calls]
            assert {a.status for a in answers} <= {200, 202, 404, 503}, [a.document for a in answers]
            end = node.ready("torn")
            assert end.status in {200, 404} or end.document["code"] == "cancelled", end.document
            if end.status == 200:
                assert digests(node.root / "models/torn") == expected
    node.pull(ref)
    assert node.ready("torn").status == 200
    assert digests(node.root / "models/torn") == expected
    node.ask("DELETE", "/v1/models/torn?force=true")
    assert files_left(node.root) == []


def test_a_model_asked_for_again_by_force_is_the_old_one_for_readers_until_the_new_one_is_whole(
    alone: Grounds,
) -> None:
    ground = alone()
    node, origin = ground.node, ground.origin
    old, new = noise(MIB, 1), noise(6 * MIB, 2)
    ref = origin.add_model("model", {"model.bin": old})
    node.pull(ref)
    assert node.ready("model").status == 200
    origin.add_model("model", {"model.bin": new})
    hold = origin.hold("/model/model.bin", after=MIB)
    seen: list[bytes] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            content = (node.root / "models/model/model.bin").read_bytes()
            if not seen or seen[-1] != content:
                seen.append(content)

    with ThreadPoolExecutor(1) as pods:
        reader = pods.submit(read)
        try:
            assert node.pull(ref, refresh=True).status == 202
            assert hold.reached.wait(PATIENCE_SECONDS)
            assert node.ready("model", wait=0).document["bytes"] == len(old)
            assert (node.root / "models/model/model.bin").read_bytes() == old
            hold.release()
            node.wait_for("pull ended", name="model", size_bytes=len(new))
        finally:
            over.set()
        reader.result(PATIENCE_SECONDS)
    seen.append((node.root / "models/model/model.bin").read_bytes())
    assert [len(content) for content in seen if content in (old, new)] == [len(content) for content in seen]
    assert seen[0] == old
    assert seen[-1] == new
    assert len(seen) <= 3, "it went from the old to the new, once"


def test_a_configuration_read_again_in_mid_pull_leaves_that_pull_alone(alone: Grounds) -> None:
    ground = alone(retries=2)
    node = ground.node
    with ground.held("running.bin") as hold:
        listed = {"ref": ground.add("listed.bin"), "name": "listed.bin", "pin": True}
        node.configure(
            **{**node.options, "models": [listed], "limit_bytes_per_second": "900MB", "retries": 0}
        )
        node.wait_for("bandwidth limits", all=900_000_000)
        node.wait_for("published", name="listed.bin")
        assert ground.show("running.bin")["state"] == "downloading"
        hold.release()
        assert node.ready("running.bin").status == 200
    assert ground.origin.bytes_sent("/running.bin") == 6 * MIB, "nothing was begun anew"
    assert ground.show("listed.bin")["pinned"] is True


# --- two daemons, one root ---


def note(root: Path) -> str:
    return (root / ".cachd/lock").read_text()


@contextmanager
def somebody() -> Iterator[int]:
    """A process that does nothing until it is done with."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process.pid


def left_by(pid: int, root: Path) -> str:
    """The note that a process would have left in the root's lock."""
    with DiskStore(root):
        own = note(root)
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    head, place = own.splitlines()[0], own.splitlines()[1].split()
    return f"{head.replace(place[0], str(pid))}\n{' '.join([str(pid), *place[1:-1], started])}\n"


def test_a_root_is_refused_while_the_one_its_note_names_lives_though_no_lock_holds_it(root: Path) -> None:
    """As on a network file system whose locks hold nobody back."""
    with somebody() as pid:
        left = left_by(pid, root)
        (root / ".cachd/lock").write_text(left)
        with pytest.raises(InUse) as refusal:
            DiskStore(root)
        assert refusal.value.code == "root_locked"
        assert f"pid {pid} on" in refusal.value.detail
        assert note(root) == left
        serve = [*CACHD, "serve", "--no-wait", "--root", root, "--listen", "127.0.0.1:0"]
        refused = run(serve, timeout=PATIENCE_SECONDS)
        assert refused.returncode == 9
        assert "code: root_locked" in refused.stderr
    with DiskStore(root):
        assert f"pid {os.getpid()} on" in note(root)
    assert note(root) == ""


@pytest.mark.parametrize("word", range(4), ids=["another file", "another boot", "another space", "later"])
def test_a_note_in_the_lock_file_of_a_process_that_ended_keeps_nobody_out(root: Path, word: int) -> None:
    """A pid is used again: after a boot, in another container, for a later process; and roots are copied."""
    with somebody() as pid:
        head, told = left_by(pid, root).splitlines()
        words = told.split()
        words[word + 1] = words[word + 1][:-1] + ("0" if words[word + 1][-1] != "0" else "1")
        (root / ".cachd/lock").write_text(f"{head}\n{' '.join(words)}\n")
        DiskStore(root).close()


# --- the queue ---


def test_a_pull_beyond_the_queue_is_503_with_retry_after_and_those_inside_are_unmoved(alone: Grounds) -> None:
    ground = alone(pulls=1, queued_pulls=2)
    node, refs = ground.node, [ground.add(f"queued-{number}.bin", MIB) for number in range(3)]
    with ground.held("busy.bin"):
        assert [node.pull(ref).status for ref in refs[:2]] == [202, 202]
        refused = node.pull(refs[2])
        assert_problem(refused, 503, "queue_full")
        assert int(said(refused, "Retry-After")) >= 1
        assert "queued_pulls" in refused.document["hint"]
        assert_problem(node.ready("queued-2.bin", wait=0), 404, "no_such_model")
        assert node.pull(refs[0]).status == 202, "who joins takes no place"
        assert node.metric("cachd_pull_queue_length") == 2
        assert node.ask("DELETE", "/v1/models/queued-0.bin").status == 200
        assert node.pull(refs[2]).status == 202
    for number in (1, 2):
        assert node.ready(f"queued-{number}.bin").status == 200
    assert node.metric("cachd_pull_queue_length") == 0


def test_a_start_goes_on_with_more_pulls_than_may_wait_now(origin: Origin, root: Path) -> None:
    refs = [origin.add(f"/left-{number}.bin", noise(MIB, number)) for number in range(5)]
    hold = origin.hold("*", after=1000)
    with opened(root, pulls=1) as before:
        for ref in refs:
            began(before, spec_of(ref))
        assert hold.reached.wait(PATIENCE_SECONDS)
    with opened(root, pulls=1, queued_pulls=0) as after:
        after.pulls.resume()
        going_on = after.pulls.running()
        with pytest.raises(Unavailable) as refusal:
            after.pulls.start(spec_of(f"{origin.url}/one-more.bin"))
        assert refusal.value.code == "queue_full"
        hold.release()
        assert len([pull.done.result(PATIENCE_SECONDS) for pull in going_on]) == 5


@contextmanager
def opened(root: Path, **options: object) -> Iterator[Engine]:
    plain: dict[str, Any] = {"root": root, "allow": ("127.0.0.0/8", "http://127.0.0.1/"), "reserve_free": 0}
    with assembled(Config(**{**plain, **options})) as parts:
        yield Engine(parts)


def test_ten_thousand_pulls_wait_in_little_memory_and_are_ended_at_once(hub: Hub, tmp_path: Path) -> None:
    """The root is in memory where possible, because each spec is synced to disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    hub.add("org/slow", {"config.json": b"{}"})
    hold = hub.hold("/api/models/org/slow", after=0)
    with tempfile.TemporaryDirectory(dir=memory) as place:
        root = Path(place)
        root.chmod(0o755)
        with opened(root, hf_endpoint=hub.url, pulls=1) as running:
            began(running, spec_of("hf://org/slow"))
            assert hold.reached.wait(PATIENCE_SECONDS)
            before = resident()
            for number in range(10_000):
                running.pulls.start(spec_of(f"hf://org/model-{number}"))
            assert (resident() - before) / 10_000 < 12_000, "bytes of memory a pull that waits"
            with pytest.raises(Unavailable) as refusal:
                running.pulls.start(spec_of("hf://org/too-many"))
            assert refusal.value.code == "queue_full"
        hold.release()
        left = [path.suffix for path in (root / ".cachd/pending").iterdir()]
        assert left.count(".json") == 10_001, "they go on at the next start"


def resident() -> int:
    """Bytes of memory this process has, rubbish taken out."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_source_that_hangs_keeps_the_pulls_of_another_waiting_for_one_turn_at_most(alone: Grounds) -> None:
    ground = alone(pulls=2)
    node, hub = ground.node, ground.hub
    for number in range(6):
        hub.add(f"org/slow-{number}", {"config.json": b"{}"})
    holds = [hub.hold(f"/api/models/org/slow-{number}", after=0) for number in range(6)]
    try:
        for number in range(6):
            node.pull(f"hf://org/slow-{number}")
        for hold in holds[:2]:
            assert hold.reached.wait(PATIENCE_SECONDS)
        for number in range(3):
            node.pull(ground.add(f"quick-{number}.bin", MIB))
        holds[0].release()
        for number in range(3):
            assert node.ready(f"quick-{number}.bin").status == 200, "before five that came sooner"
        assert ground.show("org--slow-5")["state"] == "queued"
    finally:
        for hold in holds:
            hold.release()


# --- the loop ---


@contextmanager
def hung_share() -> Iterator[Path]:
    """A mounted file system whose server never answers: whoever looks at it hangs until it is cut off."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryDirectory() as place:
        server = os.open("/dev/fuse", os.O_RDWR)
        told = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"hung", place.encode(), b"fuse", 0, told):
            os.close(server)
            refuse("/dev/fuse", os.strerror(ctypes.get_errno()))
        try:
            yield Path(place)
        finally:
            os.close(server)  # whoever hangs is told that nobody serves it
            libc.umount2(place.encode(), 2)


@needs("mount", "/dev/fuse")
def test_shares_that_hang_hold_up_neither_probes_nor_other_pulls(alone: Grounds) -> None:
    with hung_share() as share:
        ground = alone(pulls=3, allow=["127.0.0.0/8", f"file://{share}/"])
        node = ground.node
        for number in range(2):
            node.pull(f"file://{share}/model-{number}")
        wait_for_state(ground, "model-1", "resolving")
        ground.have("beside.bin")
        for path in ("/livez", "/readyz", "/metrics", "/v1/models"):
            assert node.ask("GET", path).status == 200


def test_probes_are_answered_while_bytes_are_hashed_and_thousands_of_files_deleted(alone: Grounds) -> None:
    ground = alone()
    node = ground.node
    files = {f"part-{number:04}.bin": b"%d" % number for number in range(300)}
    ground.hub.add("org/many", files)
    node.pull("hf://org/many")
    node.pull(ground.add("hashed.bin", 64 * MIB))
    with ThreadPoolExecutor(1) as pods:
        pulling = pods.submit(node.ready, "org--many")
        assert probed_until(pulling, node) > 3
        deleting = pods.submit(node.ask, "DELETE", "/v1/models/org--many")
        assert probed_until(deleting, node) > 3
        assert deleting.result().document["freed_bytes"] >= sum(map(len, files.values()))
    assert node.ready("hashed.bin").status == 200


def probed_until(ended: Future[Answer], node: Node) -> int:
    """How many rounds of the kubelet's probes were answered while something else went on."""
    rounds = 0
    while not ended.done():
        for path in ("/livez", "/readyz"):
            assert node.ask("GET", path).status == 200
        rounds += 1
    return rounds
