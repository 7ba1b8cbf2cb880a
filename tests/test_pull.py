"""A pull from a real origin: what is published, what is fetched, and what a failure leaves."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import CachdError, Corrupt, Forbidden, NotFound, Unavailable
from cachd.model import Digest, File
from cachd.sources.wire import Wire
from cachd.transfer.download.download import Download
from tests.conftest import Engine, sha256_of, spec_of
from tests.ground.hub import Hub
from tests.ground.models import digests, minilm, noise, safetensors_model, write_sha256sums
from tests.ground.needs import needs
from tests.ground.nginx import Nginx
from tests.ground.origin import (
    Chunked,
    Endless,
    Fault,
    Flip,
    Gzip,
    IgnoreRange,
    LoginPage,
    NoContentRange,
    Origin,
    Redirect,
    Reset,
    Short,
    Status,
    Swap,
    TooLong,
    WrongRange,
    WrongTotal,
)
from tests.ground.s3 import Checksum, S3Server
from tests.ground.site import until

KIB = 1 << 10
MIB = 1 << 20
Engines = Callable[..., Engine]


def assert_published(root: Path, name: str, expected: dict[str, str], *, hub: Path) -> None:
    """Both views hold exactly the expected files: right bytes, read-only, three links each."""
    plain = root / "models" / name
    for view in (plain, hub):
        assert digests(view) == expected
        for path in expected:
            status = (view / path).lstat()
            assert stat.S_IMODE(status.st_mode) == 0o444
            assert stat.S_ISREG(status.st_mode)
            assert os.path.samestat(status, (plain / path).lstat())
            links = 1 + 2 * [expected[p] for p in expected].count(expected[path])
            assert status.st_nlink == links, f"{path}: {status.st_nlink} links"
    for directory, _, _ in os.walk(plain.resolve()):
        assert stat.S_IMODE(Path(directory).stat().st_mode) == 0o555


def hub_snapshot(root: Path, repo: str, revision: str = "main") -> Path:
    """Where a Hub client finds a repository's revision."""
    folder = root / "hub" / ("models--" + repo.replace("/", "--"))
    return folder / "snapshots" / (folder / "refs" / revision).read_text()


# --- every source ---


@needs("nginx")
def test_a_directory_of_nginx_is_published_in_both_views(tmp_path: Path, root: Path, engine: Engines) -> None:
    model = safetensors_model(tmp_path / "web" / "model", shards=3, shard_bytes=12 * MIB, seed=3)
    expected = digests(model)
    write_sha256sums(model)
    with Nginx(tmp_path / "web") as nginx:
        snapshot = engine().pull(f"{nginx.url}/model/")
    assert snapshot.verified
    assert_published(root, "model", expected, hub=hub_snapshot(root, "model"))


@pytest.mark.parametrize("checksum", ["SHA256", "CRC64NVME", "CRC32C", "CRC32"])
def test_a_prefix_of_a_real_s3_server_is_published_in_both_views(
    s3: S3Server,
    tmp_path: Path,
    root: Path,
    engine: Engines,
    monkeypatch: pytest.MonkeyPatch,
    checksum: Checksum,
) -> None:
    model = safetensors_model(tmp_path / "made", shards=2, shard_bytes=9 * MIB, seed=4)
    prefix = f"llama-{checksum.lower()}"
    for path in digests(model):
        s3.put("models", f"{prefix}/{path}", model / path, checksum=checksum)
    sign_in(monkeypatch, s3)
    snapshot = engine(s3_endpoint_url=s3.url).pull(f"s3://models/{prefix}/")
    assert snapshot.verified
    assert_published(root, prefix, digests(model), hub=hub_snapshot(root, prefix))


def test_a_model_of_the_hub_is_published_in_both_views(hub: Hub, root: Path, engine: Engines) -> None:
    model = minilm()
    hub.add("org/minilm", {path: model / path for path in digests(model)})
    snapshot = engine(hf_endpoint=hub.url).pull("hf://org/minilm")
    assert snapshot.verified
    assert_published(root, "org--minilm", digests(model), hub=hub_snapshot(root, "org/minilm"))
    assert not hub.leaked


def test_a_shared_volume_is_copied_and_verified_by_its_sums(
    tmp_path: Path, root: Path, engine: Engines
) -> None:
    model = safetensors_model(tmp_path / "share" / "model", shards=2, shard_bytes=5 * MIB, seed=5)
    expected = digests(model)
    write_sha256sums(model)
    snapshot = engine(allow=[f"file://{tmp_path}/share/"]).pull(f"file://{model}")
    assert snapshot.verified
    assert_published(root, "model", expected, hub=hub_snapshot(root, "model"))


