"""What a client of the API without a token tries."""

from __future__ import annotations

import http.client
import json
import resource
import select
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.attacks.target import MIB, TOKEN, Target, attack
from tests.attacks.test_connections import dialled, end_of, status
from tests.attacks.test_listeners import ROUTES, asked, certified, listening, trusting
from tests.attacks.test_probes import LAST, ODD, answer_of, not_at_once
from tests.attacks.test_roles import sent, told_of
from tests.ground.models import noise
from tests.ground.site import said as header
from tests.ground.site import until

GOOD = f"Authorization: Bearer {TOKEN}".encode()
BEGUN = (b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf")

HEADS = {
    "lines": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"x: y\r\n" * 4096),
    "one line": (b"GET / HTTP/1.1\r\nHost: x\r\nx: ", b"y" * 16384),
    "a path": (b"GET /", b"y" * 16384),
    "empty lines": (b"", b"\r\n" * 8192),
    "a chunked body": (
        b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\nx\r\n" * 4096,
    ),
}


def _sent(target: Target, begin: bytes, more: bytes, most: int) -> int:
    """Bytes that the daemon's end took before it closed."""
    sent = 0
    with target.dial() as sock, suppress(ConnectionError):
        sock.sendall(begin)
        while sent < most:
            sock.sendall(more)
            sent += len(more)
    return sent


@attack("endless-head")
def heads_and_bodies_without_end(target: Target) -> None:
    for begin, more in HEADS.values():
        most = target.many(640 * MIB)
        assert _sent(target, begin, more, most) < 32 * MIB, begin


@attack("framed-page")
def a_page_in_a_frame(target: Target) -> None:
    for path in ("/", "/docs", "/assets/status.js"):
        answer = target.ask("GET", path)
        assert "frame-ancestors 'none'" in header(answer, "Content-Security-Policy").split("; ")
        assert header(answer, "X-Frame-Options") == "DENY"


@attack("slow-client")
def clients_that_stop_or_do_not_read(target: Target) -> None:
    said = [
        b"",
        b"GET /v1/models HT",
        b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    ]
    with ExitStack() as stack:
        for number in range(target.many(400)):
            sock = stack.enter_context(target.dial())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with suppress(ConnectionError):
                sock.sendall(said[number % len(said)])
        for _ in range(20):
            assert target.ask("GET", "/v1/models/served/ready").status == 200


@attack("many-connections")
def more_connections_than_there_are_descriptors(target: Target) -> None:
    with descriptors(), ExitStack() as stack:
        for _ in range(target.many(1500)):
            stack.enter_context(target.dial())
        assert target.ask("GET", "/v1/models/served/ready").status == 200
        left = resource.prlimit(target.node.pid, resource.RLIMIT_NOFILE)[0]
        assert len(list(Path(f"/proc/{target.node.pid}/fd").iterdir())) < left / 2


