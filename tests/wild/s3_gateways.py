"""Gateways to S3 whose listings and answers differ from those of AWS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from tests.ground.bucket import Refused
from tests.ground.models import noise
from tests.ground.origin import Saying
from tests.ground.raw import Asked, chunked, reply
from tests.wild.field import Odd, World, wild
from tests.wild.s3 import MODEL, WEIGHTS, held, pull
from tests.wild.s3_listings import Lister, listed

DEEP = {"config.json": b"{}", "onnx/model.bin": noise(900), "onnx/q4/a.bin": noise(90), "vae/b.bin": noise(9)}


@wild("folders-without-a-delimiter")
def folders_without_a_delimiter(world: World) -> Iterator[Odd]:
    class Folders(Lister):
        def page(self, query: Mapping[str, str]) -> str:
            prefix = query.get("prefix", "")
            below = [f"m/{path}" for path in self.files if f"m/{path}".startswith(prefix)]
            rest = [key.removeprefix(prefix) for key in sorted(below)]
            folders = sorted({name.partition("/")[0] for name in rest if "/" in name})
            entries = [self.entry(f"{prefix}{name}") for name in rest if "/" not in name]
            common = [f"<CommonPrefixes><Prefix>{prefix}{n}/</Prefix></CommonPrefixes>" for n in folders]
            return "<IsTruncated>false</IsTruncated>" + "".join([*entries, *common])

    with listed(Folders(world, DEEP)) as odd:
        yield odd


@wild("prefix-ignored")
def prefix_ignored(world: World) -> Iterator[Odd]:
    class Everything(Lister):
        def page(self, query: Mapping[str, str]) -> str:
            other = "<Contents><Key>other/x.bin</Key><ETag>one</ETag><Size>7</Size></Contents>"
            ours = "".join(self.entry(f"m/{path}") for path in self.files)
            return f"<IsTruncated>false</IsTruncated>{other}{ours}"

    with listed(Everything(world, DEEP)) as odd:
        yield odd


@wild("keys-encoded-unasked")
def keys_encoded_unasked(world: World) -> Iterator[Odd]:
    class Encoded(Lister):
        def entry(self, key: str) -> str:
            return super().entry(key).replace(key, quote(key))

    with listed(Encoded(world, {"config.json": b"{}", "a b.bin": noise(500)}), {}) as odd:
        yield odd


@wild("listing-repeats-keys")
def listing_repeats_keys(world: World) -> Iterator[Odd]:
    class Twice(Lister):
        def entry(self, key: str) -> str:
            return super().entry(key) * 2

    with listed(Twice(world, DEEP), {}) as odd:
        yield odd


@wild("listing-with-a-namespace")
def listing_with_a_namespace(world: World) -> Iterator[Odd]:
    class Named(Lister):
        def answer(self, asked: Asked) -> bytes:
            xmlns = b'<ListBucketResult xmlns="http://obs.myhwclouds.com/doc/2015-06-30/">'
            answer = super().answer(asked).replace(b"<ListBucketResult>", xmlns)
            _, _, body = answer.partition(b"\r\n\r\n")
            if xmlns not in body:
                return answer
            return reply(asked, body=b'\xef\xbb\xbf<?xml version="1.0" encoding="UTF-8"?>\n' + body)

    with listed(Named(world)) as odd:
        yield odd


@wild("listing-in-chunks")
def listing_in_chunks(world: World) -> Iterator[Odd]:
    class Chunked(Lister):
        def answer(self, asked: Asked) -> bytes:
            body = super().answer(asked).partition(b"\r\n\r\n")[2]
            if b"<ListBucketResult>" not in body:
                return super().answer(asked)
            lines = ("Transfer-Encoding: chunked", "Trailer: x-amz-checksum-crc32")
            return reply(asked, "200 OK", *lines, body=chunked(b" \n \n" + body, 50), length=None)

    with listed(Chunked(world)) as odd:
        yield odd


@wild("etag-of-r2")
def etag_of_r2(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.put(WEIGHTS, MODEL["onnx/model.bin"], etag="AMClbuttcYqB7BF87QMg3AoksQp+l1irPgM/w1tR==" * 5)
        yield pull(world, bucket)


@wild("object-head-has-another-etag")
def object_head_has_another_etag(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.fault(f"/{bucket.name}/{WEIGHTS}", Saying({"ETag": '"of-head"'}), methods=["HEAD"])
        yield pull(world, bucket, files={})


@wild("object-with-no-etag")
def object_with_no_etag(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        silent = Saying({"ETag": None})
        bucket.fault(f"/{bucket.name}/{WEIGHTS}", silent, methods=["HEAD", "GET"])
        yield pull(world, bucket)


def answered(row: str, fault: Any, *, times: int | None = None, ready: bool = False) -> None:
    """A row: a bucket whose objects are answered so."""

    @wild(row)
    def of_objects(world: World) -> Iterator[Odd]:
        with held(world) as bucket:
            bucket.fault(f"/{bucket.name}/{WEIGHTS}", fault, times, methods=["GET"])
            yield pull(world, bucket, files=MODEL if ready else {})


answered("object-is-a-delete-marker", Refused(405, "MethodNotAllowed"))
answered("object-fails-for-ever", Refused(500, "InternalError"))
answered("object-failed-once", Refused(500, "InternalError"), times=1, ready=True)
answered("error-with-200", Refused(200, "InternalError"))
answered("object-times-out", Refused(400, "RequestTimeout"), times=1, ready=True)
OVER_QUOTA = "Cannot download file, download bandwidth or transaction cap exceeded"
answered("quota-of-downloads", Refused(403, "AccessDenied", OVER_QUOTA))


@wild("folders-without-end")
def folders_without_end(world: World) -> Iterator[Odd]:
    class Deeper(Lister):
        def page(self, query: Mapping[str, str]) -> str:
            below = f"<CommonPrefixes><Prefix>{query['prefix']}{'a' * 60}/</Prefix></CommonPrefixes>"
            return f"<IsTruncated>false</IsTruncated>{below}"

    with listed(Deeper(world, DEEP), {}) as odd:
        yield odd