def test_sums_that_list_themselves_are_no_file_of_the_model(
    tmp_path: Path, root: Path, engine: Engines
) -> None:
    model = safetensors_model(tmp_path / "share" / "model", shards=1, shard_bytes=MIB, seed=6)
    expected = digests(model)
    with write_sha256sums(model).open("a") as listing:
        listing.write(f"{digest(b'')}  SHA256SUMS\n")
    engine(allow=[f"file://{tmp_path}/share/"]).pull(f"file://{model}")
    assert digests(root / "models/model") == expected


def test_one_url_is_one_file_verified_by_the_digest_in_its_ref(
    origin: Origin, root: Path, engine: Engines, tmp_path: Path
) -> None:
    content = noise(9 * MIB)
    (tmp_path / "it").write_bytes(content)
    origin.add("/asr/model.bin", content)
    snapshot = engine().pull(f"{origin.url}/asr/model.bin#sha256={sha256_of(tmp_path / 'it')}", name="asr")
    assert snapshot.verified
    assert (root / "models/asr/model.bin").read_bytes() == content


def test_a_model_without_digests_is_published_as_unverified(
    origin: Origin, root: Path, engine: Engines
) -> None:
    """Promised: A file that a reader can see was hashed by cachd to the digest its source declares, or its
    model is marked unverified.
    """
    origin.add("/model.bin", noise(5 * MIB))
    snapshot = engine().pull(f"{origin.url}/model.bin")
    assert not snapshot.verified
    assert (root / "models/model.bin/model.bin").read_bytes() == noise(5 * MIB)
    told = json.loads((root / "ready/model.bin.json").read_bytes())
    assert (told["verified"], told["verified_by"]) == (False, {"none": 1})


