"""What the source of s3:// asks of a bucket, and what it makes of each answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from cachd.errors import CachdError, NotFound
from cachd.model import Digest, Extent, File, Manifest, Ref
from cachd.sources.aws import Keys
from cachd.sources.buckets import Service
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http
from cachd.sources.s3 import BucketSource
from tests.fetching import http, read
from tests.ground.bucket import Bucket, Refused
from tests.ground.origin import Status

CONTENT = b"content"
TOKEN = CancelToken()


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with Bucket() as started:
        started.ways.is_public = True
        yield started


def source(bucket: Bucket) -> BucketSource:
    return BucketSource(http(), Service(bucket.url, "us-east-1"), Keys(are_none=True))


def resolved(bucket: Bucket, ref: str, *, by: BucketSource | None = None) -> Manifest:
    return (by or source(bucket)).resolve(Ref.parse(ref), TOKEN).select((), ())


def paths(bucket: Bucket, ref: str) -> list[str]:
    return sorted(file.path for file in resolved(bucket, ref).files)


def refused(bucket: Bucket, ref: str) -> CachdError:
    with pytest.raises(CachdError) as refusal:
        resolved(bucket, ref)
    return refusal.value


def asked(bucket: Bucket, path: str) -> list[str]:
    """The methods of the requests for an object, each with its range, if it has one."""
    found = [seen for seen in bucket.requests if seen.path == path]
    return [f"{seen.method} {seen.headers.get('range', '')}".strip() for seen in found]


def opened(by: BucketSource, file: File) -> bytes:
    return read(by.open(file, Extent(0, file.size), TOKEN), file.size)


# --- what a ref names ---


def test_a_ref_names_a_folder_or_one_object(bucket: Bucket) -> None:
    bucket.put("m/a", CONTENT)
    bucket.put("m/b/c", CONTENT)
    assert paths(bucket, "s3://models/m/") == paths(bucket, "s3://models/m") == ["a", "b/c"]
    assert paths(bucket, "s3://models/") == ["m/a", "m/b/c"]
    (file,) = resolved(bucket, "s3://models/m/b/c").files
    assert (file.path, file.size, file.origin) == ("c", len(CONTENT), "s3://models/m/b/c")
    assert refused(bucket, "s3://models/m/x").code == "file_not_found"
    assert isinstance(refused(bucket, "s3://models/x/"), NotFound)


def test_a_name_of_an_object_and_of_a_folder_is_refused_unless_the_object_is_empty(bucket: Bucket) -> None:
    bucket.put("m/a", b"")
    bucket.put("m/a/x", CONTENT)
    bucket.put("m/a/y", CONTENT)
    assert paths(bucket, "s3://models/m/a") == ["x", "y"]
    bucket.put("m/a", CONTENT)
    error = refused(bucket, "s3://models/m/a")
    assert error.code == "bad_manifest"
    assert "the folder of 2 others, such as 'x'" in error.detail
    bucket.put("m/empty", b"")
    error = refused(bucket, "s3://models/m/empty")
    assert (error.code, "is an empty object" in error.detail) == ("file_not_found", True)


def test_one_object_needs_no_permission_to_list_and_a_folder_does(bucket: Bucket) -> None:
    bucket.put("m/a", CONTENT)
    bucket.put("m/b", b"")
    bucket.ways.may_list = False
    assert paths(bucket, "s3://models/m/a") == ["a"]
    for ref in ("s3://models/m/", "s3://models/m/b", "s3://models/m/x"):
        assert refused(bucket, ref).code == "source_forbidden"


def test_an_object_that_may_not_be_read_is_refused_unless_its_name_is_a_folder(bucket: Bucket) -> None:
    bucket.put("m/a", CONTENT)
    bucket.fault("/models/m/a", Refused(403, "AccessDenied"), methods=("GET", "HEAD"))
    assert refused(bucket, "s3://models/m/a").code == "source_forbidden"
    bucket.put("m/a/x", CONTENT)
    assert paths(bucket, "s3://models/m/a") == ["x"]


def test_sha256sums_states_digests_and_is_no_file(bucket: Bucket) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    bucket.put("m/a", CONTENT)
    bucket.put("m/b", CONTENT)
    bucket.put("m/SHA256SUMS", f"{digest}  a\n".encode())
    files = {file.path: file.digest for file in resolved(bucket, "s3://models/m/").files}
    assert files == {"a": Digest("sha256", digest), "b": None}
    bucket.put("m/SHA256SUMS", b"none")
    assert refused(bucket, "s3://models/m/").code == "bad_checksums"


def test_what_has_not_ended_cannot_be_used_and_is_no_file(bucket: Bucket) -> None:
    bucket.put("m/x.part", CONTENT)
    assert refused(bucket, "s3://models/m/").code == "incomplete_model"
    bucket.put("m/a", CONTENT)
    manifest = source(bucket).resolve(Ref.parse("s3://models/m/"), TOKEN)
    assert [file.path for file in manifest.select((), ("*.part",)).files] == ["a"]
    assert refused(bucket, "s3://models/m/").code == "incomplete_model"


def test_the_revision_is_that_of_the_objects(bucket: Bucket) -> None:
    bucket.put("m/a", CONTENT)
    before = resolved(bucket, "s3://models/m/").revision
    assert resolved(bucket, "s3://models/m/").revision == before
    bucket.put("m/a", CONTENT, etag="two")
    assert resolved(bucket, "s3://models/m/").revision != before


# --- one object ---


def test_an_object_is_described_by_head_and_downloaded_by_one_get(bucket: Bucket) -> None:
    path, by = bucket.put("m/a", CONTENT), source(bucket)
    (file,) = resolved(bucket, "s3://models/m/a", by=by).files
    assert file.validator == '"one"'
    assert opened(by, file) == CONTENT
    assert asked(bucket, path) == ["HEAD", "GET"]
    assert bucket.requests[-1].headers["if-match"] == '"one"'


@pytest.mark.parametrize("status", [400, 403, 405, 501])
def test_a_head_that_fails_without_a_reason_is_followed_by_a_get_of_a_byte(
    bucket: Bucket, status: int
) -> None:
    path = bucket.put("m/a", CONTENT)
    bucket.fault(path, Status(status), methods=["HEAD"])
    (file,) = resolved(bucket, "s3://models/m/a").files
    assert (file.size, asked(bucket, path)) == (len(CONTENT), ["HEAD", "GET bytes=0-0"])


def test_a_head_that_fails_for_load_is_not_followed_by_a_get(bucket: Bucket) -> None:
    path = bucket.put("m/a", CONTENT)
    bucket.fault(path, Status(500), methods=["HEAD"])
    assert refused(bucket, "s3://models/m/a").code == "origin_failed"
    assert asked(bucket, path) == ["HEAD"]


def test_an_empty_object_without_head_has_no_first_byte_and_is_asked_for(bucket: Bucket) -> None:
    bucket.put("m/a", CONTENT)
    path = bucket.put("m/b", b"")
    bucket.fault(path, Status(405), methods=["HEAD"])
    sizes = {file.path: file.size for file in resolved(bucket, "s3://models/m/").files}
    assert sizes == {"a": len(CONTENT), "b": 0}
    assert asked(bucket, path) == ["HEAD", "GET bytes=0-0", "GET"]


@pytest.mark.parametrize("status", [400, 501])
def test_a_server_that_refuses_to_be_asked_for_checksums_is_asked_without_them_from_then_on(
    bucket: Bucket, status: int
) -> None:
    for key in ("m/a", "m/b"):
        bucket.put(key, CONTENT)
    bucket.fault(
        "*", Status(status), methods=("GET", "HEAD"), when=lambda s: "x-amz-checksum-mode" in s.headers
    )
    by = source(bucket)
    assert len(resolved(bucket, "s3://models/m/a", by=by).files) == 1
    before = len(bucket.requests)
    assert len(resolved(bucket, "s3://models/m/b", by=by).files) == 1
    assert [seen.method for seen in bucket.requests[before:] if seen.path == "/models/m/b"] == ["HEAD"]


# --- downloads that are refused ---


@pytest.mark.parametrize(("status", "is_asked_again"), [(403, True), (400, True), (404, True), (500, False)])
def test_a_refused_download_is_explained_by_a_get_and_tried_again(
    bucket: Bucket, status: int, is_asked_again: bool
) -> None:
    path, by = bucket.put("m/a", CONTENT), source(bucket)
    (file,) = resolved(bucket, "s3://models/m/a", by=by).files
    bucket.fault(path, Status(status), times=1)
    if is_asked_again:
        assert opened(by, file) == CONTENT
        assert asked(bucket, path) == ["HEAD", "GET", "GET bytes=0-0", "GET"]
    else:
        with pytest.raises(CachdError) as refusal:
            opened(by, file)
        assert refusal.value.origin_status == status
        assert asked(bucket, path) == ["HEAD", "GET"]


def test_a_download_of_an_object_that_is_gone_says_so(bucket: Bucket) -> None:
    bucket.put("m/a", CONTENT)
    by = source(bucket)
    (file,) = resolved(bucket, "s3://models/m/a", by=by).files
    bucket.remove("m/a")
    with pytest.raises(CachdError) as refusal:
        opened(by, file)
    assert refusal.value.code == "file_not_found"


def test_a_busy_service_refuses_a_download_with_a_pause(bucket: Bucket) -> None:
    path, by = bucket.put("m/a", CONTENT), source(bucket)
    (file,) = resolved(bucket, "s3://models/m/a", by=by).files
    bucket.fault(path, Status(503), times=1)
    with pytest.raises(CachdError) as refusal:
        opened(by, file)
    assert (refusal.value.code, refusal.value.origin_status) == ("rate_limited", 503)


def test_versions_that_may_not_be_read_by_their_id_are_read_without_it_from_then_on(bucket: Bucket) -> None:
    bucket.ways.is_versioned = True
    path, by = bucket.put("m/a", CONTENT), source(bucket)
    (file,) = resolved(bucket, "s3://models/m/a", by=by).files
    assert file.validator == '"one" version=v1'
    assert opened(by, file) == CONTENT
    assert "versionId=v1" in bucket.requests[-1].query
    bucket.ways.may_read_versions = False
    for _ in range(2):
        assert opened(by, file) == CONTENT
        assert "versionId" not in bucket.requests[-1].query
    assert asked(bucket, path) == ["HEAD", "GET", "GET", *["GET bytes=0-0"] * 2, "GET", "GET"]


# --- clients ---


def test_a_bucket_in_the_name_of_the_host_is_asked_by_a_client_of_its_own() -> None:
    made: list[str] = []

    def beneath(host: str) -> Http:
        made.append(host)
        return http("127.0.0.0/8")

    service = Service("http://s3.example", "us-east-1", addressing="virtual")
    by = BucketSource(http(), service, Keys(are_none=True), beneath)
    for _ in range(2):
        with pytest.raises(CachdError):
            by.open(File("a", 7, "s3://models/m/a", None), Extent(0, 7), TOKEN)
    assert made == ["http://models.s3.example/"]
    by.anew()
    plain = Service("http://s3.example", "us-east-1", addressing="path")
    with pytest.raises(CachdError):
        BucketSource(http(), plain, Keys(are_none=True), beneath).open(
            File("a", 7, "s3://models/m/a", None), Extent(0, 7), TOKEN
        )
    assert made == ["http://models.s3.example/"], "the endpoint itself needs no other client"
