"""What a client of the Hub endpoint tries. Each address of the loopback is a client of its own."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.attacks.by_client import HEADS, descriptors, readable
from tests.attacks.target import MIB, PATIENCE_SECONDS, Target, attack
from tests.attacks.test_connections import end_of, status
from tests.attacks.test_hub_endpoint import PARTS
from tests.ground.hub_client import NEVER_RESUMES, Got, endpoint_of
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Flip
from tests.ground.site import until

POD, NEW_POD = "127.0.0.2", "127.0.0.3"
READY = "/org/model/resolve/main/model.safetensors"
CONTENT = noise(6 * MIB, seed=6)  # of this file: see `besieged`
READS_ALONG = {"User-Agent": NEVER_RESUMES}
GET = "GET {} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def dial(node: Node, client: str) -> socket.socket:
    place = urlsplit(endpoint_of(node))
    at = place.hostname or "", place.port or 0
    return socket.create_connection(at, PATIENCE_SECONDS, source_address=(client, 0))


@contextmanager
def asking(
    node: Node,
    path: str,
    client: str,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Iterator[http.client.HTTPResponse]:
    """The answer, whose body is not read yet."""
    place = urlsplit(endpoint_of(node)).netloc
    connection = http.client.HTTPConnection(place, timeout=PATIENCE_SECONDS, source_address=(client, 0))
    with closing(connection):
        connection.request(method, path, body, headers or {})
        yield connection.getresponse()


def got(
    node: Node,
    path: str,
    client: str = POD,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Got:
    """One complete answer."""
    with asking(node, path, client, method, body, headers) as answer:
        named = {name.lower(): value for name, value in answer.getheaders()}
        return Got(answer.status, named, answer.read())


def in_parallel(count: int, do: Callable[[int], None]) -> None:
    """So many threads that do something. Raises the first error."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(do, range(count)))


def pods_are_served(target: Target, times: int = 10) -> None:
    """A pod gets a ready model, and the API answers."""
    for _ in range(times):
        assert got(target.node, READY, NEW_POD, headers={"Range": "bytes=5-9"}).body == CONTENT[5:10]
        assert target.ask("GET", "/v1/models/served/ready").status == 200


@attack("hub-connections")
def connections_that_are_slow_and_never_read(target: Target) -> None:
    """Two attackers take all threads by answers that they do not read, and all other connections."""
    said = [GET.format(READY).encode(), *PARTS, b""]
    with descriptors(), ExitStack() as stack:
        pod = stack.enter_context(dial(target.node, POD))
        for number in range(target.many(3000)):
            sock = stack.enter_context(dial(target.node, f"127.0.0.{66 + number % 2}"))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with suppress(ConnectionError):
                sock.sendall(said[number % len(said)])
            if number % 100 == 0:
                pod.sendall(GET.format(READY).replace("GET", "HEAD").encode())
                assert status(pod.recv(65536)) == 200
        pods_are_served(target)
        left = resource.prlimit(target.node.pid, resource.RLIMIT_NOFILE)[0]
        assert len(list(Path(f"/proc/{target.node.pid}/fd").iterdir())) < left / 2
    assert target.node.metric("cachd_hub_connections") <= 1024
    for begin, more in HEADS.values():
        assert _taken(target, begin, more) < 32 * MIB, begin


def _taken(target: Target, begin: bytes, more: bytes) -> int:
    """Bytes that the endpoint took before it closed."""
    sent, most = 0, target.many(640 * MIB)
    with dial(target.node, "127.0.0.66") as sock, suppress(ConnectionError):
        sock.sendall(begin)
        while sent < most:
            sock.sendall(more)
            sent += len(more)
    return sent


