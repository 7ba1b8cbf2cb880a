"""Pulls from a real rclone, whose S3 server answers ranges with 200 and ignores If-Match."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Engine
from tests.fetching import KIB, MIB, PATIENCE_SECONDS, refused
from tests.ground.checksums import sha256sums
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.raw import Asked, RawServer, ranged, reply
from tests.ground.rclone import Kind, Rclone
from tests.ground.site import until
from tests.test_s3_objects import ODD_NAMES

Engines = Callable[..., Engine]
Nodes = Callable[..., Node]

LARGE = noise(9 * MIB)  # three parts
MODEL = {"config.json": b"{}", "onnx/model.bin": LARGE, "onnx/empty": b"", "onnx/deep/er/x": noise(3 * KIB)}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    with Rclone(tmp_path_factory.mktemp("rclone") / "buckets", "s3") as started:
        for path, content in MODEL.items():
            started.put(f"models/m/llama/{path}", content)
        yield started


@pytest.fixture
def signed(s3: Rclone, monkeypatch: pytest.MonkeyPatch) -> Rclone:
    """The S3 server, with its keys in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    return s3


def pulled(running: Engine, ref: str, name: str = "it", **asked: object) -> dict[str, bytes]:
    """The files of the model that a pull of `ref` publishes, by path."""
    running.pull(ref, name=name, **asked)
    view = running.store.layout.model(name)
    return {str(p.relative_to(view)): p.read_bytes() for p in view.rglob("*") if p.is_file()}


# --- S3 ---


@pytest.mark.parametrize("ref", ["m/llama/", "m/llama", ""], ids=["prefix", "without slash", "bucket"])
def test_a_prefix_is_pulled_however_it_is_written(signed: Rclone, engine: Engines, ref: str) -> None:
    beneath = "" if ref else "m/llama/"
    wanted = {f"{beneath}{path}": content for path, content in MODEL.items()}
    assert pulled(engine(s3_endpoint_url=signed.url), f"s3://models/{ref}") == wanted


def test_one_object_is_pulled_and_a_missing_one_is_named(signed: Rclone, engine: Engines) -> None:
    running = engine(s3_endpoint_url=signed.url, retries=0)
    assert pulled(running, "s3://models/m/llama/onnx/model.bin") == {"model.bin": LARGE}
    for ref in ("s3://models/m/llama/onnx/model", "s3://models/m/other/", "s3://models/m/other"):
        refused(partial(running.pull, ref, name="missing"), "file_not_found")


