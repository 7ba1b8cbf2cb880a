"""What the tests stand on is real, and does what cachd's promises are measured against."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
from awscrt import checksums

from tests.ground import models, pod
from tests.ground.needs import needs, require
from tests.ground.nginx import Asked, Nginx
from tests.ground.s3 import Checksum, S3NotStarted, S3Server, free_ports

SMALL = random.Random(11).randbytes(100_000)
LARGE = random.Random(12).randbytes(12 << 20)
PART_BYTES = 5 << 20  # the least S3 allows

CHECKSUMS: dict[Checksum, Callable[[bytes], bytes]] = {
    "SHA256": lambda content: hashlib.sha256(content).digest(),
    "CRC64NVME": lambda content: checksums.crc64nvme(content).to_bytes(8, "big"),
    "CRC32C": lambda content: checksums.crc32c(content).to_bytes(4, "big"),
    "CRC32": lambda content: zlib.crc32(content).to_bytes(4, "big"),
}


@pytest.fixture
def open_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where another user may read: pytest makes its own directories private."""
    directory = tmp_path_factory.mktemp("open")
    directory.chmod(0o755)
    return directory


@pytest.fixture(scope="session")
def minilm() -> Path:
    return models.minilm()


def base64_of(checksum: Checksum, content: bytes) -> str:
    return base64.b64encode(CHECKSUMS[checksum](content)).decode()


def checksum_fields(answer: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in answer.items() if name.startswith("Checksum")}


def status_of(call: Callable[..., Any], **arguments: str | bytes) -> int:
    try:
        return int(call(**arguments)["ResponseMetadata"]["HTTPStatusCode"])
    except botocore.exceptions.ClientError as error:
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


# S3


@pytest.mark.parametrize("checksum", CHECKSUMS)
def test_an_object_put_at_once_keeps_the_checksum_of_its_bytes(s3: S3Server, checksum: Checksum) -> None:
    s3.put("models", f"single/{checksum}", SMALL, checksum)
    head = s3.client().head_object(Bucket="models", Key=f"single/{checksum}", ChecksumMode="ENABLED")
    # AWS adds ChecksumType FULL_OBJECT, SeaweedFS says no type
    assert checksum_fields(head) == {f"Checksum{checksum}": base64_of(checksum, SMALL)}
    assert head["ETag"] == f'"{hashlib.md5(SMALL).hexdigest()}"'


def test_a_checksum_is_told_only_to_who_asks_for_the_whole_object(s3: S3Server) -> None:
    s3.put("models", "asked", SMALL, "SHA256")
    where = {"Bucket": "models", "Key": "asked"}
    assert checksum_fields(s3.client().head_object(**where)) == {}
    assert checksum_fields(s3.client().get_object(**where, ChecksumMode="ENABLED", Range="bytes=0-9")) == {}
    assert checksum_fields(s3.client().get_object(**where, ChecksumMode="ENABLED")) != {}


def test_an_object_put_without_a_checksum_has_none(s3: S3Server) -> None:
    s3.put("models", "plain", SMALL)
    answer = s3.client().get_object(Bucket="models", Key="plain", ChecksumMode="ENABLED")
    assert checksum_fields(answer) == {}
    assert answer["Body"].read() == SMALL


@pytest.mark.parametrize("checksum", ["SHA256", "CRC32C", "CRC32"])
def test_an_object_put_in_parts_keeps_a_checksum_of_checksums(s3: S3Server, checksum: Checksum) -> None:
    s3.put_multipart("models", f"parts/{checksum}", LARGE, PART_BYTES, checksum)
    head = s3.client().head_object(Bucket="models", Key=f"parts/{checksum}", ChecksumMode="ENABLED")
    parts = [LARGE[start : start + PART_BYTES] for start in range(0, len(LARGE), PART_BYTES)]
    composite = base64_of(checksum, b"".join(map(CHECKSUMS[checksum], parts)))
    assert checksum_fields(head) == {f"Checksum{checksum}": f"{composite}-3", "ChecksumType": "COMPOSITE"}
    assert head["ETag"].endswith('-3"')