def test_a_composite_checksum_is_not_taken_for_a_digest(
    s3: S3Server, root: Path, engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put_multipart("models", "composite/model.bin", noise(11 * MIB), part_bytes=5 * MIB, checksum="SHA256")
    sign_in(monkeypatch, s3)
    snapshot = engine(s3_endpoint_url=s3.url).pull("s3://models/composite/")
    assert not snapshot.verified
    assert (root / "models/composite/model.bin").read_bytes() == noise(11 * MIB)


def test_include_and_exclude_narrow_a_model_in_both_views(hub: Hub, root: Path, engine: Engines) -> None:
    files = {"config.json": b"{}", "model.safetensors": noise(2 * MIB), "pytorch_model.bin": noise(MIB, 2)}
    hub.add("org/model", files)
    engine(hf_endpoint=hub.url).pull("hf://org/model", exclude=("*.bin",))
    assert set(digests(root / "models/org--model")) == {"config.json", "model.safetensors"}
    assert set(digests(hub_snapshot(root, "org/model"))) == {"config.json", "model.safetensors"}


def test_equal_files_of_a_model_are_fetched_once_and_linked_twice(
    hub: Hub, root: Path, engine: Engines
) -> None:
    shard = noise(6 * MIB)
    hub.add("org/twice", {"a.safetensors": shard, "b.safetensors": shard})
    engine(hf_endpoint=hub.url).pull("hf://org/twice")
    assert (root / "models/org--twice/a.safetensors").stat().st_nlink == 5
    assert hub.cdn.bytes_sent() == 6 * MIB


def test_a_new_revision_fetches_only_what_differs_and_moves_the_name(
    hub: Hub, root: Path, engine: Engines
) -> None:
    kept, old, new = noise(6 * MIB, 1), noise(6 * MIB, 2), noise(6 * MIB, 3)
    first = hub.add("org/model", {"a.safetensors": kept, "b.safetensors": old})
    running = engine(hf_endpoint=hub.url, keep_previous=0)
    snapshot = running.pull("hf://org/model@main")
    second = hub.add("org/model", {"a.safetensors": kept, "b.safetensors": new})
    hub.cdn.forget()
    refreshed = running.begin(snapshot.spec, refresh=True)
    assert refreshed.done.result(60).revision == second
    assert hub.cdn.bytes_sent() == 6 * MIB
    assert (root / "models/org--model/b.safetensors").read_bytes() == new
    assert (root / "hub/models--org--model/refs/main").read_text() == second
    running.pulls.close()  # the sweep that follows a pull is done
    assert not (root / "hub/models--org--model/snapshots" / first).exists()
    blobs = (root / ".cachd/blobs/sha256").iterdir()
    assert len([path for path in blobs if path.suffix != ".parts"]) == 2


def test_a_blob_that_lost_its_tail_is_fetched_anew_and_its_links_follow(
    origin: Origin, root: Path, engine: Engines
) -> None:
    content = noise(6 * MIB)
    origin.add("/model.bin", content)
    running = engine()
    snapshot = running.pull(f"{origin.url}/model.bin#sha256={digest(content)}")
    (root / "models/model.bin/model.bin").chmod(0o644)
    os.truncate(root / "models/model.bin/model.bin", MIB)
    running.begin(snapshot.spec, refresh=True).done.result(60)
    assert (root / "models/model.bin/model.bin").read_bytes() == content
    assert (hub_snapshot(root, "model.bin") / "model.bin").read_bytes() == content


def test_streams_share_a_file(origin: Origin, engine: Engines) -> None:
    origin.add("/model.bin", noise(64 * MIB))
    engine(streams=4).pull(f"{origin.url}/model.bin")
    extents = [seen.extent for seen in origin.requests if seen.method == "GET" and seen.extent]
    assert len(extents) >= 8
    assert sorted(e[0] for e in extents) == sorted({e[0] for e in extents})
    assert origin.bytes_sent() == 64 * MIB


def test_each_stream_has_a_file_for_itself_while_there_are_enough(
    origin: Origin, engine: Engines, root: Path
) -> None:
    """So its digest is taken of what has just come: nothing is read back while every core is at work."""
    files = {f"shard-{number}.bin": noise(10 * MIB, number) for number in range(5)}
    ref = origin.add_model("model", files)
    holds = [origin.hold(f"/model/{path}", after=MIB) for path in list(files)[:4]]
    running = engine(streams=4)
    pull = running.begin(spec_of(ref))
    for hold in holds:
        assert hold.reached.wait(60)
    for hold in holds:
        hold.release()
    pull.done.result(60)
    assert digests(root / "models/model") == {path: digest(content) for path, content in files.items()}


def test_a_file_that_a_stream_has_for_itself_costs_fewer_requests(origin: Origin, engine: Engines) -> None:
    large = noise(128 * MIB)
    origin.add("/alone.bin", large)
    ref = origin.add_model("model", {"large.bin": large, **{f"{n}.json": noise(KIB, n) for n in range(40)}})
    running = engine(streams=32)
    for asked in (f"{origin.url}/alone.bin", ref):
        running.pull(asked)

    def parts(path: str) -> int:
        """Parts asked for. What a stream left for later, as on a busy machine, ends where its part does."""
        asked = [seen.extent for seen in origin.requests if seen.method == "GET" and seen.path == path]
        return len({extent[1] for extent in asked if extent})

    assert parts("/alone.bin") == 32
    assert parts("/model/large.bin") == 16


# --- origins that misbehave, and recover ---

PASSING = {
    "cut short": Short(at=3 * MIB),
    "reset": Reset(at=3 * MIB),
    "busy": Status(503),
    "rate limited": Status(429, {"Retry-After": "0"}),
    "wrong range": WrongRange(),
    "no Content-Range": NoContentRange(),
    "wrong total": WrongTotal(),
    "too long": TooLong(extra=100),
    "gzip": Gzip(),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_a_passing_fault_costs_a_retry_and_no_byte_of_the_model(
    origin: Origin, root: Path, engine: Engines, fault: Fault
) -> None:
    content = noise(24 * MIB)
    origin.add("/model.bin", content)
    running = engine(streams=3)
    origin.fault("/model.bin", fault, times=2, when=lambda seen: seen.method == "GET")
    running.pull(f"{origin.url}/model.bin#sha256={digest(content)}")
    assert (root / "models/model.bin/model.bin").read_bytes() == content
    # A GET of the first byte says the size again; what is refused may go over another idle connection.
    if fault not in (PASSING["wrong total"], PASSING["busy"], PASSING["rate limited"]):
        assert b'cachd_origin_retries_total{reason="' in running.metrics.text()


def test_a_broken_connection_is_freed_at_once(origin: Origin, engine: Engines) -> None:
    """Its buffers and its descriptor do not wait for a collection, which a daemon at rest makes seldom."""
    content = noise(MIB)
    origin.add("/model.bin", content)
    running = engine(streams=1, retries=20)
    running.pull(f"{origin.url}/model.bin#sha256={digest(content)}")
    running.pulls.delete("model.bin")
    gc.collect()
    before = sum(isinstance(found, Wire) for found in gc.get_objects())
    origin.fault("/model.bin", Reset(at=100 * KIB), times=9, when=lambda seen: seen.method == "GET")
    gc.disable()
    try:
        running.pull(f"{origin.url}/model.bin#sha256={digest(content)}")
        left = sum(isinstance(found, Wire) for found in gc.get_objects())
    finally:
        gc.enable()
    assert sum(seen.method == "GET" for seen in origin.requests) == 11
    assert left <= before + 1


def test_the_downloads_of_a_pull_go_with_it(origin: Origin, engine: Engines) -> None:
    """No thread and no cycle holds them: thousands of a model's files would wait for a collection."""
    ref = origin.add_model("model", {f"file-{n}.json": noise(KIB, n) for n in range(20)})
    running = engine()
    gc.collect()
    gc.disable()
    try:
        running.pull(ref)
        until(lambda: not any(isinstance(found, Download) for found in gc.get_objects()))
    finally:
        gc.enable()


def test_a_small_file_that_breaks_off_goes_on_where_it_stopped(
    origin: Origin, root: Path, engine: Engines
) -> None:
    content = noise(200 * KIB)
    origin.add("/config.json", content)
    origin.fault("/config.json", Short(at=150 * KIB), times=1, when=lambda seen: seen.method == "GET")
    running = engine()
    running.pull(f"{origin.url}/config.json#sha256={digest(content)}")
    assert (root / "models/config.json/config.json").read_bytes() == content
    extents = [seen.extent for seen in origin.requests if seen.method == "GET"]
    assert extents == [None, (150 * KIB, 200 * KIB)]
    assert list((root / ".cachd/ingest").iterdir()) == []


def test_a_small_file_makes_no_ingest_and_ends_one_that_is_there(
    origin: Origin, root: Path, engine: Engines
) -> None:
    content = noise(200 * KIB)
    url = f"{origin.url}/config.json"
    origin.add("/config.json", content)
    running = engine()
    held = origin.hold("/config.json", after=100 * KIB)
    begun = running.begin(spec_of(f"{url}#sha256={digest(content)}"))
    assert begun is not None
    assert held.reached.wait(30)
    ingests = root / ".cachd/ingest"
    assert list(ingests.iterdir()) == []
    held.release()
    begun.done.result(30)
    running.pulls.delete("config.json")
    file = File("config.json", len(content), url, Digest("sha256", digest(content)))
    running.store.content.begin(file).close()  # as a daemon leaves it that was killed with a part in flight
    running.pull(f"{url}#sha256={digest(content)}")
    assert list(ingests.iterdir()) == []


@pytest.mark.parametrize("fault", [IgnoreRange(), Chunked()], ids=["ranges ignored", "chunked"])
def test_an_origin_without_ranges_is_read_by_one_stream(
    origin: Origin, root: Path, engine: Engines, fault: Fault
) -> None:
    content = noise(24 * MIB)
    origin.add("/model.bin", content)
    running = engine(streams=3)
    origin.fault("/model.bin", fault, when=lambda seen: seen.method == "GET")
    running.pull(f"{origin.url}/model.bin#sha256={digest(content)}")
    assert (root / "models/model.bin/model.bin").read_bytes() == content


def test_a_file_that_changes_in_mid_pull_is_resolved_again_and_never_mixed(
    origin: Origin, root: Path, engine: Engines
) -> None:
    """Promised: A resume never mixes two versions of a file."""
    old, new = noise(24 * MIB, 1), noise(24 * MIB, 2)
    origin.add("/model.bin", old)
    running = engine(streams=2)
    hold = origin.hold("/model.bin", after=2 * MIB)
    pulled = running.begin(spec_of(f"{origin.url}/model.bin"))
    assert hold.reached.wait(30)
    origin.add("/model.bin", new)
    hold.release()
    pulled.done.result(60)
    assert (root / "models/model.bin/model.bin").read_bytes() == new


def test_an_expired_signed_link_is_asked_for_again(hub: Hub, root: Path, engine: Engines) -> None:
    content = noise(32 * MIB)
    hub.add("org/model", {"model.safetensors": content})
    hub.link_lifetime_requests = 2
    engine(hf_endpoint=hub.url, streams=2).pull("hf://org/model")
    assert (root / "models/org--model/model.safetensors").read_bytes() == content


def test_a_signed_link_is_used_for_many_parts(hub: Hub, engine: Engines) -> None:
    hub.add("org/model", {"model.safetensors": noise(64 * MIB)})
    engine(hf_endpoint=hub.url, streams=2).pull("hf://org/model")
    resolves = [seen for seen in hub.requests if "/resolve/" in seen.path]
    parts = [seen for seen in hub.cdn.requests if seen.method == "GET"]
    assert len(parts) >= 8
    assert len(resolves) <= 2, "at most one a stream"


# --- what ends a pull, and what it leaves ---


def assert_nothing_published(root: Path) -> None:
    left = [p for view in ("models", "hub", "ready") for p in (root / view).rglob("*")]
    assert sorted(p.name for p in left) == [".holds", ".locks", ".trees", "CACHEDIR.TAG"]


@pytest.mark.parametrize("fault", [Flip(5 * MIB), Swap(MIB, 9 * MIB, 4096)], ids=["one bit", "swapped"])
def test_a_wrong_byte_is_never_published(hub: Hub, root: Path, engine: Engines, fault: Fault) -> None:
    """Promised: A file that a reader can see was hashed by cachd to the digest its source declares, or its
    model is marked unverified.
    """
    content = noise(16 * MIB)
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": content})
    hub.cdn.fault("*", fault)
    running = engine(hf_endpoint=hub.url)
    with pytest.raises(Corrupt) as refusal:
        running.pull("hf://org/model")
    assert refusal.value.facts["file"] == "model.safetensors"
    assert refusal.value.facts["expected"] == f"sha256:{digest(content)}"
    assert str(refusal.value.facts["got"]) in refusal.value.detail
    assert_nothing_published(root)
    assert not list((root / ".cachd/ingest").iterdir()), "the wrong bytes were discarded"
    assert b'cachd_verify_failures_total{stage="pull"} 1.0' in running.metrics.text()


ENDINGS = {
    "401": (Status(401), Forbidden, "source_unauthorized"),
    "403": (Status(403), Forbidden, "source_forbidden"),
    "404": (Status(404), NotFound, "file_not_found"),
    "login page": (LoginPage(), Forbidden, "login_page"),
    "never right": (WrongRange(), Unavailable, "origin_protocol"),
    "always 503": (Status(503), Unavailable, "origin_failed"),
    "endless": (Endless(), Unavailable, "origin_protocol"),
}


@pytest.mark.parametrize(("fault", "kind", "code"), ENDINGS.values(), ids=ENDINGS.keys())
def test_a_lasting_fault_ends_the_pull_with_its_code(
    origin: Origin, root: Path, engine: Engines, fault: Fault, kind: type[CachdError], code: str
) -> None:
    origin.add("/model.bin", noise(24 * MIB))
    running = engine(retries=1)
    origin.fault("/model.bin", fault, when=lambda seen: seen.method == "GET")
    with pytest.raises(kind) as refusal:
        running.pull(f"{origin.url}/model.bin")
    assert refusal.value.code == code
    assert_nothing_published(root)


def test_secrets_stay_with_the_origin_they_were_meant_for(hub: Hub, root: Path, engine: Engines) -> None:
    """Promised: No credential is sent to another origin."""
    hub.add("org/private", {"model.safetensors": noise(6 * MIB)}, private=True)
    token = root.parent / "hf-token"
    token.write_text(hub.token + "\n")
    engine(hf_endpoint=hub.url, hf_token_file=token).pull("hf://org/private")
    assert any(seen.headers.get("authorization") == f"Bearer {hub.token}" for seen in hub.requests)
    assert not hub.leaked


def test_a_redirect_to_an_address_that_is_not_allowed_is_refused(
    origin: Origin, root: Path, engine: Engines
) -> None:
    origin.add("/model.bin", noise(MIB))
    running = engine(allow=[f"{origin.url}/"])
    origin.fault("/model.bin", Redirect(to=origin.url.replace("127.0.0.1", "127.0.0.2") + "/model.bin"))
    with pytest.raises(Forbidden) as refusal:
        running.pull(f"{origin.url}/model.bin")
    assert refusal.value.code in ("plaintext_refused", "private_address")
    assert_nothing_published(root)


# --- small things of the tests ---


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sign_in(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