LONG = "x" * 8000
ODD_PATHS = (
    "//[",
    "http://[/x",
    "/" + "a/" * 8000,
    f"/{LONG}/{LONG}/resolve/main/x",
    f"/org/model/resolve/{LONG}/config.json",
    "/org%2Fmodel/resolve/main/config.json",
    "/datasets%2Forg/model/resolve/main/x",
    "/../../etc/resolve/main/passwd",
    "/org/..%2f..%2fmodel/resolve/main/config.json",
    "/org/model/resolve/main/../../../../etc/passwd",
    "/org/model/resolve/main/..%2f..%2f.cachd%2flock",
    "/org/model/resolve/main/%00",
    "/org/model/resolve/main/%ed%a0%80",
    "/org/model/resolve/%ed%a0%80/config.json",
    "/org/model/resolve/main%0d%0aX-Injected:%201/config.json",
    "/api/models/org/model/revision/main%23include=x",
    "/api/models/org/model/revision/..%2f..",
    "/api/models/org/model/tree/main/..%2f..",
    "/.attempt/1/org/model/resolve/main/..%2fx",
    "/.attempt/%D9%A1/org/model/resolve/main/config.json",
    "/.attempt/99999999999999999999/org/model/resolve/main/config.json",
)
ODD_BODIES = (
    ("application/json", b"[" * MIB),
    ("application/json", b'{"paths": ' * 10_000),
    ("application/json", json.dumps({"paths": ["x"] * 100_000}).encode()),
    ("application/json", b'{"paths": {"a": [1, 2, {}]}}'),
    ("application/json", b'{"paths": 1e999999}'),
    ("application/x-www-form-urlencoded", b"paths=x&" * 100_000),
    ("application/x-www-form-urlencoded", b"\xff\xfe" * 1000),
    ("text/plain", bytes(MIB)),
)


@attack("hub-requests")
def paths_and_bodies_that_few_servers_expect(target: Target) -> None:
    node, before = target.node, len(target.node.log)
    names = {model["name"] for model in target.ask("GET", "/v1/models").document["models"]}

    def ask(number: int) -> None:
        client = f"127.0.0.{70 + number}"
        for path in ODD_PATHS:
            for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS"):
                with dial(node, client) as sock:
                    said = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
                    sock.sendall(said.encode())
                    answer = end_of(sock)
                assert status(answer) in (404, 503), (path, method, answer)
                assert b"X-Injected" not in answer
        for kind, body in ODD_BODIES:
            headers = {"Content-Type": kind}
            path = "/api/models/org/model/paths-info/main"
            listed = got(node, path, client, "POST", body, headers)
            refused = (400, 404, 413, 503)
            assert listed.status in refused or listed.body == b"[]", (kind, listed.status)

    in_parallel(max(2, target.many(10)), ask)
    for entry in node.log[before:]:
        assert entry["level"] not in ("error", "critical"), entry
    assert {model["name"] for model in target.ask("GET", "/v1/models").document["models"]} == names


@attack("hub-pulls")
def models_without_number_that_are_not_here(target: Target) -> None:
    node, before = target.node, len(target.hub.requests)
    target.hub.add("attack/wanted", {"config.json": b"{}"})
    began = time.monotonic()

    def ask(number: int) -> None:
        for each in range(target.many(100)):
            path = f"/api/models/attack/absent-{number}-{each}"
            assert got(node, path, "127.0.0.66").status in (404, 503)

    in_parallel(20, ask)
    minutes = 2 + (time.monotonic() - began) // 60
    asked = {seen.path for seen in target.hub.requests[before:] if "absent" in seen.path}
    assert len(asked) <= 120 * minutes
    assert got(node, "/attack/wanted/resolve/main/config.json", POD).body == b"{}"
    target.pull(target.origin.add("/beside", b"beside"), "attack-beside")
    assert target.ended("attack-beside").status == 200


RANGES = {
    "bytes=0-0,2-3,1-5": (200, 0, None),
    "bytes=0-,0-,0-": (200, 0, None),
    "bytes=9-3": (200, 0, None),
    "bytes=-0": (416, 0, 0),
    "bytes=99999999999-": (416, 0, 0),
    "bytes=0-99999999999999999999999": (200, 0, None),
    "bytes=-99999999999": (206, 0, None),
    "bytes=5-9": (206, 5, 10),
    "bytes=+5-9": (200, 0, None),
    "chunks=0-1": (200, 0, None),
    "bytes=" + "0-1," * 2000: (200, 0, None),
}