def test_a_missing_bucket_has_its_own_error(signed: Rclone, engine: Engines) -> None:
    running = engine(s3_endpoint_url=signed.url, retries=0)
    for ref in ("s3://nowhere/m/", "s3://nowhere/m", "s3://nowhere/"):
        refused(partial(running.pull, ref, name="missing"), "bucket_not_found")


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_keys_that_are_wrong_are_told_apart_from_permissions(
    signed: Rclone, engine: Engines, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv(wrong, "wrong")
    running = engine(s3_endpoint_url=signed.url, retries=0)
    for ref in ("s3://models/m/llama/", "s3://models/m/llama/config.json"):
        refused(partial(running.pull, ref, name="it"), "source_unauthorized")


def test_odd_keys_are_listed_and_fetched_under_their_names(signed: Rclone, engine: Engines) -> None:
    files = {name: name.encode() for name in ODD_NAMES} | {"sub dir/+#?": b"x"}
    for path, content in files.items():
        signed.put(f"odd/m + %20/{path}", content)
    running = engine(s3_endpoint_url=signed.url)
    assert pulled(running, "s3://odd/m + %20/") == files
    for number, name in enumerate(ODD_NAMES):
        assert pulled(running, f"s3://odd/m + %20/{name}", f"one{number}") == {name: name.encode()}


def test_more_objects_than_a_page_holds_are_listed_to_the_last(
    tmp_path: Path, engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{number % 7}/{number:04}": str(number).encode() for number in range(2300)}
    # It keeps its listings, for else it reads a directory at every request.
    server = Rclone(tmp_path / "buckets", "s3", "--dir-cache-time", "1h")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    for path, content in files.items():
        server.put(f"many/m/{path}", content)
    with server:
        last = {path: content for path, content in files.items() if path.startswith("6/")}
        assert pulled(engine(s3_endpoint_url=server.url), "s3://many/m/", include=("6/*",)) == last


def test_an_empty_directory_is_no_file(signed: Rclone, engine: Engines) -> None:
    signed.put("folders/m/x", b"x")
    (signed.directory / "folders/m/empty").mkdir()
    running = engine(s3_endpoint_url=signed.url, retries=0)
    assert pulled(running, "s3://folders/m/") == {"x": b"x"}
    refused(partial(running.pull, "s3://folders/m/empty/", name="none"), "file_not_found")


def test_a_file_that_is_replaced_between_two_pulls_is_another_revision(
    signed: Rclone, engine: Engines
) -> None:
    file = signed.put("changing/m/x", b"one" * KIB)
    running = engine(s3_endpoint_url=signed.url)
    assert pulled(running, "s3://changing/m/") == {"x": b"one" * KIB}
    file.write_bytes(b"two" * KIB)
    assert pulled(running, "s3://changing/m/", "again") == {"x": b"two" * KIB}


def begun(node: Nodes, s3: Rclone, key: str) -> Node:
    """A daemon that has received a part of `s3://large/KEY/`, and goes on slowly."""
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    running = node(env=keys, s3_endpoint_url=s3.url, limit_bytes_per_second=8 * MIB)
    running.pull(f"s3://large/{key}/", name="x")
    until(lambda: (running.ask("GET", "/v1/models/x").document["pull"]["bytes"]["done"] or 0) >= 8 * MIB)
    return running


def test_a_pull_that_is_killed_resumes_from_a_server_that_answers_ranges_with_200(
    signed: Rclone, node: Nodes
) -> None:
    content = noise(24 * MIB)
    signed.put("large/killed/x", content)
    running = begun(node, signed, "killed")
    running.kill()
    running.configure(**{**running.options, "limit_bytes_per_second": 0})
    running.start()
    assert running.ready("x", wait=PATIENCE_SECONDS).status == 200
    assert (running.root / "models/x/x").read_bytes() == content
    assert 0 < running.metric("cachd_download_bytes_total") < len(content)


def test_a_file_that_is_replaced_in_mid_pull_is_never_mixed_though_if_match_is_ignored(
    signed: Rclone, node: Nodes
) -> None:
    before, after = noise(24 * MIB, 1), noise(24 * MIB, 2)
    file = signed.put("large/replaced/x", before)
    running = begun(node, signed, "replaced")
    file.with_name("new").write_bytes(after)
    file.with_name("new").replace(file)
    running.configure(**{**running.options, "limit_bytes_per_second": 0})
    assert running.ready("x", wait=PATIENCE_SECONDS).status == 200
    # All of the old file, if the server still had it open for the last request.
    assert (running.root / "models/x/x").read_bytes() in (before, after)


@pytest.mark.parametrize("head", ["200 OK", "405 Method Not Allowed"])
def test_a_range_that_comes_with_200_is_a_range_and_its_length_is_not_that_of_the_file(
    engine: Engines, head: str
) -> None:
    """As rclone answers; by a script, since rclone's HEAD is right."""
    asked_for: list[str] = []

    def answer(asked: Asked) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, head, 'ETag: "one"', length=len(LARGE) if head == "200 OK" else 0)
        asked_for.append(asked.headers.get("range", ""))
        return ranged(asked, LARGE, 'ETag: "one"').replace(b"206 Partial Content", b"200 OK", 1)

    with RawServer(answer) as server:
        assert pulled(engine(retries=0), f"{server.url}/x") == {"x": LARGE}
    assert "" not in asked_for
    assert len(set(asked_for)) >= 3


def test_a_server_without_keys_is_read_without(
    tmp_path: Path, engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with Rclone(tmp_path / "buckets", "s3", anonymous=True) as server:
        server.put("public/m/x", b"x" * KIB)
        running = engine(s3_endpoint_url=server.url, sources=[{"prefix": "s3://public/", "anonymous": True}])
        assert pulled(running, "s3://public/m/") == {"x": b"x" * KIB}


def test_an_entry_with_every_column_for_s3_and_checksums_beside_the_objects(
    s3: Rclone, engine: Engines, tmp_path: Path
) -> None:
    for path, content in {**MODEL, "SHA256SUMS": sha256sums(MODEL)}.items():
        s3.put(f"summed/m/{path}", content)
    (tmp_path / "keys").write_text(
        f"[node]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    entry = {
        "prefix": "s3://summed/",
        "endpoint": s3.url,
        "credentials": str(tmp_path / "keys"),
        "profile": "node",
        "region": "eu-west-3",
        "addressing": "path",
        "requester_pays": True,
    }
    running = engine(sources=[entry])
    assert pulled(running, "s3://summed/m/", exclude=("SHA256SUMS",)) == MODEL
    snapshot = running.store.names.get("it")
    assert snapshot is not None
    assert snapshot.verified


# --- HTTP and WebDAV ---


@pytest.fixture(scope="module", params=["http", "webdav"])
def web(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Rclone]:
    with Rclone(tmp_path_factory.mktemp("rclone") / "files", request.param) as started:
        for path, content in {**MODEL, "SHA256SUMS": sha256sums(MODEL)}.items():
            started.put(f"m/{path}", content)
        for name in ODD_NAMES:
            started.put(f"odd/{name}", name.encode())
        started.put("odd/SHA256SUMS", sha256sums({name: name.encode() for name in ODD_NAMES}))
        yield started


def test_a_directory_with_checksums_is_pulled_and_verified(web: Rclone, engine: Engines) -> None:
    running = engine()
    assert pulled(running, f"{web.url}/m/") == MODEL
    snapshot = running.store.names.get("it")
    assert snapshot is not None
    assert snapshot.verified


def test_odd_names_are_fetched(web: Rclone, engine: Engines) -> None:
    assert pulled(engine(), f"{web.url}/odd/") == {name: name.encode() for name in ODD_NAMES}


def test_one_file_is_pulled_and_a_missing_one_is_named(web: Rclone, engine: Engines) -> None:
    running = engine(retries=0)
    assert pulled(running, f"{web.url}/m/onnx/model.bin") == {"model.bin": LARGE}
    refused(partial(running.pull, f"{web.url}/m/onnx/other.bin", name="missing"), "file_not_found")
    refused(partial(running.pull, f"{web.url}/m/onnx/", name="missing"), "no_checksums")


@pytest.mark.parametrize("kind", ["http", "webdav"])
def test_a_directory_without_its_slash_is_no_file(tmp_path: Path, engine: Engines, kind: Kind) -> None:
    with Rclone(tmp_path / "files", kind) as server:
        server.put("m/onnx/x", b"x")
        refused(partial(engine(retries=0).pull, f"{server.url}/m/onnx", name="page"), "file_not_found")


@pytest.mark.parametrize("kind", ["http", "webdav"])
def test_a_user_and_a_password_go_into_a_file_of_headers(tmp_path: Path, engine: Engines, kind: Kind) -> None:
    (tmp_path / "headers").write_text("Authorization: Basic dXNlcjpzZWNyZXQ=\n")  # user:secret
    with Rclone(tmp_path / "files", kind, "--user", "user", "--pass", "secret") as server:
        for path in ("with/x", "x"):
            server.put(path, LARGE)
        entry = {"prefix": f"{server.url}/with/", "headers_file": str(tmp_path / "headers")}
        running = engine(retries=0, sources=[entry])
        assert pulled(running, f"{server.url}/with/x") == {"x": LARGE}
        refused(partial(running.pull, f"{server.url}/x", name="without"), "source_unauthorized")
