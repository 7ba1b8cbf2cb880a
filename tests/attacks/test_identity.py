"""Another tenant, who may ask for pulls from an origin of their own, and wants other pods to load it."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import Cancelled, Corrupt, InUse, Invalid, Unavailable
from cachd.model import Digest, Extent, File, Manifest, ModelSpec
from cachd.store.disk_store import DiskStore
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.hub import Hub
from tests.ground.models import noise, write_sha256sums
from tests.ground.node import Node
from tests.ground.origin import Origin, Status
from tests.ground.s3 import S3Server
from tests.ground.site import until
from tests.ground.stored import write
from tests.ground.weights import weights_of
from tests.test_pull import sign_in

Engines = Callable[..., Engine]
Nodes = Callable[..., Node]
MIB = 1 << 20
REAL, EVIL = {"config.json": b'{"model_type": "real"}'}, {"config.json": b'{"model_type": "evil"}'}


def main_of(root: Path, folder: str) -> str:
    return (root / "hub" / folder / "refs/main").read_text()


@pytest.mark.parametrize("pinned", [False, True])
def test_a_model_of_another_origin_never_stands_in_a_repository_of_the_hub(
    engine: Engines, hub: Hub, origin: Origin, root: Path, pinned: bool
) -> None:
    """Promised: No model of another source appears in the folder of a repository of the Hub."""
    running = engine(hf_endpoint=hub.url)
    hub.add("org/model", REAL)
    running.pull("hf://org/model")
    if pinned:
        running.store.pins.add("org--model")
    before = main_of(root, "models--org--model")
    evil = origin.add_model("evil", EVIL)
    for name in ("Org--model", "org--model-2", "x"):
        running.pull(evil, name=name)
    with pytest.raises(InUse) as refusal:
        running.pull(evil, name="org--model")
    assert refusal.value.code == "name_taken"
    assert main_of(root, "models--org--model") == before
    shown = (root / "hub/models--org--model/snapshots").rglob("config.json")
    assert {path.read_bytes() for path in shown} == {REAL["config.json"]}


def test_a_model_of_another_origin_that_came_first_leaves_the_repository_to_the_hub(
    engine: Engines, hub: Hub, origin: Origin, root: Path
) -> None:
    running = engine(hf_endpoint=hub.url)
    running.pull(origin.add_model("evil", EVIL), name="org--model")
    assert not (root / "hub/models--org--model").exists()
    hub.add("org/model", REAL)
    snapshot = running.pull("hf://org/model", name="real")
    assert main_of(root, "models--org--model") == snapshot.commit
    assert (root / f"hub/models--org--model/snapshots/{snapshot.commit}/config.json").read_bytes() == (
        REAL["config.json"]
    )


def test_a_name_that_another_model_has_in_the_hub_view_is_refused_to_a_third_source(
    engine: Engines, tmp_path: Path, origin: Origin, root: Path
) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share/config.json").write_bytes(REAL["config.json"])
    write_sha256sums(tmp_path / "share")
    running = engine(allow=("127.0.0.0/8", f"file://{tmp_path}/share/"))
    snapshot = running.pull(f"file://{tmp_path}/share", name="a--b")
    alike = "a-b-" + hashlib.sha256(b"a--b").hexdigest()[:8]
    assert snapshot.hub_folder == f"models--{alike}"
    with pytest.raises(InUse) as refusal:
        running.pull(origin.add_model("evil", EVIL), name=alike)
    assert refusal.value.code == "hub_id_taken"
    assert main_of(root, f"models--{alike}") == snapshot.commit
    assert running.store.names.get(alike) is None


def mirror(origin: Origin, name: str, files: dict[str, bytes] = REAL) -> str:
    return origin.add_model(name, files)


def test_a_mirror_stands_in_the_folder_of_the_repository_that_its_hub_id_names(
    engine: Engines, origin: Origin, root: Path
) -> None:
    running = engine()
    snapshot = running.pull(mirror(origin, "real"), name="x", hub_id="org/model")
    assert snapshot.repo == "org/model"
    shown = root / "hub/models--org--model/snapshots" / main_of(root, "models--org--model")
    assert (shown / "config.json").read_bytes() == REAL["config.json"]
    assert not (root / "hub/models--x").exists()


def test_a_folder_belongs_to_one_source_until_it_is_deleted(
    engine: Engines, hub: Hub, origin: Origin, root: Path
) -> None:
    """Promised: A folder of the Hub view shows one source; a second is refused, and nothing moves."""
    running = engine(hf_endpoint=hub.url)
    hub.add("org/model", REAL)
    snapshot = running.pull(mirror(origin, "real"), name="x", hub_id="org/model")
    for ref, hub_id in ((mirror(origin, "evil", EVIL), "org/model"), ("hf://org/model", None)):
        with pytest.raises(InUse) as refusal:
            running.pull(ref, name="y", hub_id=hub_id)
        assert refusal.value.code == "hub_id_taken"
    assert main_of(root, "models--org--model") == snapshot.commit
    asked = [seen for seen in origin.requests if "/evil/" in seen.path]
    assert not asked, "refused before anything is asked of the source"
    running.pulls.delete("x")
    assert running.pull("hf://org/model", name="y").repo == "org/model"


def test_a_hub_id_is_a_repository_and_of_another_source_than_the_hub() -> None:
    for ref, hub_id in (("hf://org/model", "org/other"), ("s3://bucket/x/", "../x"), ("s3://bucket/x/", "x")):
        with pytest.raises(Invalid):
            ModelSpec.asked(ref, "x", hub_id=hub_id)


def test_a_name_moves_to_another_hub_id_only_when_replace_is_said(
    engine: Engines, origin: Origin, root: Path
) -> None:
    running = engine()
    ref = mirror(origin, "real")
    running.pull(ref, name="x", hub_id="org/model")
    with pytest.raises(InUse) as refusal:
        running.pull(ref, name="x", hub_id="org/other")
    assert refusal.value.code == "name_taken"
    running.pull(ref, name="x", hub_id="org/other", replace=True)
    assert not (root / "hub/models--org--model/refs/main").exists()
    assert (root / "hub/models--org--other/refs/main").exists()


def test_a_branch_that_would_be_a_directory_where_another_is_a_file_is_refused_by_name(
    engine: Engines, hub: Hub, root: Path
) -> None:
    running = engine(hf_endpoint=hub.url)
    for revision in ("main", "main/x", "main/y"):
        hub.add("org/model", REAL | {"revision": revision.encode()}, revision=revision)
    running.pull("hf://org/model@main", name="a")
    with pytest.raises(InUse) as refusal:
        running.pull("hf://org/model@main%2Fx", name="b")
    assert refusal.value.code == "branch_taken"
    running.pull("hf://org/model@main%2Fx", name="a")
    assert (root / "hub/models--org--model/refs/main/x").exists()
    running.pull("hf://org/model@main%2Fy", name="b")
    with pytest.raises(InUse):
        running.pull("hf://org/model@main", name="b")
    assert (root / "hub/models--org--model/refs/main/y").exists()


# --- one content, two sources ---

# Two messages with one SHA-1 (https://shattered.io, 2017): they differ in two blocks.
_BEGINNING = (
    "255044462d312e330a25e2e3cfd30a0a0a312030206f626a0a3c3c2f57696474682032203020522f4865696768742033"
    "203020522f547970652034203020522f537562747970652035203020522f46696c7465722036203020522f436f6c6f72"
    "53706163652037203020522f4c656e6774682038203020522f42697473506572436f6d706f6e656e7420383e3e0a7374"
    "7265616d0affd8fffe00245348412d3120697320646561642121212121852fec092339759c39b1a1c63c4c97e1fffe01"
)
_ONE = (
    "7346dc9166b67e118f029ab621b2560ff9ca67cca8c7f85ba84c79030c2b3de218f86db3a90901d5df45c14f26fedfb3"
    "dc38e96ac22fe7bd728f0e45bce046d23c570feb141398bb552ef5a0a82be331fea48037b8b5d71f0e332edf93ac3500"
    "eb4ddc0decc1a864790c782c76215660dd309791d06bd0af3f98cda4bc4629b1"
)
_OTHER = (
    "7f46dc93a6b67e013b029aaa1db2560b45ca67d688c7f84b8c4c791fe02b3df614f86db1690901c56b45c1530afedfb7"
    "6038e972722fe7ad728f0e4904e046c230570fe9d41398abe12ef5bc942be33542a4802d98b5d70f2a332ec37fac3514"
    "e74ddc0f2cc1a874cd0c78305a21566461309789606bd0bf3f98cda8044629a1"
)
COLLIDING = bytes.fromhex(_BEGINNING + _ONE), bytes.fromhex(_BEGINNING + _OTHER)
WEIGHTS = noise(3 * MIB)
SMALL = noise(20_000, 3)


def inode_of(root: Path, name: str) -> int:
    return (root / "models" / name / "model.safetensors").stat().st_ino


def claims(origin: Origin, name: str, content: bytes, instead: bytes) -> str:
    """A directory whose sums claim `content`, and whose file has other bytes of the same size."""
    assert len(content) == len(instead)
    ref = origin.add_model(name, {"model.safetensors": content})
    origin.add(f"/{name}/model.safetensors", instead)
    return ref


def test_two_files_of_two_sources_with_one_sha1_stay_two(
    s3: S3Server, root: Path, engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promised: No source gets a file of another source by stating its digest: neither by a weak digest
    that collides, nor by the sha256 of content that it does not have.
    """
    assert len({hashlib.sha1(content).digest() for content in COLLIDING}) == 1 < len(set(COLLIDING))
    sign_in(monkeypatch, s3)
    running = engine(s3_endpoint_url=s3.url)
    for name, content in zip(("real", "evil"), COLLIDING, strict=True):
        s3.put("models", f"{name}/model.safetensors", content, checksum="SHA1")
        assert running.pull(f"s3://models/{name}/").verified_by == (("sha1", 1),)
    assert (weights_of(root, "real"), weights_of(root, "evil")) == COLLIDING


