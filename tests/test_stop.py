"""What a stop or a kill in mid-pull costs: bytes that the source sends twice, counted where they are sent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.policy.parts import UNKEPT_BYTES, unkept_bytes
from tests.conftest import Engine, wish_of
from tests.ground.bucket import Bucket
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import IgnoreRange, Origin, Server
from tests.ground.site import until
from tests.test_kill import sums

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 60.0
FIRST_STREAMS = 4  # at work before throughput says anything
SIZE, HELD_AT = 48 * MIB, 3 * MIB + 512 * KIB  # in parts of 4 MiB
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDSCRIPTED",
    "AWS_SECRET_ACCESS_KEY": "said to nobody",
    "AWS_DEFAULT_REGION": "us-east-1",
}
Nodes = Callable[..., Node]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model named `it` comes from: the server that sends its bytes, its ref, options to reach it."""

    server: Server
    ref: str
    size: int
    options: dict[str, object]


@pytest.fixture(params=["http", "s3", "hf", "several files"])
def place(request: pytest.FixtureRequest, origin: Origin, hub: Hub) -> Iterator[Place]:
    match request.param:
        case "http":
            yield Place(origin, origin.add("/it", noise(SIZE)), SIZE, {})
        case "hf":
            hub.add("org/it", {"it.safetensors": noise(SIZE)})
            yield Place(hub.cdn, "hf://org/it", SIZE, {"hf_endpoint": hub.url})
        case "s3":
            with Bucket() as bucket:
                bucket.put("it/model.safetensors", noise(SIZE))
                yield Place(bucket, "s3://models/it/", SIZE, {"s3_endpoint_url": bucket.url})
        case _:
            files = {f"{number}.bin": noise(SIZE // 6, number) for number in range(6)}
            for name, content in files.items():
                origin.add(f"/it/{name}", content)
            origin.add("/it/SHA256SUMS", sums(files))
            yield Place(origin, f"{origin.url}/it/", SIZE, {})


@dataclass(slots=True)
class Pulling:
    """A pull of which every stream waits in the middle of its part."""

    place: Place
    node: Node
    sent: int = 0

    def ended(self) -> int:
        """Let the next life of the daemon end the pull; the bytes that were sent twice."""
        server = self.place.server
        before = server.bytes_sent()
        self.node.start()
        assert self.node.ready("it").status == 200
        del before
        return server.bytes_sent() - self.place.size
