"""Origins, shares and disks with documents that are cheap to send and dear to read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from cachd.client import Client
from cachd.errors import CachdError, Invalid, NotFound
from cachd.model import Digest, File, Manifest, Ref
from cachd.pod import ready
from cachd.pod.mount import Mount
from cachd.sources import checksums
from cachd.sources.cancel import CancelToken
from cachd.sources.huggingface import HubSource
from cachd.sources.s3 import BucketSource
from cachd.sources.secrets import Secret
from cachd.sources.source import Source
from cachd.sources.web import WebSource
from cachd.store.disk_store import DiskStore
from tests.conftest import Engine
from tests.faults.test_fuzz import LISTED, Spoken
from tests.faults.test_names import bucket, keys, page, spoken
from tests.fetching import HEX, http, refused, share
from tests.ground.hub import Hub
from tests.ground.origin import Reply, Seen
from tests.ground.origin.content import Memory, Unending
from tests.ground.scripted import Scripted, heard, saying

Engines = Callable[..., Engine]
MIB = 1 << 20
ENDLESS = Unending(Memory(b""))
FEW_MIB = 48  # what reading any document may cost, above what the process had before

__all__ = ["bucket", "keys", "spoken"]  # fixtures

# --- what reading costs, in a process of its own ---

MEASURED = """
import sys
from cachd.errors import CachdError

def peak():
    told = open("/proc/self/status").read().split()
    return int(told[told.index("VmHWM:") + 1]) / 1024

exec(sys.argv[1])
before = peak()
try:
    told = call()
except CachdError as error:
    told = error.code