@attack("hub-ranges")
def ranges_and_attempts_that_are_guessed(target: Target) -> None:
    node = target.node
    for asked, (code, start, stop) in RANGES.items():
        answer = got(node, READY, headers={"Range": asked})
        assert answer.status == code, (asked, answer.status)
        assert code == 416 or answer.body == CONTENT[start:stop]
    for _ in range(target.many(2000)):
        with asking(node, READY, "127.0.0.66", headers={"Range": "bytes=0-"}) as begun:
            assert begun.read(10) == CONTENT[:10]
    content = noise(9 * MIB, seed=9)
    target.hub.add("attack/arriving", {"model.safetensors": content})
    hold = target.hub.cdn.hold(target.hub.cdn_path("attack/arriving", "model.safetensors"), after=MIB)
    try:
        path = "/attack/arriving/resolve/main/model.safetensors"
        address = got(node, path, method="HEAD", headers=READS_ALONG).headers["location"]
        for number in range(2, 2 + target.many(1000)):
            assert got(node, address.replace("/1/", f"/{number}/", 1)).status == 410
        for asked in ("bytes=5-9", f"bytes={9 * MIB - 1}-", "bytes=-1"):  # they wait for the digest
            with dial(node, POD) as sock:
                sock.sendall(GET.format(address).replace("\r\n\r\n", f"\r\nRange: {asked}\r\n\r\n").encode())
                head = sock.recv(65536)
                assert head.endswith(b"\r\n\r\n"), head
    finally:
        hold.release()
    assert got(node, address).body == content