@contextmanager
def descriptors() -> Iterator[None]:
    """As many for this process as the attacks need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@attack("body-before-token")
def a_write_without_a_token_that_never_ends(target: Target) -> None:
    with target.dial() as sock:
        sock.sendall(b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n{")
        assert sock.recv(65536).startswith(b"HTTP/1.1 401")


@attack("another-port")
def a_page_of_another_port(target: Target) -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1:1", "https://evil.example", "null"):
        answer = target.ask("DELETE", "/v1/models/kept-1", Origin=origin)
        assert answer.status == 403, (origin, answer)


def at_once(count: int, target: Target, method: str, path: str, **asked: str) -> list[int]:
    """The statuses of so many equal requests at the same time."""
    statuses: list[int] = []

    def ask() -> None:
        with suppress(OSError):
            statuses.append(target.ask(method, path, **asked).status)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


@attack("starved-probes")
def dry_runs_and_listings_without_number(target: Target) -> None:
    statuses = at_once(target.many(400), target, "GET", "/v1/models/many")
    statuses += at_once(target.many(330), target, "POST", "/v1/evictions?dry_run=true&bytes=1000000")
    statuses += at_once(target.many(400), target, "GET", "/metrics")
    assert {*statuses} <= {200, 401, 429, 503}, statuses


@attack("smuggled-token")
def a_token_where_none_belongs(target: Target) -> None:
    path = "/v1/models/served/pin"
    for key in ("token", "access_token", "Authorization", "api_key"):
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        for said in (TOKEN, f"Bearer {TOKEN}"):
            assert target.ask("PUT", f"{path}?{key}={quote(said)}").status == 401
            assert target.ask("POST", "/v1/sweeps", {key: said}).status == 401
            assert target.ask("POST", "/v1/sweeps", f"{key}={said}".encode(), **form).status == 401
            for name in ("Cookie", "X-Auth-Token", "Proxy-Authorization", "X-Forwarded-Authorization"):
                assert target.ask("PUT", path, **{name: f"{key}={said}"}).status == 401
                assert target.ask("PUT", path, **{name: said}).status == 401
    bad = b"Authorization: Bearer x"
    joined = f"Authorization: Bearer x, Bearer {TOKEN}".encode()
    for lines in ([GOOD, bad], [bad, GOOD], [GOOD, GOOD], [GOOD, b"authorization: Basic eA=="], [joined]):
        assert sent(target.node, b"Host: localhost", *lines) == b"unauthorized", lines
    assert sent(target.node, b"Host: localhost", GOOD) == b"no_such_model", "and where it belongs, it counts"
    assert not target.ask("GET", "/v1/models/served").document["pinned"]
    assert TOKEN not in target.node.output


@attack("rebound-name")
def a_second_host_and_a_foreign_one(target: Target) -> None:
    ours, evil = b"Host: localhost", b"Host: evil.example"
    for hosts in (
        [evil],
        [ours, evil],
        [evil, ours],
        [b"Host: localhost.evil.example"],
        [b"Host: localhost@evil"],
    ):
        assert sent(target.node, *hosts, GOOD) in (b"foreign_host", b"invalid_request"), hosts
    for method, path in (("GET", "/v1/models"), ("DELETE", "/v1/models/kept-1"), ("GET", "/v1/options")):
        assert target.ask(method, path, token=TOKEN, Host="evil.example").status == 403


@attack("told-address")
def refusals_that_could_tell_of_the_nodes_network(target: Target) -> None:
    secret = str(target.node.root.parent / "absent-hub-token")
    private: dict[str, Sequence[str]] = {"address": ("127.0.0.1", "::1")}
    cases: list[tuple[dict[str, Any], dict[str, tuple[str, str, dict[str, Sequence[str]]]]]] = [
        (
            {"hf_token_file": secret},
            {
                "it": ("https://localhost:1/it", "private_address", private),
                "hub": ("hf://org/model", "bad_secret", {"secret": (secret,)}),
            },
        ),
        (
            {"proxy": "http://127.0.0.1:1", "retries": 0},
            {"by-proxy": ("https://x.invalid/it", "proxy_unreachable", {"proxy": ("http://127.0.0.1:1",)})},
        ),
    ]
    for options, pulls in cases:
        plain: dict[str, Any] = {"allow": [], "token_file": target.node.options["token_file"]}
        with target.another("telling", **plain, **options) as node:
            for name, (ref, code, withheld) in pulls.items():
                token = {"Authorization": f"Bearer {TOKEN}"}
                assert node.ask("POST", "/v1/models", {"ref": ref, "name": name}, headers=token).status == 202
                told = told_of(node, name).replace(node.url, "")
                assert code in told
                ((key, values),) = withheld.items()
                assert not [value for value in values if value in told], told
                assert node.wait_for("pull ended", name=name)["withheld"][key] in values
            assert node.ask("GET", "/v1/options").status == 401


@attack("flooded-record")
def refused_attempts_and_foreign_text_without_number(target: Target) -> None:
    node, count, before = target.node, target.many(1000), len(target.node.log)
    counted = node.metric("cachd_writes_total", role="anonymous")
    names = ["\x1b[2Jx", "\u202ex", "x" * 20_000, "a\nlevel=fake", "\ud800"]
    paths = [f"/v1/models/{quote(name.encode('utf-8', 'surrogatepass'))}" for name in names]
    began = time.monotonic()
    for number in range(count):
        target.ask("DELETE", paths[number % len(paths)], token=f"guess-{number}")
    for path in paths:
        assert target.ask("DELETE", path, token=TOKEN).status == 400
    target.ask("DELETE", "/v1/models/attack-last", token=TOKEN, **{"X-Request-Id": "last"})
    node.wait_for("audit", request_id="last")
    lines = [entry for entry in node.log[before:] if entry.get("event") == "audit"]
    strangers = [line for line in lines if line["who"] == "anonymous" and "more" not in line]
    assert len(strangers) <= 30 * (2 + (time.monotonic() - began) // 60)
    assert len([line for line in lines if line["who"] != "anonymous"]) == len(paths) + 1
    assert all(
        line["model"].isprintable() and len(line["model"]) <= 1200 for line in lines if "model" in line
    )
    assert node.metric("cachd_writes_total", role="anonymous") == counted + count


@attack("endless-waits")
def waits_for_ever_and_waits_of_clients_that_hang_up(target: Target) -> None:
    for wait in ("1000000000", "3601", "-1", "nan", "inf", "x"):
        assert target.ask("GET", f"/v1/models/attack-held/ready?wait={wait}").status == 422
    hold = target.origin.hold("/held", after=1000)
    try:
        target.pull(target.origin.add("/held", noise(MIB)), "attack-held")
        assert hold.reached.wait(60)
        said = b"GET /v1/models/attack-held/ready?wait=3600 HTTP/1.1\r\n" + LAST
        for _ in range(target.many(4000)):
            with target.dial() as sock:
                sock.sendall(said)
        with descriptors(), ThreadPoolExecutor(1) as pod, ExitStack() as stack:
            until(lambda: not_at_once(target.node, pod, "attack-held"))
            most = most_connections(target)
            pods = [stack.enter_context(target.dial()) for _ in range(most * 5 // 8)]
            for sock in pods:
                sock.sendall(said)
            until(lambda: len(readable(pods)) >= len(pods) - most // 2)
            refused = readable(pods)
            assert target.ask("GET", "/v1/models/served/ready").status == 200
            hold.release()
            answers = {sock: status(end_of(sock)) for sock in pods}
        assert {answers[sock] for sock in refused} == {503}
        assert [answers[sock] for sock in pods if sock not in refused] == [200] * (most // 2)
    finally:
        hold.release()


def most_connections(target: Target) -> int:
    """How many the daemon has, by its descriptors."""
    return max(16, min(2048, resource.prlimit(target.node.pid, resource.RLIMIT_NOFILE)[0] // 4))


def readable(socks: Sequence[socket.socket]) -> set[socket.socket]:
    """Those that an answer came to."""
    polled, by_number = select.poll(), {sock.fileno(): sock for sock in socks}
    for number in by_number:
        polled.register(number, select.POLLIN)
    return {by_number[number] for number, _ in polled.poll(0)}


@attack("endless-streams")
def streams_of_events_that_nobody_reads(target: Target) -> None:
    """They take their part of the connections, however much happens, and leave the rest to others."""
    said = b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    most = max(4, most_connections(target) // 32)

    def begun(sock: socket.socket) -> int:
        sock.sendall(said)
        return status(sock.recv(4096))

    with descriptors(), ExitStack() as stack:
        streams = [stack.enter_context(target.dial()) for _ in range(most)]
        assert {begun(sock) for sock in streams} == {200}
        for number in range(target.many(400)):
            with target.dial() as sock:
                assert begun(sock) == 503
            target.pull(target.origin.url + "/absent", f"attack-told-{number}")
        for _ in range(20):
            for path in ("/v1/models/served/ready", "/v1/models/served", "/v1/events?follow=false"):
                assert target.ask("GET", path).status == 200
            assert target.ask("GET", "/v1/events", Accept="application/json").status == 200

    def is_one_again() -> bool:
        with target.dial() as sock:
            return begun(sock) == 200

    until(is_one_again)


@attack("one-address")
def requests_held_back_at_an_address_of_honest_pods(target: Target) -> None:
    """Pods keep connections open, and ask again: they are answered, and so is whoever comes new.

    During the first second of a request, idle connections are closed before its own. So a pod may find its
    connection closed. As clients do (RFC 9110, section 9.2.2), it then connects again and asks once more.
    """
    said = b"GET /v1/models/served/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"

    def answered(number: int) -> int:
        with suppress(http.client.RemoteDisconnected, ConnectionResetError):
            return answer_of(pods[number]).status
        pods[number] = stack.enter_context(target.dial())
        pods[number].sendall(said)
        return answer_of(pods[number]).status

    with descriptors(), ExitStack() as stack:
        for number in range(most_connections(target) + 100):
            sock = stack.enter_context(target.dial())
            with suppress(ConnectionError):
                sock.sendall(BEGUN[number % len(BEGUN)])
        pods = [stack.enter_context(target.dial()) for _ in range(target.many(1000))]
        for _ in range(2):
            for some in (range(at, at + 100) for at in range(0, len(pods), 100)):
                for number in some:
                    with suppress(ConnectionError):
                        pods[number].sendall(said)
                assert {answered(number) for number in some} == {200}
        for _ in range(20):
            assert target.ask("GET", "/v1/models/served/ready").status == 200


@attack("odd-requests")
def requests_of_shapes_that_few_servers_expect(target: Target) -> None:
    before = len(target.node.log)
    for _ in range(target.many(200)):
        for shape, (said, expected) in ODD.items():
            with target.dial() as sock:
                sock.sendall(said + b"\r\n")
                with http.client.HTTPResponse(sock, method=said.partition(b" ")[0].decode()) as response:
                    response.begin()
                    refused = (expected, 401) if expected == 405 else (expected,)  # before the method counts
                    assert response.status in refused, (shape, response.status)
                    content = response.read()
                    assert expected != 400 or json.loads(content)["code"] == "invalid_request"
        with target.dial() as sock:
            sock.sendall(b"nonsense\r\n\r\n")
            assert status(sock.recv(65536)) == 400
    logged = target.node.log[before:]
    assert all(entry["event"] == "audit" for entry in logged), logged  # bounded: see flooded-record
    assert len(logged) <= 64


@attack("handshakes")
def handshakes_that_do_not_end(target: Target) -> None:
    """The daemon has 256 descriptors, so 64 connections."""
    pem = certified(target.node.root.parent / "handshakes.pem")
    node = target.another(
        "handshakes", listen=["127.0.0.1:0 probes plain", "127.0.0.1:0"], tls_cert_file=str(pem)
    )
    node.program = ["prlimit", "--nofile=256", *node.program]
    hello = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        trusting(pem).wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
    begun = [b"", hello.read(20), hello.read()]
    with node, ExitStack() as stack:
        address = listening(node, 1)
        idle = [stack.enter_context(dialled(address)) for _ in range(target.many(2000))]
        for number, sock in enumerate(idle):
            with suppress(ConnectionError):
                sock.sendall(begun[number % len(begun)])
        for _ in range(20):
            assert asked(address, "/v1/models", trusting(pem)) == 200
            assert node.ask("GET", "/livez").status == 200
        gone = idle[: len(idle) // 2] if target.short else idle  # the last ones after 10 s
        for sock in gone:
            with suppress(ConnectionError):
                end_of(sock)


@attack("no-certificate")
def clients_without_a_certificate_of_the_right_authority(target: Target) -> None:
    place = target.node.root.parent
    pem, clients, others = (certified(place / f"{name}.pem") for name in ("tls", "clients", "others"))
    told: dict[str, Any] = {"tls_cert_file": str(pem), "tls_client_ca_file": str(clients)}
    old = trusting(pem, clients)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with target.another("mutual", listen=["127.0.0.1:0 probes plain", "127.0.0.1:0"], **told) as node:
        address = listening(node, 1)
        for _ in range(target.many(100)):
            for context in (trusting(pem), trusting(pem, others), old):
                try:
                    raise AssertionError(asked(address, "/v1/models", context))
                except (ssl.SSLError, ConnectionError):
                    pass
        with dialled(address) as plain:
            plain.sendall(b"GET /v1/models HTTP/1.1\r\n" + LAST)
            assert b"models" not in end_of(plain)
        assert asked(address, "/v1/models", trusting(pem, clients)) == 200
        assert node.ask("GET", "/livez").status == 200
        assert "Traceback" not in node.output


@attack("narrow-listener")
def more_than_a_listener_serves(target: Target) -> None:
    told = {"token_file": target.node.options["token_file"]}
    listen = ["127.0.0.1:0", "127.0.0.1:0 probes", "127.0.0.1:0 read-only"]
    with target.another("narrow", listen=listen, **told) as node:
        for path, served in ROUTES.items():
            is_refused = said_with_token(listening(node, 1), "GET", path) == 403
            assert is_refused == ("probes" not in served), path
            assert said_with_token(listening(node, 2), "GET", path) != 403, path
        for path, methods in node.ask("GET", "/openapi.json").document["paths"].items():
            for method in {*methods, "put", "patch", "delete", "post", "trace"} - {"get"}:
                for number in (1, 2):
                    status = said_with_token(listening(node, number), method, path.replace("{name}", "any"))
                    assert status == 403, (method, path)


def said_with_token(address: tuple[str, int], method: str, path: str) -> int:
    """The status of an answer to whoever may do everything."""
    with closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        connection.request(method.upper(), path, headers={"Authorization": f"Bearer {TOKEN}"})
        return connection.getresponse().status
