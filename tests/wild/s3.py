"""S3 servers and buckets with odd behaviour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests.ground.bucket import Bucket, Refused, Ways
from tests.ground.models import noise
from tests.ground.origin import Saying, Status
from tests.ground.raw import Asked, RawServer, ranged, reply
from tests.wild.field import Odd, World, wild

MODEL = {"config.json": b"{}", "onnx/model.bin": noise(100_000)}
WEIGHTS = "m/llama/onnx/model.bin"


@contextmanager
def held(world: World, files: Mapping[str, bytes] = MODEL, **ways: Any) -> Iterator[Bucket]:
    """A bucket of the row's name that has `files` in m/llama/, and treats its readers as `ways` say."""
    with Bucket(f"wild-{world.row}") as bucket:
        bucket.ways = Ways(**ways)
        for path, content in files.items():
            bucket.put(f"m/llama/{path}", content)
        yield bucket


def pull(
    world: World, bucket: Bucket, key: str = "m/llama/", files: Mapping[str, bytes] = MODEL, **columns: Any
) -> Odd:
    """A pull of a prefix or a key; `columns` are more columns of the bucket's entry."""
    keys = {} if columns.get("anonymous") else {"credentials": world.keys()}
    entry = {"prefix": f"s3://{bucket.name}/", "endpoint": bucket.url, **keys, **columns}
    return Odd(f"s3://{bucket.name}/{key}", files, entries=(entry,))