@attack("hub-tokens")
def tokens_of_others_and_made_up_ones(target: Target) -> None:
    file = target.node.root.parent / "hub-token"
    file.write_text(target.hub.token)
    target.hub.add("attack/private", {"config.json": b"secret"}, private=True)
    options: dict[str, Any] = {"hub_listen": "127.0.0.1:0", "hub_share": "token", "hf_token_file": str(file)}
    path = "/attack/private/resolve/main/config.json"
    right = {"Authorization": f"Bearer {target.hub.token}"}
    odd = ("", "x" * 5000, "\xe9\xff", "a b", "x\ty", f"{target.hub.token}, Bearer x", "hf_of_somebody")
    with target.another("hub-tokens", **options) as node:
        node.pull("hf://attack/private")
        assert node.ready("attack--private").status == 200
        assert got(node, path, headers=right).body == b"secret"
        began, before = time.monotonic(), len(target.hub.requests)
        for text in odd:
            for kind in ("Bearer", "bearer", "Basic", "Token"):
                assert got(node, path, POD, headers={"Authorization": f"{kind} {text}"}).status == 404
        assert got(node, path, POD).status == 404

        def ask(number: int) -> None:
            for each in range(target.many(200)):
                token = {"Authorization": f"Bearer hf_guess_{number}_{each}"}
                assert got(node, path, "127.0.0.66", headers=token).status in (404, 503)

        in_parallel(20, ask)
        asked = len(target.hub.requests) - before
        assert asked <= 2 * 60 * (2 + (time.monotonic() - began) // 60) + len(odd) + 1
        assert got(node, path, headers=right).body == b"secret"
        folded = b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\n x: y\r\n\r\n"
        for line in (folded, folded.replace(b"\r\n x", b"\rx"), folded.replace(b"\r\n x", b"\x00")):
            with dial(node, POD) as sock:
                sock.sendall(line % (path.encode(), target.hub.token.encode()))
                assert status(sock.recv(65536)) in (400, 404)
        assert not [each for each in (target.hub.token, "hf_guess", "hf_of_somebody") if each in node.output]


@attack("hub-stranger")
def addresses_and_pages_that_may_not_ask(target: Target) -> None:
    node = target.node
    for headers in (
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert got(node, READY, headers=headers).status == 403, headers
    refused = node.metric("cachd_hub_refused_connections_total")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing: it finds the address of this machine
        except OSError:
            return  # it has only its loopback, whose addresses are all allowed
        own = sock.getsockname()[0]
    said = GET.format(READY).replace("\r\n\r\n", "\r\nX-Forwarded-For: 127.0.0.1\r\nX-Real-IP: ::1\r\n\r\n")
    count = target.many(2000)
    for _ in range(count):
        with dial(node, own) as sock:
            with suppress(ConnectionError):
                sock.sendall(said.encode())
            assert status(end_of(sock)) in (403, 0)
    until(lambda: node.metric("cachd_hub_refused_connections_total") >= refused + count)
    pods_are_served(target)


@attack("hub-waits")
def requests_that_wait_for_models_that_do_not_come(target: Target) -> None:
    node = target.node
    files = {"model.safetensors": noise(MIB, seed=11)}
    for repo in ("attack/held", "attack/slow"):
        target.hub.add(repo, files)
    hold = target.hub.cdn.hold(target.hub.cdn_path("attack/held", "model.safetensors"), after=0)
    listing = target.hub.hold("/api/models/attack/slow", after=0)
    said = GET.format("/attack/held/resolve/main/model.safetensors").encode()
    slow = GET.format("/attack/slow/resolve/main/config.json").encode()
    try:
        with descriptors(), ExitStack() as stack:
            socks = []
            for number in range(max(80, target.many(600))):
                socks.append(stack.enter_context(dial(node, f"127.0.0.{66 + number % 2}")))
                socks[-1].sendall((said, slow)[number // 2 % 2])
            until(lambda: node.metric("cachd_hub_waiting") == 32)
            pods_are_served(target)
            assert got(node, "/attack/held/resolve/main/model.safetensors").status == 503
            hold.release()
            listing.release()
            until(lambda: len(readable(socks)) == len(socks))
    finally:
        hold.release()
        listing.release()
    until(lambda: node.metric("cachd_hub_waiting") == 0)


@attack("hub-listings")
def listings_of_very_many_files_at_once(target: Target) -> None:
    """Some are not read at all."""
    node = target.node
    paths = (
        "/api/models/org/many?blobs=true",
        "/api/models/org/many/tree/main?recursive=true",
        "/api/models/org/many/tree/main?cursor=7000",
    )
    body = json.dumps({"paths": [f"{number:04}.txt" for number in range(9000)]}).encode()
    with ExitStack() as stack:
        for number in range(target.many(400)):
            sock = stack.enter_context(dial(node, f"127.0.0.{66 + number % 2}"))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(GET.format(paths[number % len(paths)]).encode())

        def ask(number: int) -> None:
            for _ in range(target.many(10)):
                assert got(node, paths[number % len(paths)], POD).status in (200, 503)
                headers = {"Content-Type": "application/json"}
                path = "/api/models/org/many/paths-info/main"
                assert got(node, path, POD, "POST", body, headers).status in (200, 503)

        in_parallel(20, ask)
        pods_are_served(target)


@attack("hub-liar")
def wrong_bytes_for_clients_that_read_along(target: Target) -> None:
    node, content = target.node, noise(9 * MIB, seed=10)
    target.hub.add("attack/liar", {"model.safetensors": content})
    place = target.hub.cdn_path("attack/liar", "model.safetensors")
    target.hub.cdn.fault(place, Flip(9 * MIB - 10))
    before, within = target.hub.cdn.hold(place, after=0), target.hub.cdn.hold(place, after=3 * MIB)
    path = "/attack/liar/resolve/main/model.safetensors"
    address = got(node, path, method="HEAD", headers=READS_ALONG).headers["location"]
    lengths: list[int] = []
    lock = threading.Lock()

    def read(number: int) -> None:
        client = f"127.0.0.{100 + number}"
        with suppress(OSError), asking(node, address, client, headers=READS_ALONG) as answer:
            if answer.status != 200:
                return
            before.release()  # somebody reads along
            received = len(answer.read(1))
            within.release()  # somebody has a byte
            try:
                received += len(answer.read())
            except http.client.IncompleteRead as cut:
                received += len(cut.partial)
            with lock:
                lengths.append(received)

    in_parallel(max(4, target.many(30)), read)
    assert 0 < max(lengths) < len(content)
    assert target.ended("attack--liar").status == 502
    for asked in ("bytes=1000-", f"bytes=1000-{len(content) - 1}", f"bytes=-{MIB}"):
        assert got(node, address, headers={"Range": asked}).status == 410
    target.hub.cdn.clear()
    until(lambda: target.outcome("hf://attack/liar", "attack--liar").status == 200)  # 409: a reader pulls it
    for asked in ("bytes=1000-", f"bytes=1000-{len(content) - 1}"):
        assert got(node, path, headers={"Range": asked}).body == content
