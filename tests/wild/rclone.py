"""A real rclone as an S3 server, a web server and a WebDAV server."""

from __future__ import annotations

from collections.abc import Iterator

from tests.ground.checksums import sha256sums
from tests.ground.models import noise
from tests.ground.rclone import Kind, Rclone
from tests.wild.field import Odd, World, wild

MODEL = {"config.json": b"{}", "onnx/model.bin": noise(9 << 20), "onnx/empty": b""}  # three parts
ODD = {name: name.encode() for name in ("a + b", "a%2Bb", "a?b", "a#b", "a&b=c", "a.", "\N{LLAMA}.bin")}


@wild("rclone-s3")
def rclone_s3(world: World) -> Iterator[Odd]:
    with Rclone(world.share / "served", "s3") as server:
        for path, content in {**MODEL, **ODD}.items():
            server.put(f"wild-rclone/m/{path}", content)
        keys = world.keys(server.access_key, server.secret_key)
        entry = {"prefix": "s3://wild-rclone/", "endpoint": server.url, "credentials": keys}
        yield Odd("s3://wild-rclone/m/", {**MODEL, **ODD}, entries=(entry,))


@wild("rclone-http")
def rclone_http(world: World) -> Iterator[Odd]:
    yield from directory(world, "http")


@wild("rclone-webdav")
def rclone_webdav(world: World) -> Iterator[Odd]:
    yield from directory(world, "webdav")


def directory(world: World, kind: Kind) -> Iterator[Odd]:
    """A directory with SHA256SUMS."""
    files = {**MODEL, **ODD}
    with Rclone(world.share / "served", kind) as server:
        for path, content in {**files, "SHA256SUMS": sha256sums(files)}.items():
            server.put(f"m/{path}", content)
        yield Odd(f"{server.url}/m/", files)
