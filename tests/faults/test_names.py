"""What a source lists: names and sizes refused whole, before a byte is asked for, or kept exactly."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import escape

import pytest

from cachd.errors import CachdError, Changed
from cachd.model import MAX_FILES, Extent, Ref
from cachd.policy.shards import named
from cachd.sources.buckets import Service
from cachd.sources.cancel import CancelToken
from cachd.sources.huggingface import HubSource
from cachd.sources.s3 import BucketSource
from cachd.sources.secrets import Secret
from cachd.sources.web import WebSource
from tests.conftest import Engine
from tests.faults.test_fuzz import CHUNKED, LISTED, Spoken
from tests.fetching import fetch, http, refused, share
from tests.ground import mount
from tests.ground.hub import Hub
from tests.ground.models import digests, noise
from tests.ground.origin import Origin, Reply, Seen
from tests.ground.scripted import Scripted, heard
from tests.ground.weights import index

Engines = Callable[..., Engine]
SHA256 = "00ff" * 16
NOTHING = hashlib.sha256(b"").hexdigest()


def published(root: Path) -> list[str]:
    return sorted(mount.names(root))


# --- too much ---


def test_more_files_than_a_model_may_have_are_refused_before_any_of_them_is_asked_for(spoken: Spoken) -> None:
    lines = "".join(f"{SHA256}  f{number}\n" for number in range(MAX_FILES + 1)).encode()
    spoken.say = lambda _: Reply.of(200, {}, lines)
    refused(lambda: WebSource(http()).resolve(Ref.parse(f"{spoken.url}/m/"), CancelToken()), "too_many_files")
    assert len(spoken.requests) == 1


def test_a_bucket_of_too_many_objects_is_refused_before_any_of_them_is_asked_for(
    spoken: Spoken, keys: None
) -> None:
    bucket = BucketSource(http(), Service(spoken.url, "us-east-1"), max_files=2000)
    listed = [(f"m/{number}", '"e"') for number in range(101)]

    def say(seen: Seen) -> Reply:
        asked = len(spoken.requests)
        return page([(f"{key}-{asked}", etag) for key, etag in listed], then=f"page-{asked}")

    spoken.say = say
    refused(lambda: bucket.resolve(Ref.parse("s3://bucket/m/"), CancelToken()), "too_many_files")
    assert {seen.method for seen in spoken.requests} == {"GET"}
    assert len(spoken.requests) == 20


def test_a_share_of_too_many_files_is_refused(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number}.bin").write_bytes(noise(10, number))
    source = share(tmp_path, max_files=20)
    refused(lambda: source.resolve(Ref.parse(f"file://{tmp_path}/"), CancelToken()), "too_many_files")


def test_a_hundred_terabytes_are_refused_before_their_first_byte(
    spoken: Spoken, root: Path, engine: Engines
) -> None:
    told = json.dumps(LISTED).replace("1000", str(100 * 10**12)).encode()
    spoken.say = lambda _: Reply.of(200, {"Content-Type": "application/json"}, told)
    refused(lambda: engine(hf_endpoint=spoken.url).pull("hf://org/model"), "too_big")
    assert len(spoken.requests) == 1
    assert published(root) == []


# --- the names of a bucket ---

Listed = list[tuple[str, str]]


def page(listed: Listed, *, then: str = "") -> Reply:
    """One page of a listing (S3 API reference, ListObjectsV2), with the token of the next."""
    told = "".join(
        f"<Contents><Key>{quote(key)}</Key><ETag>{escape(etag)}</ETag>"
        f"<Size>{0 if key.endswith('/') else 5}</Size></Contents>"
        for key, etag in listed
    )
    more = f"<NextContinuationToken>{then}</NextContinuationToken>" if then else ""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name><Prefix>m/</Prefix>'
        f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(then)).lower()}</IsTruncated>{more}{told}"
        "</ListBucketResult>"
    )
    return Reply.of(200, {"Content-Type": "application/xml"}, body.encode())


@pytest.fixture
def spoken() -> Iterator[Spoken]:
    with Spoken() as server:
        yield server


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture
def bucket(spoken: Spoken, keys: None) -> BucketSource:
    return BucketSource(http(), Service(spoken.url, "us-east-1"))


def holds(spoken: Spoken, *listings: Listed) -> None:
    """Let a bucket answer its n-th listing with the n-th of `listings`, then with the last for ever."""
    left = list(listings)

    def say(seen: Seen) -> Reply:
        if seen.method == "HEAD":
            return Reply(200, {"ETag": '"e"'}, length=5)
        return page(left.pop(0) if len(left) > 1 else left[0])

    spoken.say = say


ODD_KEYS = ["a b", "a+b", "a%2Fb", "a?b", "a#b", "a&b", "é", "e\u0301", "日本", "x=y;z", "~", "'quoted'", "*"]


def test_odd_keys_of_a_bucket_keep_their_names_exactly(spoken: Spoken, bucket: BucketSource) -> None:
    holds(spoken, [("m/", '"e"'), ("m/dir/", '"e"'), *((f"m/{key}", '"e"') for key in ODD_KEYS)])
    found = bucket.resolve(Ref.parse("s3://bucket/m/"), CancelToken())
    assert [f.path for f in found.files] == sorted(ODD_KEYS)
    assert {f.origin for f in found.files} == {f"s3://bucket/m/{key}" for key in ODD_KEYS}
    asked = {seen.path for seen in spoken.requests if seen.method == "HEAD"}
    assert len(asked) == len(ODD_KEYS)


UNSAFE_KEYS = ["m//x", "m/../x", "m/a/../../x", "m/a\\b", "m/C:x", "m/a\u202eb", "m/" + "x" * 256]


@pytest.mark.parametrize("key", UNSAFE_KEYS, ids=ascii)
def test_an_unsafe_key_refuses_the_whole_bucket_prefix_before_anything_is_asked(
    spoken: Spoken, bucket: BucketSource, key: str
) -> None:
    holds(spoken, [("m/good", '"e"'), (key, '"e"')])
    refused(lambda: bucket.resolve(Ref.parse("s3://bucket/m/"), CancelToken()), "unsafe_path")
    assert {seen.method for seen in spoken.requests} == {"GET"}


def test_a_key_listed_twice_refuses_the_listing(spoken: Spoken, bucket: BucketSource) -> None:
    holds(spoken, [("m/a", '"e"'), ("m/a", '"f"')])
    refused(lambda: bucket.resolve(Ref.parse("s3://bucket/m/"), CancelToken()), "bad_manifest")


@pytest.mark.parametrize(
    "later",
    [[("m/a", '"e"')], [("m/a", '"e"'), ("m/b", '"f"')], [("m/a", '"e"'), ("m/b", '"e"'), ("m/c", '"e"')]],
    ids=["one is gone", "one changed", "one came"],
)
def test_a_bucket_that_changes_while_it_is_listed_is_no_mix(
    spoken: Spoken, bucket: BucketSource, later: Listed
) -> None:
    holds(spoken, [("m/a", '"e"'), ("m/b", '"e"')], later)
    with pytest.raises(Changed):
        bucket.resolve(Ref.parse("s3://bucket/m/"), CancelToken())
    assert [f.path for f in bucket.resolve(Ref.parse("s3://bucket/m/"), CancelToken()).files] == [
        key.removeprefix("m/") for key, _ in later
    ]


def test_a_branch_that_moves_after_it_was_resolved_is_read_at_the_commit_it_had(hub: Hub) -> None:
    first, second = noise(5000, 1), noise(5000, 2)
    hub.add("org/moving", {"a.bin": first})
    source = HubSource(http(), endpoint=hub.url, token=Secret(None))
    manifest = source.resolve(Ref.parse("hf://org/moving"), CancelToken())
    hub.add("org/moving", {"a.bin": second})
    into = memoryview(bytearray(5000))
    with source.open(manifest.files[0], Extent(0, 5000), CancelToken()) as body:
        body.readinto(into)
    assert bytes(into) == first
    assert source.resolve(Ref.parse("hf://org/moving"), CancelToken()).revision != manifest.revision


UNSAFE_PATHS = ["../x", "/x", "a/../../x", "C:\\x", "\\\\h\\s", ".git/hooks/x", "a\nb", "x" * 256]


@pytest.mark.parametrize("path", UNSAFE_PATHS, ids=ascii)
def test_an_unsafe_name_refuses_the_whole_model_of_a_hub_and_nothing_is_written(
    hub: Hub, root: Path, engine: Engines, path: str
) -> None:
    hub.add("org/evil", {"config.json": b"{}", path: noise(1000)})
    opened = engine(hf_endpoint=hub.url)
    before = digests(root)
    refused(lambda: opened.pull("hf://org/evil"), "unsafe_path")
    kept = {".cachd/pending/org--evil.failed"}  # how the pull ended
    assert {path: digest for path, digest in digests(root).items() if path not in kept} == before
    assert published(root) == []


# --- what is incomplete or refused ---


@pytest.mark.parametrize(
    "name", ["model-00002.safetensors", "../other.bin", "/etc/passwd", "./model-00002.safetensors"]
)
def test_an_index_that_names_a_shard_its_model_lacks_is_not_ready(
    hub: Hub, root: Path, engine: Engines, name: str
) -> None:
    files = {"model-00001.safetensors": noise(1000), "sub/model-00002.safetensors": noise(1000, 2)}
    told = index("model-00001.safetensors", name)
    hub.add("org/sharded", {**files, "model.safetensors.index.json": told})
    opened = engine(hf_endpoint=hub.url)
    error = refused(lambda: opened.pull("hf://org/sharded"), "incomplete_model")
    assert name.removeprefix("./") in error.detail
    assert published(root) == []
    assert list((root / "ready").iterdir()) == []
    left_out = opened.pull("hf://org/sharded", exclude=("*.index.json",))
    assert left_out.files == 2


def test_an_index_is_relative_to_its_folder_and_files_that_a_spec_excludes_are_not_missing(
    hub: Hub, engine: Engines
) -> None:
    shards = {"sub/a.safetensors": noise(1000), "sub/b.safetensors": noise(1000, 2)}
    told = index("a.safetensors", "b.safetensors")
    hub.add("org/nested", {**shards, "sub/model.safetensors.index.json": told})
    opened = engine(hf_endpoint=hub.url)
    assert opened.pull("hf://org/nested").files == 3
    assert opened.pull("hf://org/nested", name="part", exclude=("*b.safetensors",)).files == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"weight_map": 1}', b"\xff"])
def test_what_is_no_index_names_no_shard(content: bytes) -> None:
    assert named("model.safetensors.index.json", [content], set()).absent == ()
    assert named("model.safetensors.index.json", [index("a", 5)], {"a"}).absent == ("5",)


def test_a_model_of_a_refused_format_is_refused_with_its_files_named(
    hub: Hub, root: Path, engine: Engines
) -> None:
    hub.add("org/pickle", {"config.json": b"{}", "pytorch_model.bin": noise(1000)})
    hub.add("org/both", {"model.safetensors": noise(1000, 2), "pytorch_model.bin": noise(1000)})
    opened = engine(hf_endpoint=hub.url, refuse=("*.bin", "*.pt", "*.pkl"))
    for repo in ("org/pickle", "org/both"):
        error = refused(lambda repo=repo: opened.pull(f"hf://{repo}"), "file_refused")
        assert "pytorch_model.bin" in error.detail
        assert "exclude" in error.hint
    assert hub.cdn.bytes_sent() == 0
    assert published(root) == []
    assert opened.pull("hf://org/both", exclude=("*.bin",)).files == 1


def test_an_empty_file_is_published_with_the_digest_of_nothing(
    origin: Origin, root: Path, engine: Engines
) -> None:
    origin.add("/m/SHA256SUMS", f"{NOTHING}  empty.txt\n".encode())
    origin.add("/m/empty.txt", b"")
    assert engine().pull(f"{origin.url}/m/").verified
    assert digests(root / "models/m") == {"empty.txt": NOTHING}


# --- an answer without end ---


def test_trailers_without_end_are_the_origins_failure() -> None:
    def script(connection: socket.socket, _: int) -> None:
        heard(connection)
        connection.sendall(CHUNKED + b"2\r\nok\r\n0\r\n")
        while True:
            connection.sendall(b"X: x\r\n" * 1000)

    ended: list[object] = []

    def ask(url: str) -> None:
        try:
            ended.append(fetch(http(), url, 2))
        except CachdError as error:
            ended.append(error.code)

    with Scripted(script) as server:
        asking = threading.Thread(target=ask, args=(f"{server.url}/x",), daemon=True)
        asking.start()
        asking.join(30)
    assert ended
