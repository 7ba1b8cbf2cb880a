"""Objects of a bucket as people's tools leave them: folders that are objects, odd keys, pages, versions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cachd.model.folders import folder_markers
from cachd.sources.aws import Keys
from cachd.sources.bucket_listing import BucketListing
from cachd.sources.buckets import Buckets, Service
from cachd.sources.cancel import CancelToken
from cachd.sources.s3 import BucketSource
from tests.conftest import Engine, spec_of
from tests.fetching import KIB, MIB, PATIENCE_SECONDS, http, refused, resolve
from tests.ground.bucket import Bucket, Refused
from tests.ground.checksums import sha256sums
from tests.ground.models import noise
from tests.ground.origin import Origin, Saying, Status
from tests.ground.raw import Asked, RawServer, ranged, reply
from tests.ground.s3 import S3Server

Engines = Callable[..., Engine]

CONFIG, WEIGHTS = b'{"model_type": "x"}', noise(3 * KIB)
MODEL = {"config.json": CONFIG, "onnx/model.bin": WEIGHTS, "onnx/.keep": b""}


def hold(bucket: Bucket, files: dict[str, bytes], prefix: str = "m/llama/") -> None:
    for path, content in files.items():
        bucket.put(prefix + path, content)


def pulled(engine: Engine, root: Path, ref: str) -> dict[str, bytes]:
    """The files of the model that a pull of `ref` publishes, by path."""
    engine.pull(ref, name="it")
    view = root / "models/it"
    if view.is_file():
        return {"": view.read_bytes()}
    return {str(p.relative_to(view)): p.read_bytes() for p in view.rglob("*") if p.is_file()}


# --- objects that are folders ---

MARKERS: dict[str, dict[str, dict[str, str]]] = {
    "the model, without slash": {"m/llama": {}},
    "the model, with slash": {"m/llama/": {}},
    "the model, by Hadoop": {"m/llama_$folder$": {}},
    "inside, without slash": {"m/llama/onnx": {}},
    "inside, with slash": {"m/llama/onnx/": {}},
    "inside, by Hadoop": {"m/llama/onnx_$folder$": {}},
    "inside, in two forms": {"m/llama/onnx": {}, "m/llama/onnx/": {}, "m/llama/onnx_$folder$": {}},
    "nothing below, by Hadoop": {"m/llama/empty_$folder$": {}},
    "nothing below, by s3fs": {"m/llama/empty": {"Content_Type": "application/x-directory; charset=UTF-8"}},
    "nothing below, by Swift": {"m/llama/empty": {"Content_Type": "application/directory"}},
    "nothing below, by Azure": {"m/llama/empty": {"x_amz_meta_hdi_isfolder": "true"}},
    "a chain of them": {"m/llama/a": {}, "m/llama/a/b": {}, "m/llama/a/b/c/": {}},
}


@pytest.mark.parametrize("slash", ["", "/"], ids=["bare", "slash"])
@pytest.mark.parametrize("markers", MARKERS.values(), ids=MARKERS)
def test_an_object_that_stands_for_a_folder_is_neither_the_model_nor_a_file_of_it(
    bucket: Bucket, engine: Engines, root: Path, markers: dict[str, dict[str, str]], slash: str
) -> None:
    hold(bucket, MODEL)
    for key, headers in markers.items():
        bucket.put(key, b"", **headers)
    assert pulled(engine(s3_endpoint_url=bucket.url), root, f"s3://models/m/llama{slash}") == MODEL


def test_a_name_that_is_a_file_and_a_folder_is_refused_with_both_names(
    bucket: Bucket, engine: Engines
) -> None:
    hold(bucket, {**MODEL, "onnx": b"12345"})
    running = engine(s3_endpoint_url=bucket.url)
    error = refused(lambda: running.pull("s3://models/m/llama/"), "bad_manifest")
    assert "'onnx' as a file of 5 bytes" in error.detail
    assert "'onnx/" in error.detail
    bucket.remove("m/llama/onnx")
    bucket.put("m/llama", b"12345")
    error = refused(lambda: running.pull("s3://models/m/llama"), "bad_manifest")
    assert "s3://models/m/llama is an object of 5 bytes" in error.detail
    assert "config.json" in error.detail
    assert running.pull("s3://models/m/llama/").name


def test_bytes_under_the_name_of_a_folder_are_refused(bucket: Bucket, engine: Engines) -> None:
    hold(bucket, {**MODEL, "onnx/": b"12345"})
    error = refused(lambda: engine(s3_endpoint_url=bucket.url).pull("s3://models/m/llama/"), "bad_manifest")
    assert "'onnx/'" in error.detail


@pytest.mark.parametrize("key", ["m/llama", "m/llama/", "m/llama_$folder$", "m/llama/sub/"])
def test_a_folder_with_nothing_in_it_is_no_model(bucket: Bucket, engine: Engines, key: str) -> None:
    bucket.put(key, b"")
    running = engine(s3_endpoint_url=bucket.url)
    for ref in ("s3://models/m/llama", f"s3://models/{key}"):
        refused(partial(running.pull, ref, name="it"), "file_not_found")


def test_a_web_server_that_lists_a_folder_as_an_empty_file_serves_the_model(
    origin: Origin, engine: Engines, root: Path
) -> None:
    files = {**MODEL, "onnx": b""}
    for path, content in {**MODEL, "SHA256SUMS": sha256sums(files)}.items():
        origin.add(f"/llama/{path}", content)
    assert pulled(engine(), root, f"{origin.url}/llama/") == MODEL
    assert not [seen for seen in origin.requests if seen.path == "/llama/onnx"]


def test_an_empty_file_beside_a_name_that_only_begins_the_same_is_a_file() -> None:
    assert not folder_markers({"a": 0, "ab/c": 1, "a.json": 2, "b_$folder$x": 0, "c": 5, "c/d": 1})


def test_markers_on_a_real_server_are_no_files(
    s3: S3Server, engine: Engines, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, s3)
    for path, content in {**MODEL, "onnx_$folder$": b"", "empty/": b"", "": b""}.items():
        s3.put("markers", f"llama/{path}", content)
    assert pulled(engine(s3_endpoint_url=s3.url), root, "s3://markers/llama") == MODEL


# --- keys, pages, buckets, single objects ---

ODD_NAMES = [
    "a b",
    "a+b",
    "a%2Bb",
    "a%20b",
    "a?b",
    "a#b",
    "a&b=c",
    "a.",
    "...",
    "日本 é",
    "🦙.bin",
    "a'b",
    "~*",
]


def test_odd_keys_of_a_real_server_are_listed_and_fetched_under_their_names(
    s3: S3Server, engine: Engines, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, s3)
    files = {name: name.encode() for name in ODD_NAMES} | {"sub dir/+#?": b"x"}
    for path, content in files.items():
        s3.put("odd", f"m + %20/{path}", content)
    running = engine(s3_endpoint_url=s3.url)
    assert pulled(running, root, "s3://odd/m + %20/") == files
    refs = [f"s3://odd/m + %20/{name}" for name in ODD_NAMES]
    for number, ref in enumerate(refs):
        running.pull(ref, name=f"one{number}")
        assert (root / f"models/one{number}/{ODD_NAMES[number]}").read_bytes() == ODD_NAMES[number].encode()


@pytest.mark.parametrize("key", ["a//b", "./b", "a/../b", "a/.", "/b"])
def test_a_key_that_is_no_path_is_refused_by_its_name(bucket: Bucket, engine: Engines, key: str) -> None:
    hold(bucket, {**MODEL, key: b"x"})
    error = refused(lambda: engine(s3_endpoint_url=bucket.url).pull("s3://models/m/llama/"), "unsafe_path")
    assert repr(key) in error.detail


def test_a_bucket_is_a_model_by_itself(bucket: Bucket, engine: Engines, root: Path) -> None:
    hold(bucket, MODEL, prefix="")
    bucket.put("onnx_$folder$", b"")
    assert pulled(engine(s3_endpoint_url=bucket.url), root, "s3://models/") == MODEL


def test_a_listing_of_many_pages_is_read_to_its_end(bucket: Bucket, engine: Engines, root: Path) -> None:
    bucket.ways.page_size = 7
    files = {f"{number:03} +é/x": str(number).encode() for number in range(50)}
    hold(bucket, files)
    assert pulled(engine(s3_endpoint_url=bucket.url), root, "s3://models/m/llama/") == files


def test_ten_thousand_objects_are_listed_in_ten_pages(bucket: Bucket) -> None:
    hold(bucket, {f"{number % 7}/{number:05}": b"x" for number in range(10_000)})
    listing = BucketListing(Buckets(http(), Service(bucket.url), Keys()))
    listed = listing.read("models", "m/llama/", CancelToken())
    assert len(listed) == 10_000
    assert len(bucket.requests) == 10


def test_one_object_needs_no_permission_to_list_and_its_siblings_are_not_listed(
    bucket: Bucket, engine: Engines, root: Path
) -> None:
    hold(bucket, {"a.gguf": WEIGHTS, "a.gguf.old": b"x"})
    bucket.ways.may_list = False
    assert pulled(engine(s3_endpoint_url=bucket.url), root, "s3://models/m/llama/a.gguf") == {
        "a.gguf": WEIGHTS
    }
    prefixes = {seen.query for seen in bucket.requests if "list-type" in seen.query}
    assert all("a.gguf%2F" in query for query in prefixes)


# --- what HEAD says ---


def test_an_object_whose_head_says_that_it_is_empty_is_as_long_as_get_says(
    bucket: Bucket, engine: Engines, root: Path
) -> None:
    hold(bucket, MODEL)
    bucket.fault("*", Status(200, {"ETag": '"one"', "Content-Length": "0"}), methods=["HEAD"])
    assert pulled(engine(s3_endpoint_url=bucket.url), root, "s3://models/m/llama/") == MODEL


@pytest.mark.parametrize("status", [400, 403, 405, 501])
def test_an_object_whose_head_is_refused_is_asked_for_by_get(
    bucket: Bucket, engine: Engines, root: Path, status: int
) -> None:
    files = {path: content for path, content in MODEL.items() if content}
    hold(bucket, files)
    bucket.fault("*", Status(status), methods=["HEAD"])
    assert pulled(engine(s3_endpoint_url=bucket.url), root, "s3://models/m/llama/") == files


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_a_head_that_states_no_length_is_not_waited_for(bucket: Bucket, status: str) -> None:
    """As rclone answers for a key that is not there, and keeps the connection open."""
    listing = b"<ListBucketResult><IsTruncated>false</IsTruncated>%b</ListBucketResult>"
    entry = b"<Contents><Key>m/it</Key><ETag>one</ETag><Size>3072</Size></Contents>"

    def answer(asked: Asked) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, "404 Not Found" if asked.target.endswith("/m") else status, length=None)
        if "list-type" in asked.target:
            return reply(asked, body=listing % entry)
        return ranged(asked, WEIGHTS, 'ETag: "one"')

    with RawServer(answer) as server:
        source = BucketSource(http(stall_seconds=PATIENCE_SECONDS), Service(server.url))
        if status.startswith("404"):
            refused(partial(resolve, source, "s3://models/m"), "file_not_found")
        else:
            assert [f.size for f in resolve(source, "s3://models/m").files] == [len(WEIGHTS)]


def test_an_etag_without_quotes_is_an_etag(bucket: Bucket, engine: Engines, root: Path) -> None:
    hold(bucket, MODEL)
    bucket.fault("*", Saying({"ETag": "one"}), methods=["HEAD"])
    assert pulled(engine(s3_endpoint_url=bucket.url), root, "s3://models/m/llama/") == MODEL
    matches = {
        seen.headers.get("if-match") for seen in bucket.requests if seen.method == "GET" and seen.extent
    }
    assert matches <= {None, '"one"'}


# --- versions ---


def test_a_pull_whose_object_is_overwritten_goes_on_with_the_version_that_it_resolved(
    bucket: Bucket, engine: Engines, root: Path
) -> None:
    bucket.ways.is_versioned = True
    old, new = noise(9 * MIB, 1), noise(9 * MIB, 2)
    path = bucket.put("m/it", old, etag="old")
    hold_ = bucket.hold(path, after=MIB)
    running = engine(streams=1, s3_endpoint_url=bucket.url)
    begun = running.begin(spec_of("s3://models/m/"))
    assert hold_.reached.wait(PATIENCE_SECONDS)
    bucket.put("m/it", new, etag="new")
    hold_.release()
    begun.done.result(PATIENCE_SECONDS)
    assert (root / "models/m/it").read_bytes() == old
    assert bucket.bytes_sent(path) == len(old)
    running.pull("s3://models/m/", name="next")
    assert (root / "models/next/it").read_bytes() == new


def test_versions_that_may_not_be_read_by_their_id_are_read_without(
    bucket: Bucket, engine: Engines, root: Path
) -> None:
    bucket.ways.is_versioned, bucket.ways.may_read_versions = True, False
    hold(bucket, MODEL)
    assert pulled(engine(s3_endpoint_url=bucket.url), root, "s3://models/m/llama/") == MODEL
    assert len([seen for seen in bucket.requests if "versionId" in seen.query]) <= 2 * len(MODEL)


def test_an_object_of_a_real_versioned_bucket_is_read_by_its_version(
    s3: S3Server, engine: Engines, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, s3)
    s3.put("versions", "m/it", WEIGHTS)
    s3.client().put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    for content in (b"older", CONFIG):
        s3.put("versions", "m/it", content)
    assert pulled(engine(s3_endpoint_url=s3.url), root, "s3://versions/m/") == {"it": CONFIG}


# --- what S3 refuses, told apart ---

REFUSED = {
    "archived": Refused(403, "InvalidObjectState", more="<StorageClass>DEEP_ARCHIVE</StorageClass>"),
    "object_encrypted": Refused(
        400, "InvalidRequest", "The object was stored using a form of Server Side Encryption."
    ),
    "kms_denied": Refused(
        403, "AccessDenied", "User: x is not authorized to perform: kms:Decrypt on the resource"
    ),
    "source_unauthorized": Refused(403, "SignatureDoesNotMatch"),
    "source_forbidden": Refused(403, "AccessDenied"),
    "clock_skewed": Refused(403, "RequestTimeTooSkewed"),
    "file_not_found": Refused(404, "NoSuchKey"),
}


@pytest.mark.parametrize(("code", "reply"), REFUSED.items(), ids=REFUSED)
@pytest.mark.parametrize("when", ["HEAD", "GET"])
def test_why_s3_refuses_an_object_is_told(
    bucket: Bucket, engine: Engines, code: str, reply: Refused, when: str
) -> None:
    """HEAD gives no reason, and neither does the status of a GET alone."""
    path = bucket.put("m/it", WEIGHTS)
    bucket.fault(path, reply, methods=["HEAD", "GET"] if when == "HEAD" else ["GET"])
    error = refused(lambda: engine(s3_endpoint_url=bucket.url, retries=0).pull("s3://models/m/"), code)
    assert "m/it" in error.detail


def test_a_disabled_kms_key_has_its_own_error(bucket: Bucket, engine: Engines) -> None:
    path = bucket.put("m/it", WEIGHTS)
    bucket.fault(path, Refused(400, "KMS.DisabledException"), methods=["HEAD", "GET"])
    refused(lambda: engine(s3_endpoint_url=bucket.url, retries=0).pull("s3://models/m/it"), "kms_denied")


def test_an_object_that_a_real_server_encrypted_with_a_customers_key_is_named(
    s3: S3Server, engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, s3)
    s3.put("customers", "m/config.json", CONFIG)
    how = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": b"0" * 32}
    s3.client().put_object(Bucket="customers", Key="m/it", Body=WEIGHTS, **how)
    running = engine(s3_endpoint_url=s3.url, retries=0)
    for ref in ("s3://customers/m/", "s3://customers/m/it"):
        error = refused(partial(running.pull, ref, name="it"), "object_encrypted")
        assert "s3://customers/m/it" in error.detail


def test_a_real_server_tells_a_wrong_key_from_a_missing_permission_and_a_missing_bucket(
    s3: S3Server, engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("kept", "m/it", WEIGHTS)
    sign_in(monkeypatch, s3)
    refused(partial(engine(s3_endpoint_url=s3.url).pull, "s3://nowhere/m/"), "bucket_not_found")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    source = BucketSource(http(), Service(s3.url))
    refused(partial(resolve, source, "s3://kept/m/"), "source_unauthorized")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader_secret)
    for ref in ("s3://kept/m/", "s3://kept/m/it"):
        error = refused(partial(resolve, source, ref), "source_forbidden")
        assert f"{ref}: AccessDenied" in error.detail


def test_an_archived_object_is_named_with_the_command_that_restores_it(
    bucket: Bucket, engine: Engines
) -> None:
    hold(bucket, MODEL)
    bucket.fault("/models/m/llama/onnx/model.bin", REFUSED["archived"])
    running = engine(s3_endpoint_url=bucket.url)
    error = refused(lambda: running.pull("s3://models/m/llama/"), "archived")
    assert "DEEP_ARCHIVE" in error.detail
    assert "aws s3api restore-object --bucket models --key 'm/llama/onnx/model.bin'" in error.hint
    running.pull("s3://models/m/llama/", exclude=("onnx/",), name="rest")


def test_a_bucket_that_is_not_there_is_told_apart_from_a_key(bucket: Bucket, engine: Engines) -> None:
    hold(bucket, MODEL)
    running = engine(s3_endpoint_url=bucket.url, retries=0)
    missing: dict[str, tuple[str, ...]] = {
        "bucket_not_found": ("s3://other/m/", "s3://other/m", "s3://other/"),
        "file_not_found": ("s3://models/x/", "s3://models/x", "s3://models/m/llama/config"),
    }
    for code, refs in missing.items():
        for ref in refs:
            assert refused(partial(running.pull, ref, name="it"), code).hint


def sign_in(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
