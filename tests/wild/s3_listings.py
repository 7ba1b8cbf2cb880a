"""S3 servers that know a part of ListObjectsV2, or list odd objects."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.ground.bucket import Refused
from tests.ground.models import noise
from tests.ground.origin import Saying, Status
from tests.ground.raw import Asked, RawServer, ranged, reply
from tests.ground.weights import gguf, lfs_pointer, safetensors
from tests.wild.field import Odd, World, wild
from tests.wild.s3 import MODEL, WEIGHTS, held, pull

PAGED = {f"shard-{number:02}": str(number).encode() for number in range(8)}
KEYS = 3  # of a page


class Lister:
    """A server that lists `files` below m/ as its rows say, and serves them. Anybody may read."""

    def __init__(self, world: World, files: Mapping[str, bytes] = PAGED) -> None:
        self.files = dict(files)
        self.prefix = f"s3://wild-{world.row}/"

    def page(self, query: Mapping[str, str]) -> str:
        """The elements of a page, in the way of version 1."""
        return self.elements(query.get("marker", ""))

    def elements(self, after: str, *, form: str = "<IsTruncated>{}</IsTruncated>") -> str:
        """What stands after a key; `form` is given whether more follows."""
        keys = sorted(f"m/{path}" for path in self.files if f"m/{path}" > after)
        entries = "".join(self.entry(key) for key in keys[:KEYS])
        return form.format("true" if len(keys) > KEYS else "false") + entries

    def entry(self, key: str) -> str:
        size = len(self.files[key.removeprefix("m/")])
        return f"<Contents><Key>{escape(key)}</Key><ETag>one</ETag><Size>{size}</Size></Contents>"

    def answer(self, asked: Asked) -> bytes:
        parts = urlsplit(asked.target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        key = unquote(parts.path).removeprefix("/").partition("/")[2]
        if not key:
            listing = f"<ListBucketResult><Name>b</Name>{self.page(query)}</ListBucketResult>"
            return reply(asked, body=listing.encode())
        content = self.files.get(key.removeprefix("m/"))
        if content is None:
            return reply(asked, "404 Not Found", body=b"<Error><Code>NoSuchKey</Code></Error>")
        return ranged(asked, content, 'ETag: "one"')


@contextmanager
def listed(lister: Lister, files: Mapping[str, bytes] | None = None) -> Iterator[Odd]:
    with RawServer(lister.answer) as server:
        entry = {"prefix": lister.prefix, "endpoint": server.url, "anonymous": True}
        yield Odd(f"{lister.prefix}m/", lister.files if files is None else files, entries=(entry,))


@wild("version-1-of-listings")
def version_1_of_listings(world: World) -> Iterator[Odd]:
    with listed(Lister(world)) as odd:
        yield odd


@wild("the-same-token-again")
def the_same_token_again(world: World) -> Iterator[Odd]:
    class Same(Lister):
        def page(self, query: Mapping[str, str]) -> str:
            return "<NextContinuationToken>same</NextContinuationToken>" + super().page({})

    with listed(Same(world), {}) as odd:
        yield odd


@wild("pages-without-is-truncated")
def pages_without_is_truncated(world: World) -> Iterator[Odd]:
    class Silent(Lister):
        def page(self, query: Mapping[str, str]) -> str:
            after = query.get("continuation-token", "")
            said = self.elements(after, form="")
            last = sorted(f"m/{path}" for path in self.files if f"m/{path}" > after)[:KEYS][-1]
            more = last != f"m/{max(self.files)}"
            return said + (f"<NextContinuationToken>{last}</NextContinuationToken>" if more else "")

    with listed(Silent(world)) as odd:
        yield odd


@wild("full-pages-without-more")
def full_pages_without_more(world: World) -> Iterator[Odd]:
    class Full(Lister):
        def page(self, query: Mapping[str, str]) -> str:
            return f"<MaxKeys>{KEYS}</MaxKeys>" + self.elements(query.get("marker", ""), form="")

    with listed(Full(world)) as odd:
        yield odd


@wild("entries-without-size")
def entries_without_size(world: World) -> Iterator[Odd]:
    class Sizeless(Lister):
        def entry(self, key: str) -> str:
            return f"<Contents><Key>{key}</Key></Contents>"

    with listed(Sizeless(world, {"a/config.json": b"{}", "a/w.bin": noise(500)})) as odd:
        yield odd


@wild("keys-not-encoded")
def keys_not_encoded(world: World) -> Iterator[Odd]:
    with listed(Lister(world, {"a+b": b"1", "a%2Bb": b"2", "a b": b"3"})) as odd:
        yield odd


@wild("page-as-listing")
def page_as_listing(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        page = b"<html><head><title>Sign in</title></head><body/></html>"
        bucket.fault(f"/{bucket.name}", Status(200, {"Content-Type": "text/html"}, page))
        yield pull(world, bucket)


@wild("listing-is-an-error-with-200")
def listing_is_an_error_with_200(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.fault(f"/{bucket.name}", Refused(200, "InternalError"), times=1)
        yield pull(world, bucket)


@wild("listed-and-gone")
def listed_and_gone(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        gone = Refused(404, "NoSuchKey")
        bucket.fault(f"/{bucket.name}/{WEIGHTS}", gone, methods=["HEAD", "GET"])
        yield pull(world, bucket)


# --- checksums and empty objects ---


@wild("checksums-not-known")
def checksums_not_known(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        bucket.fault(
            "*",
            Refused(400, "InvalidArgument", "Unsupported header 'x-amz-checksum-mode' received"),
            when=lambda seen: "x-amz-checksum-mode" in seen.headers,
            methods=["HEAD", "GET"],
        )
        yield pull(world, bucket)


@wild("checksum-of-checksums")
def checksum_of_checksums(world: World) -> Iterator[Odd]:
    parts = [hashlib.sha256(piece).digest() for piece in (MODEL["onnx/model.bin"][:50], b"")]
    composite = base64.b64encode(hashlib.sha256(b"".join(parts)).digest()).decode()
    with held(world) as bucket:
        stated = {"x_amz_checksum_sha256": composite}
        bucket.put(WEIGHTS, MODEL["onnx/model.bin"], etag="0123456789abcdef-2", **stated)
        yield pull(world, bucket)


@wild("empty-object-without-head")
def empty_object_without_head(world: World) -> Iterator[Odd]:
    files = {**MODEL, "merges.txt": b""}
    with held(world, files) as bucket:
        bucket.fault("*", Status(403), methods=["HEAD"])
        yield pull(world, bucket, files=files)


@wild("gzip-stored")
def gzip_stored(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        coded = Saying({"Content-Encoding": "gzip"})
        bucket.fault(f"/{bucket.name}/{WEIGHTS}", coded, methods=["HEAD", "GET"])
        yield pull(world, bucket)


# --- what people upload ---


def uploaded(row: str, files: Mapping[str, bytes], wanted: Mapping[str, bytes], **asked: Any) -> None:
    """A row: a prefix with these objects, of which these are wanted."""

    @wild(row)
    def prefix(world: World) -> Iterator[Odd]:
        with held(world, files) as bucket:
            odd = pull(world, bucket, files=wanted)
            yield Odd(odd.ref, wanted, odd.entries, asked)


uploaded("key-with-a-line-feed", {**MODEL, "a\nb": b"x"}, {})


@wild("keys-of-slashes")
def keys_of_slashes(world: World) -> Iterator[Odd]:
    with held(world) as bucket:
        for key in ("/", "m/", "m/llama/", "m/llama/onnx/"):
            bucket.put(key, b"")
        yield pull(world, bucket, "", {f"m/llama/{path}": content for path, content in MODEL.items()})


LITTER = (".git/config", ".git/hooks/pre-push", "onnx/._model.bin", ".DS_Store", "Thumbs.db")
uploaded("clone-in-a-bucket", {**MODEL, **dict.fromkeys(LITTER, b"x")}, MODEL)
uploaded("pointer-in-a-bucket", {"config.json": b"{}", "m.safetensors": lfs_pointer(safetensors())}, {})
BEGUN = {"m.gguf": gguf(), "m.gguf.aria2": b"\0\1"}
uploaded("upload-goes-on", BEGUN, {})
uploaded("upload-goes-on-excluded", {**MODEL, **BEGUN}, MODEL, exclude=["m.g*"])
FRAMED = b"".join(b"%x\r\n%b\r\n" % (len(held), held) for held in (safetensors(), b""))
uploaded("upload-in-its-frames", {"config.json": b"{}", "m.safetensors": FRAMED}, {})
uploaded("upload-broken-off", {"config.json": b"{}", "m.safetensors": safetensors()[:1500]}, {})