print(peak() - before, told)
"""


def cost(prepared: str, *arguments: object) -> tuple[float, str]:
    """MiB that `call`, which `prepared` defines, takes at its peak; what it returns, or its error's code."""
    command = [sys.executable, "-c", MEASURED, prepared, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    mib, _, told = ended.stdout.strip().partition(" ")
    return float(mib), told


INDEX = """
from functools import partial
from cachd.policy.shards import named
from pathlib import Path

def pieces():
    with open(sys.argv[2], "rb") as opened:
        yield from iter(partial(opened.read, 65536), b"")

def call():
    return [*named("model.safetensors.index.json", pieces(), {"model-00001.safetensors"}).absent]
"""

GROUP = b"[" * 60 + b"]" * 60 + b","
COSTLY = {  # how it begins, and what comes until it has 64 MiB
    "lists in lists": (b'{"metadata":[', GROUP, "document_too_large"),
    "lists without end": (b"", b"[", "document_too_deep"),
    "empty lists": (b'{"a":[', b"[],", "document_too_large"),
    "one text": (b'{"weight_map":{"a":"', b"x", "document_too_large"),
    "one number": (b'{"a":', b"9", "document_too_large"),
    "white space": (b"", b" ", "document_too_large"),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_an_index_of_64_mib_costs_a_few_mib_whatever_it_holds(tmp_path: Path, kind: str) -> None:
    """Promised: No document of a source, however deep or long, takes more memory than the listing of
    100,000 files."""
    begun, more, told = COSTLY[kind]
    (tmp_path / "index").write_bytes(long(begun, more, 64))
    mib, ended = cost(INDEX, tmp_path / "index")
    assert ended == told
    assert mib < FEW_MIB


def long(begun: bytes, more: bytes, mib: int) -> bytes:
    return begun + more * (mib * MIB // len(more))


def test_of_the_shards_that_an_index_names_and_nobody_has_a_thousand_are_told(tmp_path: Path) -> None:
    names = [f"{n:0900}" for n in range(64 << 10)]
    (tmp_path / "index").write_text(json.dumps({"weight_map": dict(zip(names, names, strict=True))}))
    mib, ended = cost(INDEX, tmp_path / "index")
    assert ended == str(names[:1000])
    assert mib < FEW_MIB


def test_an_honest_index_of_any_size_is_checked_and_costs_a_few_mib(tmp_path: Path) -> None:
    """Of 400,000 tensors: no model of today has as many."""
    tensors = (f"model.layers.{n}.mlp.experts.{n}.down_proj.weight" for n in range(400_000))
    shards = {tensor: f"model-{n % 99:05}.safetensors" for n, tensor in enumerate(tensors)}
    (tmp_path / "index").write_text(json.dumps({"metadata": {"total_size": 1 << 45}, "weight_map": shards}))
    assert (tmp_path / "index").stat().st_size > 24 * MIB
    mib, ended = cost(INDEX, tmp_path / "index")
    assert ended == str([f"model-{n:05}.safetensors" for n in range(99) if n != 1])
    assert mib < FEW_MIB


def test_a_model_with_a_costly_index_is_refused_and_its_other_files_may_be_had(
    hub: Hub, root: Path, engine: Engines
) -> None:
    files = {"config.json": b"{}", "model.safetensors.index.json": long(b"[", GROUP, 8)}
    hub.add("org/dear", files)
    opened = engine(hf_endpoint=hub.url)
    error = refused(lambda: opened.pull("hf://org/dear"), "document_too_large")
    assert "model.safetensors.index.json" in error.detail
    assert list((root / "ready").iterdir()) == []
    assert opened.pull("hf://org/dear", exclude=("*.index.json",)).files == 1


SUMS = """
from pathlib import Path
from cachd.sources import checksums
content = Path(sys.argv[2]).read_bytes()

def call():
    return len(checksums.parse(content, "SHA256SUMS"))
"""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"\n", "document_too_large"),
        (b"#\n", "document_too_large"),
        ("\U0001f600".encode(), "bad_checksums"),
        (b"x", "bad_checksums"),
    ],
)
def test_checksums_of_16_mib_cost_a_few_mib_whatever_they_hold(
    tmp_path: Path, line: bytes, told: str
) -> None:
    (tmp_path / "sums").write_bytes(line * (16 * MIB // len(line)))
    mib, ended = cost(SUMS, tmp_path / "sums")
    assert ended == told
    assert mib < 4 * 16 + FEW_MIB, "a line of 16 MiB as text, of letters of four bytes"


def test_checksums_of_more_files_than_a_model_may_have_are_read_no_further() -> None:
    content = b"".join(b"%064d  %d\n" % (n, n) for n in range(100_001)) + b"no checksum"
    refused(lambda: checksums.parse(content, "SHA256SUMS"), "too_many_files")


# --- the Hub ---


def hub_of(spoken: Spoken) -> HubSource:
    return HubSource(http(), endpoint=spoken.url, token=Secret(None))


def resolving(source: Source, ref: str) -> Callable[[], Manifest]:
    return lambda: source.resolve(Ref.parse(ref), CancelToken())


BEGUN = json.dumps(LISTED)[:-1].encode() + b',"cardData":'
HUB = """
from cachd.model import Ref
from cachd.sources.huggingface import HubSource
from cachd.sources.secrets import Secret
from cachd.sources.cancel import CancelToken
from tests.fetching import http
source = HubSource(http(), endpoint=sys.argv[2], token=Secret(None))

def call():
    return source.resolve(Ref.parse("hf://org/model"), CancelToken())
"""


@pytest.mark.parametrize(
    ("begun", "more", "told"),
    [
        (BEGUN, b"[", "document_too_deep"),
        (BEGUN + b"[", GROUP, "document_too_large"),
        (b"[NaN,", GROUP, "origin_protocol"),
        ('["\u2222",'.encode("utf-16-le"), b"[\0", "origin_protocol"),
    ],
    ids=["deep", "many", "not a number", "UTF-16"],
)
def test_a_costly_listing_of_a_hub_is_refused_before_it_is_parsed(
    spoken: Spoken, begun: bytes, more: bytes, told: str
) -> None:
    content = long(begun, more, 20)
    spoken.say = lambda _: Reply.of(200, {"Content-Type": "application/json"}, content)
    mib, ended = cost(HUB, spoken.url)
    assert ended == told
    assert mib < 2 * 24 + FEW_MIB, "received, and whole"


COSTLIEST: dict[str, Callable[[], bytes]] = {  # all but the last have as many tokens as may be
    "mappings": lambda: b"[" + b'{"":{"":{"":0}}},' * 199_000 + b"0]",
    "keys": lambda: b"{" + b",".join(b'"%06d":1' % n for n in range(990_000)) + b"}",
    "texts": lambda: b"[" + b'"abcd",' * 1_990_000 + b"0]",
    "wide letters": lambda: b"[" + ('"\U0001f600' + "x" * 900_000 + '",').encode() * 27 + b"0]",
}


@pytest.mark.parametrize("kind", COSTLIEST)
def test_the_costliest_listing_of_a_hub_that_is_parsed_costs_little_more_than_an_honest_one(
    spoken: Spoken, kind: str
) -> None:
    """That of 99,999 files costs 217 MiB.

    Promised: No document of a source, however deep or long, takes more memory than the listing of
    100,000 files.
    """
    content = COSTLIEST[kind]()
    spoken.say = lambda _: Reply.of(200, {}, content)
    mib, ended = cost(HUB, spoken.url)
    assert ended == "origin_protocol"
    assert mib < 260


def test_a_listing_of_a_hub_that_says_it_is_too_long_is_not_received(spoken: Spoken) -> None:
    spoken.say = lambda _: Reply(200, {}, ENDLESS, 0, 1 << 40, 1 << 40)
    error = refused(resolving(hub_of(spoken), "hf://org/model"), "document_too_large")
    assert str(1 << 40) in error.detail
    assert str(24 * MIB) in error.detail
    assert spoken.bytes_sent() < 32 * MIB, "what the kernel took in"


def test_of_a_failure_of_a_hub_the_head_alone_is_read(spoken: Spoken) -> None:
    spoken.say = lambda _: Reply(404, {"X-Error-Code": "RepoNotFound"}, ENDLESS, 0, 1 << 40, None)
    refused(resolving(hub_of(spoken), "hf://org/model"), "repo_not_found")
    assert spoken.bytes_sent() < 32 * MIB, "what the kernel took in"


def test_names_of_many_letters_in_all_are_refused() -> None:
    files = tuple(
        File(f"{n}/" + "/".join(["é" * 100] * 4), 1, "o", Digest("sha256", HEX)) for n in range(90_000)
    )
    error = refused(lambda: Manifest("hf://org/model", "a" * 40, files), "too_many_files")
    assert "at most 32000000" in error.detail


# --- S3 ---


def xml(body: str) -> Reply:
    return Reply.of(200, {"Content-Type": "application/xml"}, body.encode())


LONG = f"<Contents><Key>m/x</Key><ETag>{'e' * (3 * MIB)}</ETag><Size>5</Size></Contents>"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("<ListBucketResult>" + "<a/>" * MIB, "document_too_large"),
        ("<ListBucketResult>" + "<a>" * 200_000, "document_too_large"),
        ("<ListBucketResult " + " ".join(f'a{n}=""' for n in range(200_000)), "document_too_large"),
        ("<ListBucketResult>" + "x" * 5 * MIB, "document_too_large"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><ListBucketResult>&b;</ListBucketResult>', "document_refused"),
        ("[" * MIB, "document_too_deep"),
        ("[NaN," + "[" * MIB, "origin_protocol"),
    ],
    ids=["tags", "nested tags", "attributes", "one text", "entities", "JSON", "no JSON"],
)
def test_a_costly_answer_of_s3_is_refused_before_it_is_parsed(
    spoken: Spoken, bucket: BucketSource, body: str, code: str
) -> None:
    spoken.say = lambda _: xml(body)
    refused(resolving(bucket, "s3://bucket/m/"), code)


def test_a_listing_of_a_bucket_whose_pages_never_end_is_refused(spoken: Spoken, bucket: BucketSource) -> None:
    """They are empty, or of another prefix: no file is ever counted."""
    spoken.say = lambda _: page(
        [(f"mother/{len(spoken.requests)}", '"e"')], then=f"page-{len(spoken.requests)}"
    )
    error = refused(resolving(bucket, "s3://bucket/m"), "document_too_large")
    assert "1000 pages" in error.detail
    assert len(spoken.requests) <= 1001


def test_a_listing_of_a_bucket_whose_next_page_is_the_same_is_refused(
    spoken: Spoken, bucket: BucketSource
) -> None:
    spoken.say = lambda _: page([], then="again")
    refused(resolving(bucket, "s3://bucket/m/"), "origin_protocol")
    assert len(spoken.requests) == 2


def test_etags_of_many_letters_in_all_are_refused(spoken: Spoken, bucket: BucketSource) -> None:
    etag = "e" * (3 * MIB)
    spoken.say = lambda _: page([(f"m/{len(spoken.requests)}", etag)], then=f"page-{len(spoken.requests)}")
    refused(resolving(bucket, "s3://bucket/m/"), "too_many_files")
    assert len(spoken.requests) <= 11


def test_checksums_of_a_bucket_without_end_are_refused(spoken: Spoken, bucket: BucketSource) -> None:
    def say(seen: Seen) -> Reply:
        if seen.path.endswith("SHA256SUMS"):
            return Reply(200, {}, ENDLESS, 0, 1 << 40, None)
        return page([("m/SHA256SUMS", '"e"'), ("m/x", '"e"')])

    spoken.say = say
    refused(resolving(bucket, "s3://bucket/m/"), "document_too_large")
    assert spoken.bytes_sent() < 48 * MIB


# --- HTTP ---


def head_of(answer: bytes, *, at_most: int = 100) -> CachdError:
    def script(connection: socket.socket, _: int) -> None:
        heard(connection)
        with suppress(ConnectionError):
            connection.sendall(answer)
            connection.recv(1)

    with Scripted(script) as server, pytest.raises(CachdError) as refusal:
        http().read(f"{server.url}/x", CancelToken(), at_most=at_most)
    return refusal.value


def test_answers_on_the_way_without_end_are_no_answer() -> None:
    assert "1xx" in head_of(b"HTTP/1.1 100 Continue\r\n\r\n" * 21).detail


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_chunk_whose_line_is_longer_than_any_is_refused() -> None:
    assert "chunk" in head_of(CHUNKED + b"2;" + b"x" * 2000 + b"\r\nok\r\n0\r\n\r\n").detail


def test_chunks_of_a_few_bytes_without_end_are_refused() -> None:
    assert "chunks" in head_of(CHUNKED + b"2\r\nok\r\n" * 20_000, at_most=MIB).detail


def test_a_body_whose_lines_are_a_chunk_each_is_read() -> None:
    line = b"50\r\n" + b"x" * 80 + b"\r\n"
    with Scripted(saying(CHUNKED + line * 30_000 + b"0\r\n\r\n")) as server:
        assert len(http().read(f"{server.url}/x", CancelToken(), at_most=3 * MIB)) == 30_000 * 80


def test_trailers_longer_than_a_head_are_refused() -> None:
    line = b"X: " + b"x" * 16_000 + b"\r\n"
    assert "trailers" in head_of(CHUNKED + b"2\r\nok\r\n0\r\n" + line * 3 + b"\r\n").detail


def test_an_etag_longer_than_any_is_not_kept(spoken: Spoken) -> None:
    spoken.say = lambda _: Reply(200, {"ETag": f'"{"e" * 7000}"'}, length=5)
    error = refused(resolving(WebSource(http()), f"{spoken.url}/x"), "bad_manifest")
    assert "7002" in error.detail


# --- shares ---


def test_directories_nested_deeper_than_python_calls_are_walked(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    at = os.open(tmp_path, os.O_DIRECTORY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=at)
        above, at = at, os.open("d", os.O_DIRECTORY, dir_fd=at)
        os.close(above)
    os.close(at)
    try:
        manifest = share(tmp_path).resolve(Ref.parse(f"file://{tmp_path}/"), CancelToken())
        assert [file.path for file in manifest.files] == ["x"]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil.rmtree calls itself


def test_empty_directories_count_too(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / str(number)).mkdir()
    refused(resolving(share(tmp_path, max_files=20), f"file://{tmp_path}/"), "too_many_files")


def test_a_loop_of_links_on_a_share_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(resolving(share(tmp_path), f"file://{tmp_path}/"), "unsafe_path")
    refused(resolving(share(tmp_path), f"file://{tmp_path}/a"), "unsafe_path")


# --- a disk that filled the cache's own files ---


def filled(path: Path) -> None:
    """A TiB that takes no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, 1 << 40)


def test_files_of_the_cache_that_a_disk_filled_keep_no_daemon_from_its_start(root: Path) -> None:
    with closing(DiskStore(root)) as store:
        layout = store.layout
    held = [
        *(layout.usage_log, layout.pending_file("w"), layout.ready_file("m"), layout.manifest("f" * 32)),
        *(layout.previous_file("m"), layout.lease("l")),
    ]
    for path in held:
        filled(path)
    with closing(DiskStore(root)) as store:
        assert store.names.all() == []
        assert list(store.pending.all()) == []


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("uses", {"names": {"a": [10**400, 1]}, "priorities": {}, "rates": {}, "lost": {}}),
        ("uses", [1]),
        ("lease", {"name": "../x", "holder": "h", "expires_at": 1}),
        ("lease", {"name": "x", "holder": "h", "expires_at": 10**400}),
        ("lease", [1]),
    ],
)
def test_files_of_the_cache_that_say_nonsense_keep_no_daemon_from_its_start(
    root: Path, file: str, said: object
) -> None:
    with closing(DiskStore(root)) as store:
        layout = store.layout
    {"uses": layout.usage_log, "lease": layout.lease("l")}[file].write_text(json.dumps(said))
    with closing(DiskStore(root)):
        pass


def test_a_pod_reads_no_more_of_a_file_than_any_has(root: Path) -> None:
    for folder in ("ready", "status"):
        filled(root / folder / "m.json")
    refused(lambda: ready.ready_model(root, "m"), "ready_file_unreadable")
    assert Mount(root).snapshot("m") is None
    assert Mount(root).status("m") == {}
    (root / "ready/m.json").unlink()
    with pytest.raises(NotFound):
        ready.ready_model(root, "m")


def test_a_pod_waits_for_no_pipe(root: Path) -> None:
    (root / "status").mkdir()
    os.mkfifo(root / "status/m.json")
    assert Mount(root).status("m") == {}


# --- an API that is none ---


@pytest.mark.parametrize(
    ("status", "content"),
    [(400, b"[1]"), (200, b"[1]"), (200, b"[" * MIB), (500, b"null"), (400, b"{}"), (200, b"")],
)
async def test_an_answer_that_is_none_of_the_api_is_an_error_of_ours(
    spoken: Spoken, status: int, content: bytes
) -> None:
    spoken.say = lambda _: Reply.of(status, {}, content)
    async with Client(spoken.url) as client:
        with pytest.raises(CachdError):
            await client.models()


async def test_an_answer_of_an_api_that_never_ends_is_refused(spoken: Spoken) -> None:
    spoken.say = lambda _: Reply(200, {}, ENDLESS, 0, 1 << 40, None)
    async with Client(spoken.url) as client:
        with pytest.raises(Invalid) as refusal:
            await client.models()
    assert refusal.value.code == "document_too_large"