@wild("plain-bucket")
def plain_bucket(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        yield pull(world, bucket, region="us-east-1")


# --- objects that are folders ---


@wild("marker-for-the-model")
def marker_for_the_model(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.put("m/llama", b"")
        yield pull(world, bucket, "m/llama")


@wild("marker-inside")
def marker_inside(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.put("m/llama/onnx", b"")
        yield pull(world, bucket)


@wild("marker-of-hadoop")
def marker_of_hadoop(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        for key in ("m/llama_$folder$", "m/llama/onnx_$folder$", "m/llama/empty_$folder$", "m/llama/onnx/"):
            bucket.put(key, b"")
        yield pull(world, bucket, "m/llama")


@wild("marker-of-azure")
def marker_of_azure(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.put("m/llama/empty", b"", x_amz_meta_hdi_isfolder="true")
        yield pull(world, bucket)


@wild("marker-of-a-mount")
def marker_of_a_mount(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.put("m/llama/empty", b"", Content_Type="application/x-directory")
        yield pull(world, bucket)


@wild("marker-alone")
def marker_alone(world: World) -> Iterator[Odd]:
    with held(world, {}) as bucket:
        bucket.put("m/llama", b"")
        yield pull(world, bucket, "m/llama")


@wild("file-and-folder")
def file_and_folder(world: World) -> Iterator[Odd]:
    with held(world, {**MODEL, "onnx": b"bytes"}) as bucket:
        yield pull(world, bucket)


# --- what HEAD says ---


@wild("head-says-empty-object")
def head_says_empty_object(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.fault("*", Status(200, {"ETag": '"one"'}), methods=["HEAD"])
        yield pull(world, bucket)


@wild("object-head-refused")
def head_refused(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.fault("*", Status(403), methods=["HEAD"])
        yield pull(world, bucket)


@wild("head-without-length")
def head_without_length(world: World) -> Iterator[Odd]:
    """It keeps the connection open after such a HEAD."""
    content = noise(100_000)
    entry = b"<Contents><Key>m/llama/it.bin</Key><ETag>one</ETag><Size>100000</Size></Contents>"

    def answer(asked: Asked) -> bytes:
        if asked.method == "HEAD":
            is_there = asked.target.endswith("it.bin")
            return reply(asked, "200 OK" if is_there else "404 Not Found", length=None)
        if "list-type" in asked.target:
            listing = b"<ListBucketResult><IsTruncated>false</IsTruncated>%b</ListBucketResult>"
            return reply(asked, body=listing % entry)
        return ranged(asked, content, 'ETag: "one"')

    with RawServer(answer) as server:
        prefix = "s3://wild-head-without-length/"
        columns = {"prefix": prefix, "endpoint": server.url, "anonymous": True}
        yield Odd(f"{prefix}m/llama", {"it.bin": content}, entries=(columns,))


@wild("object-etag-without-quotes")
def etag_without_quotes(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.fault("*", Saying({"ETag": "one"}), methods=["HEAD"])
        yield pull(world, bucket)


# --- where the bucket is, and who may read it ---


@wild("region-400")
def region_400(world: World) -> Iterator[Odd]:
    with held(world, region="eu-west-3", moved=400) as bucket:
        yield pull(world, bucket)


@wild("region-301")
def region_301(world: World) -> Iterator[Odd]:
    with held(world, region="eu-west-3", moved=301) as bucket:
        yield pull(world, bucket)


@wild("region-307")
def region_307(world: World) -> Iterator[Odd]:
    with held(world, region="eu-west-3", moved=307) as bucket:
        yield pull(world, bucket, region="us-east-1")


@wild("region-not-served")
def region_not_served(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.fault("*", Refused(301, "PermanentRedirect", more="<Region>eu-west-3</Region>"))
        yield pull(world, bucket)


@wild("path-style-forbidden")
def path_style_forbidden(world: World) -> Iterator[Odd]:
    with held(world, forbids_path="SecondLevelDomainForbidden") as bucket:
        yield pull(world, bucket, addressing="path")


@wild("anonymous-bucket")
def anonymous_bucket(world: World) -> Iterator[Odd]:
    with held(world, is_public=True) as bucket:
        bucket.access_keys = set()
        yield pull(world, bucket, anonymous=True)


@wild("requester-pays")
def requester_pays(world: World) -> Iterator[Odd]:
    with held(world, is_requester_pays=True) as bucket:
        yield pull(world, bucket, requester_pays=True)


@wild("no-right-to-list")
def no_right_to_list(world: World) -> Iterator[Odd]:
    with held(world, may_list=False) as bucket:
        yield pull(world, bucket, WEIGHTS, {"model.bin": MODEL["onnx/model.bin"]})


@wild("no-right-to-versions")
def no_right_to_versions(world: World) -> Iterator[Odd]:
    with held(world, is_versioned=True, may_read_versions=False) as bucket:
        yield pull(world, bucket)


# --- what S3 refuses ---

REFUSED = {
    "archived-object": Refused(403, "InvalidObjectState", more="<StorageClass>GLACIER</StorageClass>"),
    "customers-key": Refused(400, "InvalidRequest", "The object was stored using Server Side Encryption."),
    "kms-key-denied": Refused(403, "AccessDenied", "not authorized to perform: kms:Decrypt"),
    "wrong-secret-key": Refused(403, "SignatureDoesNotMatch"),
    "clock-differs": Refused(403, "RequestTimeTooSkewed"),
}


def refuses(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.fault(f"/{bucket.name}/{WEIGHTS}", REFUSED[world.row])
        yield pull(world, bucket)


for row in REFUSED:
    wild(row)(refuses)


@wild("no-such-bucket")
def no_such_bucket(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.name = "wild-another"
        entry = {"prefix": "s3://wild-gone/", "endpoint": bucket.url, "credentials": world.keys()}
        yield Odd("s3://wild-gone/m/llama/", {}, entries=(entry,))


@wild("says-slow-down")
def says_slow_down(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        for path, method in ((f"/{bucket.name}", "GET"), (f"/{bucket.name}/{WEIGHTS}", "HEAD")):
            bucket.fault(path, Refused(503, "SlowDown"), times=1, methods=[method])
        bucket.fault(f"/{bucket.name}/{WEIGHTS}", Refused(503, "SlowDown"), times=1)
        yield pull(world, bucket)


# --- keys and listings ---


@wild("empty-segment")
def empty_segment(world: World) -> Iterator[Odd]:
    with held(world, {**MODEL, "a//b": b"x"}) as bucket:
        yield pull(world, bucket)


@wild("odd-keys")
def odd_keys(world: World) -> Iterator[Odd]:
    server = world.s3()
    files = {name: name.encode() for name in ("a + b", "a%2Bb", "a?b", "a#b", "a&b=c", "a.", "🦙.bin")}
    for name, content in files.items():
        server.put("wild-odd-keys", f"m/{name}", content)
    keys = world.keys(server.access_key, server.secret_key)
    entry = {"prefix": "s3://wild-odd-keys/", "endpoint": server.url, "credentials": keys}
    yield Odd("s3://wild-odd-keys/m/", files, entries=(entry,))


@wild("many-pages")
def many_pages(world: World) -> Iterator[Odd]:
    files = {f"shard-{number:03}": str(number).encode() for number in range(60)}
    with held(world, files, page_size=7) as bucket:
        yield pull(world, bucket, "", {f"m/llama/{path}": content for path, content in files.items()})
