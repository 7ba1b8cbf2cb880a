"""What models of several sources share on disk, what that costs, and what a root of before still has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.attacks.test_identity import (
    FILES,
    MIB,
    SMALL,
    WEIGHTS,
    claims,
    inode_of,
    read_again,
    sha256_digest,
    written_before,
)
from tests.conftest import PATIENCE_SECONDS, Engine
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import IgnoreRange, Origin
from tests.ground.s3 import S3Server
from tests.ground.site import until
from tests.ground.weights import weights_of
from tests.test_pull import sign_in

Engines = Callable[..., Engine]
Nodes = Callable[..., Node]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_source_that_proves_what_it_has_shares_the_file(
    engine: Engines, origin: Origin, root: Path, ranges: bool
) -> None:
    running = engine()
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    ref = origin.add_model("mirror", {"model.safetensors": WEIGHTS})
    if not ranges:
        origin.fault("/mirror/model.safetensors", IgnoreRange())
    running.pull(ref)
    assert inode_of(root, "mirror") == inode_of(root, "real")
    sent = origin.bytes_sent("/mirror/model.safetensors")
    assert 0 < sent <= (MIB // 2 if ranges else 2 * len(WEIGHTS))


def test_an_empty_file_needs_no_proof(engine: Engines, origin: Origin, root: Path) -> None:
    running = engine()
    for name in ("one", "two"):
        running.pull(origin.add_model(name, {"merges.txt": b"", "model.safetensors": WEIGHTS}))
    assert (root / "models/two/merges.txt").read_bytes() == b""


def test_what_a_source_has_proven_is_not_asked_again_after_a_restart(origin: Origin, node: Nodes) -> None:
    running = node(allow=[f"{origin.url}/"])
    refs = {name: origin.add_model(name, {"model.safetensors": WEIGHTS}) for name in ("real", "mirror")}
    for name, ref in refs.items():
        running.pull(ref)
        assert running.ready(name).status == 200
    running.kill()
    running.start()
    origin.forget()
    for name, ref in refs.items():
        running.pull(ref, name=f"{name}-again")
        assert running.ready(f"{name}-again").status == 200
        assert origin.bytes_sent(f"/{name}/model.safetensors") == 0


def test_a_killed_pull_of_many_small_files_fetches_none_again_that_was_here(
    origin: Origin, node: Nodes
) -> None:
    files = {f"{number:03}.json": noise(2_000, number) for number in range(200)}
    ref = origin.add_model("many", files)
    hold = origin.hold("/many/150.json", after=0)
    running = node(allow=[f"{origin.url}/"], streams=1)
    running.pull(ref)
    assert hold.reached.wait(PATIENCE_SECONDS)
    running.kill()
    hold.release()
    running.start()
    assert running.ready("many").status == 200
    assert origin.bytes_sent() - origin.bytes_sent("/many/SHA256SUMS") <= 2_000 * 201


def test_a_repository_of_the_hub_needs_no_proof(
    engine: Engines, hub: Hub, origin: Origin, root: Path
) -> None:
    running = engine(hf_endpoint=hub.url)
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    hub.add("org/model", {"model.safetensors": WEIGHTS})
    running.pull("hf://org/model")
    assert hub.cdn.bytes_sent() == 0
    assert inode_of(root, "org--model") == inode_of(root, "real")


def test_claims_are_trusted_where_the_operator_says_so(engine: Engines, origin: Origin, root: Path) -> None:
    running = engine(trust_claimed_digests=True)
    running.pull(origin.add_model("real", {"model.safetensors": WEIGHTS}))
    running.pull(claims(origin, "claimant", WEIGHTS, bytes(len(WEIGHTS))))
    assert origin.bytes_sent("/claimant/model.safetensors") == 0
    assert inode_of(root, "claimant") == inode_of(root, "real")


def test_a_small_file_of_the_hub_is_hashed_by_sha256_as_it_arrives(engine: Engines, hub: Hub) -> None:
    hub.add("org/model", {"config.json": SMALL, "large.json": noise(MIB - 1, 5), "a.safetensors": WEIGHTS})
    running = engine(hf_endpoint=hub.url)
    snapshot = running.pull("hf://org/model")
    files = {f.path: f for f in running.store.manifests.of(snapshot).files}
    assert snapshot.verified_by == (("git-sha1", 2), ("sha256", 1))
    assert files["config.json"].sha256 == sha256_digest(SMALL)
    assert files["large.json"].sha256 == sha256_digest(noise(MIB - 1, 5))


def test_a_damaged_file_that_a_crc_verifies_is_repaired_for_all_who_share_it(
    s3: S3Server, engine: Engines, hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, s3)
    s3.put("models", "shared/model.safetensors", WEIGHTS, checksum="CRC64NVME")
    hub.add("org/model", {"model.safetensors": WEIGHTS})
    running = engine(s3_endpoint_url=s3.url, hf_endpoint=hub.url)
    running.pull("s3://models/shared/")
    read_again(running, "shared")
    running.pull("hf://org/model", name="hub")
    before = inode_of(root, "shared")
    assert inode_of(root, "hub") == before
    blob = next((root / ".cachd/blobs/origin").iterdir())
    with blob.open("rb"):  # a file system may give the number of an inode that is gone to the next file
        blob.unlink()
        running.scrubs.start()
        for name in ("shared", "hub"):
            until(lambda name=name: holds_anew(root, name, before))
    assert weights_of(root, "shared") == weights_of(root, "hub") == WEIGHTS


def holds_anew(root: Path, name: str, before: int) -> bool:
    """Whether a model is ready with another file than before."""
    with suppress(FileNotFoundError):  # it is withdrawn in between
        return (root / f"ready/{name}.json").exists() and inode_of(root, name) != before
    return False


def test_models_of_a_root_that_was_written_before_stay_ready_and_cost_nothing(
    node: Nodes, hub: Hub, origin: Origin
) -> None:
    hub.add("org/model", FILES)
    running = node(hf_endpoint=hub.url, allow=["127.0.0.0/8", f"{origin.url}/"])
    web = origin.add_model("web", {**FILES, "config.json": noise(20_000, 7)})
    for ref, name in (("hf://org/model", "hub"), (web, "web")):
        running.pull(ref, name=name)
        assert running.ready(name).status == 200
    running.stop()
    written_before(running.root)
    before = (running.root / "models/hub/config.json").stat().st_ino
    running.start()
    assert running.ready("hub", wait=0).status == running.ready("web", wait=0).status == 200
    assert running.ready("hub").document["verified_by"] == {"git-sha1": 1, "sha256": 1}
    origin.forget()
    hub.forget()
    hub.add("org/model", {**FILES, "new.json": b"{}"})
    for ref, name in (("hf://org/model", "hub-again"), (web, "web-again")):
        running.pull(ref, name=name)
        assert running.ready(name).status == 200
    assert (running.root / "models/hub-again/config.json").stat().st_ino == before
    assert [s.path.rpartition("/")[2] for s in hub.requests if "/resolve/" in s.path] == ["new.json"]
    assert origin.bytes_sent() == origin.bytes_sent("/web/SHA256SUMS")