def test_two_files_of_two_sources_with_one_crc_stay_two(
    s3: S3Server, root: Path, engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = noise(MIB)
    evil = alike_by_crc32(real)
    assert real != evil
    sign_in(monkeypatch, s3)
    running = engine(s3_endpoint_url=s3.url)
    for name, content in {"real": real, "evil": evil}.items():
        s3.put("models", f"crc-{name}/model.safetensors", content, checksum="CRC32")
        assert running.pull(f"s3://models/crc-{name}/").verified_by == (("crc32", 1),)
    assert (weights_of(root, "crc-real"), weights_of(root, "crc-evil")) == (real, evil)


def alike_by_crc32(content: bytes) -> bytes:
    """Other bytes of the same length with the same CRC32: the last four are chosen for it."""
    changed = bytes([content[0] ^ 1]) + content[1:-4]
    wanted = zlib.crc32(content)
    # The checksum is linear: four bytes reach any value, found bit by bit (Gauss).
    base = zlib.crc32(changed + bytes(4))
    rows = [(zlib.crc32(changed + (1 << bit).to_bytes(4, "little")) ^ base, 1 << bit) for bit in range(32)]
    left, chosen = wanted ^ base, 0
    for bit in range(31, -1, -1):
        pivot = next(row for row in rows if row[0] >> bit & 1)
        rows = [
            (row[0] ^ pivot[0], row[1] ^ pivot[1]) if row[0] >> bit & 1 else row
            for row in rows
            if row is not pivot
        ]
        if left >> bit & 1:
            left, chosen = left ^ pivot[0], chosen ^ pivot[1]
    return changed + chosen.to_bytes(4, "little")


def test_a_repository_that_states_the_git_sha1_of_anothers_file_gets_nothing_of_it(
    engine: Engines, hub: Hub, root: Path
) -> None:
    running = engine(hf_endpoint=hub.url, retries=0)
    hub.add("org/secret", {"config.json": SMALL})
    running.pull("hf://org/secret")
    hub.add("evil/copy", {"config.json": SMALL})
    commit = hub.add("evil/copy", {"config.json": bytes(len(SMALL))})
    hub.misstate("evil/copy", "config.json", of="org/secret")
    with pytest.raises(Corrupt):
        running.pull("hf://evil/copy")
    assert not (root / "models/evil--copy").exists()
    assert any(f"/resolve/{commit}/config.json" in seen.path for seen in hub.requests)


@pytest.mark.parametrize("content", [WEIGHTS, SMALL], ids=["large", "small"])
def test_who_lists_the_sha256_of_a_file_that_is_here_and_lacks_it_gets_nothing(
    engine: Engines, origin: Origin, root: Path, content: bytes
) -> None:
    """Promised: No source gets a file of another source by stating its digest: neither by a weak digest
    that collides, nor by the sha256 of content that it does not have.
    """
    running = engine()
    running.pull(origin.add_model("real", {"model.safetensors": content}))
    before = inode_of(root, "real")
    evil = claims(origin, "evil", content, bytes(len(content)))
    with pytest.raises(Corrupt):
        running.pull(evil)
    assert not (root / "models/evil").exists()
    assert inode_of(root, "real") == before
    assert weights_of(root, "real") == content


def test_who_claims_by_the_digest_in_a_ref_must_prove_it_too(engine: Engines, origin: Origin) -> None:
    running = engine()
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    ref = origin.add("/evil", bytes(len(WEIGHTS)))
    with pytest.raises(Corrupt):
        running.pull(f"{ref}#sha256={hashlib.sha256(WEIGHTS).hexdigest()}")


def test_who_knows_a_part_of_a_file_gets_nothing_for_it(engine: Engines, origin: Origin, root: Path) -> None:
    """Its beginning is in every model of its kind."""
    running = engine()
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    known = WEIGHTS[: MIB // 2] + bytes(len(WEIGHTS) - MIB // 2)
    with pytest.raises(Corrupt):
        running.pull(claims(origin, "evil", WEIGHTS, known))
    assert not (root / "models/evil").exists()


def test_who_knows_most_of_a_file_does_not_try_until_the_samples_are_there(
    engine: Engines, origin: Origin
) -> None:
    """It breaks off whenever it is asked for what it does not know."""
    running = engine(retries=0)
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    for number in range(3):
        ref = origin.add_model(f"evil{number}", {"model.safetensors": WEIGHTS})
        origin.fault(f"/evil{number}/model.safetensors", Status(503))
        with pytest.raises(Unavailable):
            running.pull(ref)
    running.pull(origin.add_model("mirror", {"model.safetensors": WEIGHTS}))
    assert origin.bytes_sent("/mirror/model.safetensors") == len(WEIGHTS)


def test_an_s3_prefix_that_lists_the_sha256_of_a_file_that_is_here_gets_nothing(
    s3: S3Server, engine: Engines, origin: Origin, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, s3)
    running = engine(s3_endpoint_url=s3.url)
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    checksums = f"{hashlib.sha256(WEIGHTS).hexdigest()}  model.safetensors\n".encode()
    s3.put("models", "liar/model.safetensors", bytes(len(WEIGHTS)))
    s3.put("models", "liar/SHA256SUMS", checksums)
    with pytest.raises(Corrupt):
        running.pull("s3://models/liar/")
    assert not (root / "models/liar").exists()


def test_a_share_that_lists_the_sha256_of_a_file_that_is_here_gets_nothing(
    engine: Engines, origin: Origin, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share/model.safetensors").write_bytes(WEIGHTS)
    write_sha256sums(tmp_path / "share")
    (tmp_path / "share/model.safetensors").write_bytes(bytes(len(WEIGHTS)))
    running = engine(allow=("127.0.0.0/8", f"file://{tmp_path}/share/"))
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    with pytest.raises(Corrupt):
        running.pull(f"file://{tmp_path}/share", name="evil")
    assert not (root / "models/evil").exists()


def test_the_proof_is_asked_where_the_source_cannot_foretell_it(engine: Engines, origin: Origin) -> None:
    running = engine()
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    origin.forget()
    for name in ("a", "b"):
        running.pull(origin.add_model(name, {"model.safetensors": WEIGHTS}))
    asked = [seen.headers["range"] for seen in origin.requests if "range" in seen.headers]
    assert len(set(asked)) == len(asked) == 64


def test_who_joins_a_running_download_must_prove_it_too(engine: Engines, origin: Origin, root: Path) -> None:
    running = engine()
    hold = origin.hold("/real/model.safetensors", after=MIB)
    first = running.pulls.start(spec_of(origin.add_model("real", {"model.safetensors": WEIGHTS})))
    assert first is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    second = running.pulls.start(spec_of(claims(origin, "evil", WEIGHTS, bytes(len(WEIGHTS)))))
    third = running.pulls.start(spec_of(origin.add_model("mirror", {"model.safetensors": WEIGHTS})))
    assert second is not None
    assert third is not None
    until(lambda: second.progress.state == third.progress.state == "downloading")
    hold.release()
    first.done.result(PATIENCE_SECONDS)
    third.done.result(PATIENCE_SECONDS)
    with pytest.raises(Corrupt):
        second.done.result(PATIENCE_SECONDS)
    assert not (root / "models/evil").exists()
    assert inode_of(root, "mirror") == inode_of(root, "real")
    assert 0 < origin.bytes_sent("/mirror/model.safetensors") <= MIB // 2


def test_what_a_removed_model_or_a_cancelled_pull_left_is_nobodys(
    engine: Engines, origin: Origin, root: Path
) -> None:
    """Its blob may be here yet, or most of its bytes in an ingest: they are no claimant's either."""
    running = engine(streams=1)
    hold = origin.hold("/real/model.safetensors", after=2 * MIB)
    pulled = running.pulls.start(spec_of(origin.add_model("real", {"model.safetensors": WEIGHTS})))
    assert pulled is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    until(lambda: pulled.progress.done >= MIB)
    running.pulls.cancel("real")
    hold.release()
    with pytest.raises(Cancelled):
        pulled.done.result(PATIENCE_SECONDS)
    tail_only = bytes(2 * MIB) + WEIGHTS[2 * MIB :]
    with pytest.raises(Corrupt):
        running.pull(claims(origin, "evil", WEIGHTS, tail_only))
    assert not (root / "models/evil").exists()


def test_a_claimant_gets_nothing_after_a_restart_either(node: Nodes, origin: Origin) -> None:
    running = node(allow=[f"{origin.url}/"], retries=0)
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    assert running.ready("real").status == 200
    running.kill()
    running.start()
    running.pull(claims(origin, "evil", WEIGHTS, bytes(len(WEIGHTS))))
    assert running.ready("evil").document["code"] == "corrupt"


# --- a file that its source states by a weak digest ---


def test_a_small_file_of_the_hub_is_each_repositorys_own_and_stays_over_revisions(
    engine: Engines, hub: Hub, root: Path
) -> None:
    running = engine(hf_endpoint=hub.url)
    for repo in ("org/one", "org/two"):
        hub.add(repo, {"config.json": SMALL, "model.safetensors": WEIGHTS})
        running.pull(f"hf://{repo}")
    one, two = (root / f"models/org--{name}" for name in ("one", "two"))
    assert (one / "config.json").stat().st_ino != (two / "config.json").stat().st_ino
    assert (one / "model.safetensors").stat().st_ino == (two / "model.safetensors").stat().st_ino
    hub.add("org/one", {"config.json": SMALL, "model.safetensors": WEIGHTS, "new.json": b"{}"})
    hub.forget()
    running.pull("hf://org/one@main", name="later")
    assert [s.path.rpartition("/")[2] for s in hub.requests if "/resolve/" in s.path] == ["new.json"]


def sha256_digest(content: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(content).hexdigest())


def read_again(running: Engine, name: str) -> None:
    assert running.scrubs.verify(name).ended.wait(PATIENCE_SECONDS)


@pytest.fixture
def checked(s3: S3Server, engine: Engines, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A model of S3 that a CRC verifies is here under the name `crc`; a repository has its file, too."""
    sign_in(monkeypatch, s3)
    s3.put("models", "crc/model.safetensors", WEIGHTS, checksum="CRC64NVME")
    hub.add("org/model", {"model.safetensors": WEIGHTS})
    running = engine(s3_endpoint_url=s3.url, hf_endpoint=hub.url)
    running.pull("s3://models/crc/")
    return running


def test_a_file_that_is_known_by_a_crc_is_shared_only_after_it_was_read_again(
    checked: Engine, hub: Hub, root: Path
) -> None:
    checked.pull("hf://org/model", name="before")
    assert inode_of(root, "before") != inode_of(root, "crc")
    checked.store.withdraw("before")
    read_again(checked, "crc")
    hub.cdn.forget()
    checked.pull("hf://org/model", name="after")
    assert inode_of(root, "after") == inode_of(root, "crc")
    assert hub.cdn.bytes_sent() == 0


def test_such_a_file_is_shared_with_whom_proves_it_alone(checked: Engine, origin: Origin, root: Path) -> None:
    read_again(checked, "crc")
    with pytest.raises(Corrupt):
        checked.pull(claims(origin, "evil", WEIGHTS, bytes(len(WEIGHTS))))
    checked.pull(origin.add_model("mirror", {"model.safetensors": WEIGHTS}))
    assert inode_of(root, "mirror") == inode_of(root, "crc")


def test_other_bytes_with_its_crc_never_take_the_place_of_a_file_whose_sha256_is_known(root: Path) -> None:
    """Other sources may share the blob by its sha256, and its own source repairs it."""
    real = noise(MIB)
    crc = Digest("crc32", f"{zlib.crc32(real):08x}")
    file = File("a.bin", MIB, "s3://b/a.bin", crc, '"1"', sha256=sha256_digest(real))
    with DiskStore(root) as store:
        for content in (alike_by_crc32(real), real):
            ingest = store.content.begin(file)
            write(ingest, content, Extent(0, MIB))
            ingest.follow(memoryview(bytearray(MIB)))
            assert ingest.agrees
            if content != real:
                with pytest.raises(Corrupt):
                    store.content.commit(ingest)
                assert not store.content.has(file)
            else:
                store.content.commit(ingest)
        with pytest.raises(Corrupt):
            store.content.put(file, memoryview(alike_by_crc32(real)))
        with store.content.opened(file) as opened:
            assert opened.read() == real


# --- a root that was written before ---


def written_before(root: Path) -> None:
    """Let the root be as it was when sha1 and git-sha1 named blobs, and no ready file said `verified_by`."""
    for path in (root / ".cachd/manifests").glob("*.json"):
        document = json.loads(path.read_bytes())
        for file in Manifest.from_document(document).files:
            if file.digest and file.digest.algorithm == "git-sha1":
                old = root / f".cachd/blobs/git-sha1/{file.digest.hex}"
                old.parent.mkdir(mode=0o700, exist_ok=True)
                (root / f".cachd/blobs/origin/{file.blob.hex}").rename(old)
        del document["version"]
        for told in document["files"]:
            told.pop("sha256", None)
        path.write_text(json.dumps(document))
    for path in (root / "ready").glob("*.json"):
        document = json.loads(path.read_bytes())
        del document["verified_by"]
        path.write_text(json.dumps(document))
    (root / ".cachd/proven").unlink(missing_ok=True)


FILES = {"config.json": SMALL, "model.safetensors": WEIGHTS}


def test_a_blob_that_was_named_by_a_git_sha1_is_no_other_repositorys_and_is_repaired_as_its_own(
    node: Nodes, hub: Hub
) -> None:
    hub.add("org/model", FILES)
    running = node(hf_endpoint=hub.url)
    running.pull("hf://org/model", name="hub")
    assert running.ready("hub").status == 200
    running.stop()
    written_before(running.root)
    running.start()
    hub.add("org/other", {"config.json": SMALL})
    running.pull("hf://org/other", name="other")
    assert running.ready("other").status == 200
    places = [running.root / f"models/{name}/config.json" for name in ("hub", "other")]
    assert len({place.stat().st_ino for place in places}) == 2
    before = places[0].stat().st_ino
    old = next((running.root / ".cachd/blobs/git-sha1").iterdir())
    running.stop()
    with old.open("rb"):  # a file system may give the number of an inode that is gone to the next file
        old.unlink()
        running.start()  # which looks for every blob
        until(lambda: places[0].exists() and places[0].stat().st_ino != before)
    assert running.ready("hub").status == 200
    assert places[0].read_bytes() == SMALL
    assert not [*(running.root / ".cachd/blobs/git-sha1").iterdir()]
