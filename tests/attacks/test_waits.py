"""Origins that keep cachd waiting: however they do, a cancel, a stop and other pulls are served."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from tests.conftest import Engine
from tests.ground.bucket import Bucket
from tests.ground.hub import EVERY_METHOD, Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Fault, Late, Origin, Reply, Seen, Status, Trickle
from tests.ground.scripted import Scripted, black_hole, heard
from tests.ground.site import until

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 120.0
PROMPT_SECONDS = 8.0  # on a busy machine; an origin is otherwise waited for for 30 seconds, and again
GRACE_SECONDS = 15.0  # of the 20 after which the kernel ends a daemon
LONG_AGO = {"Retry-After": "1000000000"}
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDSCRIPTED",
    "AWS_SECRET_ACCESS_KEY": "said to nobody",
    "AWS_DEFAULT_REGION": "us-east-1",
}
Engines = Callable[..., Engine]


def dripping(connection: socket.socket, _: int) -> None:
    """An answer's head, a byte in two seconds."""
    stopped = threading.Event()
    heard(connection)
    for letter in itertools.chain(b"HTTP/1.1 200 OK\r\nX: ", itertools.repeat(120)):
        connection.sendall(bytes([letter]))
        stopped.wait(2)


def silent(connection: socket.socket, _: int) -> None:
    """Nothing, until the client goes."""
    while connection.recv(65536):
        pass


class EndlessPages(Fault):
    """A listing of which every page leads to another one."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        number = next(self._numbers)
        body = (
            f"<ListBucketResult><IsTruncated>true</IsTruncated>"
            f"<NextContinuationToken>{number}</NextContinuationToken>"
            f"<Contents><Key>elsewhere/{number}</Key><ETag>one</ETag><Size>1</Size></Contents>"
            f"</ListBucketResult>"
        )
        return Reply.of(200, {"Content-Type": "application/xml"}, body.encode())


@dataclass
class Kept:
    """A pull that its origin keeps waiting: its ref, the options to reach it, whether it is where it should."""

    ref: str
    arrived: Callable[[Node], bool]
    options: dict[str, object] = field(default_factory=dict)


def shows(name: str, *wanted: tuple[str, object]) -> Callable[[Node], bool]:
    """Whether a node's pull of the name says all of this."""

    def told(node: Node) -> bool:
        pull = node.ask("GET", f"/v1/models/{name}").document["pull"]
        return all(
            (pull[key] or {}).get("reason") == value if key == "waits" else pull[key] == value
            for key, value in wanted
        )

    return told


@contextmanager
def never_answered() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add("/it", noise(KIB))
        origin.fault("*", Late(), methods=EVERY_METHOD)
        yield Kept(ref, lambda _: bool(origin.requests))


@contextmanager
def dripped_head() -> Iterator[Kept]:
    with Scripted(dripping) as server:
        yield Kept(f"{server.url}/it", lambda _: server.accepted > 0)


@contextmanager
def handshake() -> Iterator[Kept]:
    with Scripted(silent) as server:
        yield Kept(server.url.replace("http:", "https:") + "/it", lambda _: server.accepted > 0)


@contextmanager
def tunnel() -> Iterator[Kept]:
    with Scripted(silent) as proxy:
        # loopback is asked without a proxy, another address of the allowed network by it
        yield Kept("http://10.1.2.3/it", lambda _: proxy.accepted > 0, {"proxy": proxy.url})


@contextmanager
def connecting() -> Iterator[Kept]:
    with black_hole() as (host, port):
        resolving = shows("it", ("state", "resolving"))
        yield Kept(f"http://{host}:{port}/it", resolving, {"connect_seconds": 600})


@contextmanager
def many_slow_files() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add_model("it", {f"{number}.bin": b"x%d" % number for number in range(2000)})
        origin.fault("*", Late(3.0), methods=("HEAD",))
        yield Kept(ref, lambda _: any(seen.method == "HEAD" for seen in origin.requests))


@contextmanager
def pages_without_end() -> Iterator[Kept]:
    with Bucket() as bucket:
        bucket.fault("/models", EndlessPages())
        yield Kept("s3://models/it/", lambda _: len(bucket.requests) > 3, {"s3_endpoint_url": bucket.url})


@contextmanager
def listing_of_a_bucket() -> Iterator[Kept]:
    with Bucket() as bucket:
        bucket.fault("/models", Late(), methods=EVERY_METHOD)
        yield Kept("s3://models/it/", lambda _: bool(bucket.requests), {"s3_endpoint_url": bucket.url})


@contextmanager
def listing_of_the_hub() -> Iterator[Kept]:
    with Hub() as hub:
        hub.add("org/it", {"config.json": b"{}"})
        hub.fault("*", Late(), methods=EVERY_METHOD)
        yield Kept("hf://org/it", lambda _: bool(hub.requests), {"hf_endpoint": hub.url})


@contextmanager
def back_off_of_a_resolve() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add("/it", noise(KIB))
        origin.fault("*", Status(429, LONG_AGO), methods=EVERY_METHOD)
        yield Kept(ref, shows("it", ("state", "waiting"), ("waits", "origin")))


@contextmanager
def back_off_of_a_download() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add("/it", noise(6 * MIB))
        origin.fault("*", Status(429, LONG_AGO))
        yield Kept(ref, shows("it", ("state", "downloading"), ("waits", "origin")))


@contextmanager
def dripped_bytes() -> Iterator[Kept]:
    with Origin() as origin:
        ref = origin.add("/it", noise(6 * MIB))
        origin.fault("*", Trickle(2400))
        yield Kept(ref, shows("it", ("state", "downloading"), ("waits", "slow")))


KEPT = {
    "a request is never answered": never_answered,
    "the head of an answer drips": dripped_head,
    "a TLS handshake is never answered": handshake,
    "CONNECT is never answered": tunnel,
    "a connection is never taken": connecting,
    "2,000 requests take three seconds each": many_slow_files,
    "a listing has no last page": pages_without_end,
    "a listing of a bucket is never answered": listing_of_a_bucket,
    "a listing of the Hub is never answered": listing_of_the_hub,
    "it is to wait for 30 years": back_off_of_a_resolve,
    "its download is to wait for 30 years": back_off_of_a_download,
    "its bytes drip": dripped_bytes,
}


@pytest.fixture(params=KEPT)
def kept(request: pytest.FixtureRequest) -> Iterator[Kept]:
    with KEPT[request.param]() as found:
        yield found


@pytest.mark.parametrize("end", ["SIGTERM", "DELETE", "replace"])
def test_a_pull_ends_promptly_wherever_its_origin_keeps_it(
    kept: Kept, end: str, node: Callable[..., Node], origin: Origin
) -> None:
    running = node(env=S3_KEYS, allow=["127.0.0.0/8", "10.0.0.0/8"], **kept.options)
    assert running.pull(kept.ref, name="it").status == 202
    until(lambda: kept.arrived(running))
    began = time.monotonic()
    if end == "SIGTERM":
        assert running.stop() == 0
        assert time.monotonic() - began < GRACE_SECONDS
    elif end == "DELETE":
        assert running.ask("DELETE", "/v1/models/it").status == 200
        assert time.monotonic() - began < PROMPT_SECONDS
    else:
        other = origin.add("/other", noise(KIB))
        assert running.pull(other, name="it", replace=True).status == 202
        assert running.ready("it").status == 200
        assert time.monotonic() - began < PROMPT_SECONDS