def test_crc64nvme_of_an_object_put_in_parts_is_that_of_its_bytes(s3: S3Server, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(LARGE)
    s3.put_multipart("models", "parts/CRC64NVME", file, PART_BYTES, "CRC64NVME")
    head = s3.client().head_object(Bucket="models", Key="parts/CRC64NVME", ChecksumMode="ENABLED")
    assert checksum_fields(head) == {
        "ChecksumCRC64NVME": base64_of("CRC64NVME", LARGE),
        "ChecksumType": "FULL_OBJECT",
    }


def test_a_listing_and_the_attributes_name_no_checksum(s3: S3Server) -> None:
    s3.put_multipart("models", "listed/it", LARGE, PART_BYTES, "SHA256")
    (entry,) = s3.client().list_objects_v2(Bucket="models", Prefix="listed/")["Contents"]
    assert set(entry) == {"Key", "LastModified", "ETag", "Size", "StorageClass"}
    attributes = s3.client().get_object_attributes(
        Bucket="models", Key="listed/it", ObjectAttributes=["Checksum", "ObjectParts", "ObjectSize"]
    )
    assert "Checksum" not in attributes
    parts = attributes["ObjectParts"]["Parts"]
    assert [part["Size"] for part in parts] == [PART_BYTES, PART_BYTES, len(LARGE) - 2 * PART_BYTES]


def test_the_reader_may_read_models_and_nothing_else(s3: S3Server) -> None:
    s3.put("models", "read-me", SMALL)
    s3.put("private", "read-me", SMALL)
    reader = s3.reader_client()
    assert status_of(reader.get_object, Bucket="models", Key="read-me") == 200
    assert status_of(reader.list_objects_v2, Bucket="models") == 200
    assert status_of(reader.get_object, Bucket="private", Key="read-me") == 403
    assert status_of(reader.list_objects_v2, Bucket="private") == 403
    assert status_of(reader.put_object, Bucket="models", Key="written", Body=SMALL) == 403
    assert status_of(reader.delete_object, Bucket="models", Key="read-me") == 403


def test_a_presigned_url_answers_a_range_with_206(s3: S3Server) -> None:
    s3.put("models", "signed", SMALL)
    url = s3.reader_client().generate_presigned_url(
        "get_object", Params={"Bucket": "models", "Key": "signed"}, ExpiresIn=60
    )
    assert "X-Amz-Signature=" in url
    request = urllib.request.Request(url, headers={"Range": "bytes=70000-79999"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes 70000-79999/{len(SMALL)}"
        assert answer.read() == SMALL[70_000:80_000]


def test_if_match_with_another_etag_is_412(s3: S3Server) -> None:
    etag = s3.put("models", "matched", SMALL)
    reader = s3.reader_client()
    assert status_of(reader.get_object, Bucket="models", Key="matched", IfMatch=etag) == 200
    s3.put("models", "matched", SMALL[::-1])
    assert status_of(reader.get_object, Bucket="models", Key="matched", IfMatch=etag) == 412


def test_the_s3_server_listens_on_loopback_only(s3: S3Server) -> None:
    listening = "0A"
    sockets = {link.readlink().name for link in Path(f"/proc/{s3.pid}/fd").iterdir() if link.is_symlink()}
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    places = [row[1] for row in rows if row[3] == listening and f"socket:[{row[9]}]" in sockets]
    assert len(places) == 8
    assert {place.split(":")[0] for place in places} == {"0100007F"}


def test_a_stopped_s3_server_comes_back_with_its_objects_at_its_address(s3: S3Server) -> None:
    s3.put("models", "kept", SMALL)
    s3.stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(s3.url)
    s3.start()
    assert s3.client().get_object(Bucket="models", Key="kept")["Body"].read() == SMALL


def test_an_s3_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = S3Server(tmp_path)
    taken = ("127.0.0.1", server.ports["master"])
    with socket.create_server(taken), pytest.raises(S3NotStarted, match="address already in use"):
        server.start()
    assert not [socket for port in server.ports.values() for socket in Path("/tmp").glob(f"*-{port}.sock")]


def test_free_ports_differ_and_are_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


# nginx


@needs("nginx")
def test_nginx_answers_a_range_with_206_and_logs_what_was_asked(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(SMALL)
    with Nginx(tmp_path) as server:
        url = f"{server.url}/model.safetensors"
        asked = urllib.request.Request(url, headers={"Range": "bytes=100-299"})
        with urllib.request.urlopen(asked) as answer:
            assert (answer.status, answer.read()) == (206, SMALL[100:300])
            assert answer.headers["ETag"]
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == SMALL
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server.url}/missing%20one?x=1")
        part, whole, missing = server.requests()
    assert part == Asked("GET", "/model.safetensors", 206, 200, "bytes=100-299")
    assert whole == Asked("GET", "/model.safetensors", 200, len(SMALL), None)
    assert (missing.path, missing.status) == ("/missing%20one?x=1", 404)


@needs("nginx")
def test_nginx_is_read_only(tmp_path: Path) -> None:
    with Nginx(tmp_path) as server:
        put = urllib.request.Request(f"{server.url}/new", data=SMALL, method="PUT")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(put)
    assert not list(tmp_path.iterdir())


@needs("nginx")
def test_nginx_with_tls_is_trusted_by_who_has_its_authority(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(SMALL)
    with Nginx(tmp_path, tls=True) as server:
        trust = ssl.create_default_context(cafile=server.ca_file)
        with urllib.request.urlopen(f"{server.url}/config.json", context=trust) as answer:
            assert answer.read() == SMALL
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"{server.url}/config.json")


@needs("nginx")
def test_a_stopped_nginx_is_gone_and_comes_back_at_its_address(tmp_path: Path) -> None:
    server = Nginx(tmp_path)
    with server:
        url = server.url
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url)
    with server:
        assert server.url == url
        assert server.requests() == []


# Models


def test_minilm_is_a_real_safetensors_model(minilm: Path) -> None:
    found = pod.read_model(str(minilm))
    assert found["model_type"] == "bert"
    assert (found["files"], found["tensors"]) == (1, 104)
    assert found["bytes"] == 90_856_960


def test_a_generated_model_loads_and_has_the_size_asked_for(tmp_path: Path) -> None:
    model = models.safetensors_model(tmp_path / "noise", shards=3, shard_bytes=1_000_001, seed=5)
    shards = sorted(model.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert {shard.stat().st_size for shard in shards} == {1_000_001}
    found = pod.read_model(str(model))
    assert (found["files"], found["tensors"]) == (3, 15)
    assert len(zlib.compress(shards[0].read_bytes())) > 0.99 * 1_000_001
    assert (model / "merges.txt").stat().st_size == 0
    assert (model / "1_Pooling" / "config.json").is_file()


def test_the_smallest_shard_loads_and_a_smaller_one_is_refused(tmp_path: Path) -> None:
    least = 8 + models.HEADER_BYTES + models.LEAST_TENSOR_BYTES
    pod.read_model(str(models.safetensors_model(tmp_path, shards=1, shard_bytes=least, seed=1)))
    with pytest.raises(ValueError, match=f"the least is {least}"):
        models.safetensors_model(tmp_path, shards=1, shard_bytes=least - 1, seed=1)


def test_the_same_seed_makes_the_same_model(tmp_path: Path) -> None:
    def made(name: str, seed: int) -> dict[str, str]:
        model = models.safetensors_model(tmp_path / name, shards=2, shard_bytes=50_000, seed=seed)
        return models.digests(model)

    one, again, other = made("one", 1), made("again", 1), made("other", 2)
    assert one == again
    shards = [name for name in one if name.endswith(".safetensors")]
    assert len({one[name] for name in shards} | {other[name] for name in shards}) == 4


def test_sha256sum_accepts_the_sums_of_a_model(tmp_path: Path) -> None:
    model = models.safetensors_model(tmp_path, shards=2, shard_bytes=10_000, seed=7)
    (model / "odd\nname\\here").write_bytes(SMALL)
    assert models.write_sha256sums(model) == models.write_sha256sums(model) == model / "SHA256SUMS"
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=model, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(": OK") == len(models.digests(model)) - 1 == 8


# Pods


@needs("pods")
def test_a_pod_loads_minilm_through_a_read_only_mount(open_directory: Path, minilm: Path) -> None:
    shutil.copytree(minilm, open_directory / "models" / "minilm")
    ended = pod.run_in_pod(open_directory, pod.LOAD_DIRECTORY, env={"MODEL_DIR": "models/minilm"})
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == pod.read_model(str(minilm))


@needs("pods")
def test_a_pod_loads_from_a_hub_view_offline(open_directory: Path) -> None:
    commit = hashlib.sha1(SMALL).hexdigest()
    repo = open_directory / "hub" / "models--org--noise"
    model = models.safetensors_model(repo / "snapshots" / commit, shards=2, shard_bytes=10_000, seed=3)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for revision in ({}, {"REVISION": commit}):
        ended = pod.run_in_pod(open_directory, pod.LOAD_HUB, env={"REPO": "org/noise", **revision})
        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)
        assert found.pop("snapshot") == f"hub/models--org--noise/snapshots/{commit}"
        assert found == pod.read_model(str(model))


@needs("pods")
def test_a_pod_cannot_change_the_cache_in_any_way(open_directory: Path) -> None:
    (open_directory / "file").write_bytes(SMALL)
    script = """
import errno, os
os.chdir(os.environ["CACHE"])
tries = [
    lambda: open("new", "w"), lambda: os.mkdir("new"), lambda: os.unlink("file"),
    lambda: os.chmod("file", 0o777), lambda: os.rename("file", "other"),
    lambda: os.link("file", "other"), lambda: os.utime("file"),
]
for change in tries:
    try:
        change()
    except OSError as error:
        assert error.errno == errno.EROFS, error
    else:
        raise AssertionError(change)
"""
    ended = pod.run_in_pod(open_directory, script)
    assert ended.returncode == 0, ended.stderr


@needs("pods")
def test_a_pod_may_mount_a_part_of_the_cache(open_directory: Path) -> None:
    models.safetensors_model(open_directory / "models" / "noise", shards=1, shard_bytes=10_000, seed=9)
    ended = pod.run_in_pod(
        open_directory, pod.LOAD_DIRECTORY, subpath="models/noise", env={"MODEL_DIR": "$CACHE"}
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["files"] == 1


@needs("pods")
def test_a_pod_of_another_user_cannot_read_a_private_file(open_directory: Path) -> None:
    require("users")
    (open_directory / "private").touch(mode=0o600)
    ended = pod.run_in_pod(
        open_directory, "import os; print(os.getuid()); open(os.environ['CACHE'] + '/private')"
    )
    assert ended.stdout == f"{pod.OTHER_UID}\n"
    assert "PermissionError" in ended.stderr


@needs("pods")
def test_a_pod_lives_until_its_block_ends_and_leaves_nothing(open_directory: Path) -> None:
    (open_directory / "file").write_bytes(SMALL)
    script = """
import os, sys
held = open(os.environ["CACHE"] + "/file", "rb")
print(os.environ["TMPDIR"], flush=True)
sys.stdin.read()
"""
    with pod.pod(open_directory, script) as process:
        assert process.stdout is not None
        place = Path(process.stdout.readline().strip()).parent
        assert place.is_dir()
        assert os.listdir(place) == []  # mounted inside the pod only
    assert process.returncode < 0
    assert not place.exists()


def test_a_machine_that_permits_no_pods_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no unshare there
    with pytest.raises(pod.PodRefused, match="no mount namespace is permitted here"):
        pod.way.__wrapped__(12345)  # what an earlier test has found is kept
