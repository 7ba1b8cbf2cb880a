"""Whom the Hub endpoint answers, and within which bounds."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cachd.errors import NotFound, Unavailable
from cachd.metrics import Metrics
from cachd.model import Ref
from cachd.serve.answer import Aborted, Answer, Sink, document, refusal
from cachd.serve.bounds import Waits
from cachd.serve.call import call_of
from cachd.serve.callers import Callers, Tokens
from cachd.serve.exchange import Request
from cachd.serve.server import HubServer, Size
from tests.ground.hub import Hub
from tests.ground.hub_client import endpoint_node, endpoint_of, get, hf
from tests.ground.models import noise
from tests.ground.node import PATIENCE_SECONDS, Node
from tests.ground.site import until

FILES = {"config.json": b"{}", "model.safetensors": noise(5000)}
FILE = "/org/model/resolve/main/config.json"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as started:
        yield started


def test_this_node_and_the_networks_of_the_option_are_answered() -> None:
    callers, own = Callers(["10.244.0.0/16", "fd00::/64"]), "192.0.2.7"
    for peer in ("127.0.0.1", "::1", "10.244.3.4", "::ffff:10.244.3.4", "fd00::7%eth0", own):
        assert callers.may_connect(peer, own), peer
    assert callers.may_connect("::ffff:192.0.2.7", "::ffff:192.0.2.7")
    assert not callers.may_connect("10.245.0.1", own)
    assert not callers.may_connect("192.0.2.8", own)


def test_another_address_is_not_own_where_any_address_can_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with net.ipv4.ip_nonlocal_bind=1."""
    monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
    assert not Callers([]).may_connect("203.0.113.9", "192.0.2.7")


# --- tokens ---


@pytest.fixture
def shared(hub: Hub, tmp_path: Path) -> Iterator[Node]:
    """A node with a private model and a gated one, of which each caller sees what its own token may read."""
    hub.add("org/model", FILES, private=True)
    hub.add("org/gated", FILES, gated=True)
    hub.add("org/open", FILES)
    (tmp_path / "token").write_text(hub.token)
    options = {"hub_share": "token", "hf_token_file": str(tmp_path / "token")}
    with endpoint_node(tmp_path / "root", hub, **options) as node:
        for repo in ("model", "gated", "open"):
            node.pull(f"hf://org/{repo}")
            assert node.ready(f"org--{repo}").status == 200
        yield node


def test_a_caller_gets_what_its_own_token_may_read(hub: Hub, shared: Node, tmp_path: Path) -> None:
    right, wrong = f"Bearer {hub.token}", "Bearer hf_of_somebody_else"
    for repo in ("model", "gated"):
        file = f"/org/{repo}/resolve/main/config.json"
        assert get(shared, file, Authorization=right).body == FILES["config.json"]
        for refused in ({}, {"Authorization": wrong}, {"Authorization": "Basic eDp5"}):
            got = get(shared, file, "GET", None, **refused)
            assert (got.status, got.headers["x-error-code"]) == (404, "RepoNotFound")
    assert get(shared, "/org/open/resolve/main/config.json").status == 200
    told = hf(shared, tmp_path / "a", "download", "org/model", "--token", hub.token)
    assert told.returncode == 0, told.stderr
    assert hf(shared, tmp_path / "b", "download", "org/model").returncode != 0


def test_the_answer_of_the_hub_is_remembered_and_without_one_nobody_is_served(hub: Hub, shared: Node) -> None:
    right = {"Authorization": f"Bearer {hub.token}"}
    assert get(shared, FILE, "GET", None, **right).status == 200
    asked = len(hub.requests)
    assert {get(shared, FILE, "GET", None, **right).status for _ in range(20)} == {200}
    assert len(hub.requests) == asked
    hub.stop()
    assert get(shared, FILE, "GET", None, **right).status == 200  # the answer that is remembered
    assert get(shared, "/org/gated/resolve/main/config.json", "GET", None, **right).status == 503
    assert get(shared, "/org/open/resolve/main/config.json").status == 503


def test_a_refused_token_is_no_failure_of_the_source(shared: Node) -> None:
    before = shared.metric("cachd_origin_failures_total")
    for number in range(3):
        assert get(shared, FILE, Authorization=f"Bearer hf_{number}").status == 404
    assert shared.metric("cachd_origin_failures_total") == before


def test_no_token_of_a_caller_is_written_anywhere(hub: Hub, shared: Node) -> None:
    for token in (hub.token, "hf_of_somebody_else"):
        get(shared, FILE, Authorization=f"Bearer {token}")
        assert token not in shared.output
        files = [path for path in shared.root.rglob("*") if path.is_file()]
        assert not [path for path in files if token.encode() in path.read_bytes()]


class Upstream:
    """A Hub that answers with `error`, or accepts each token, when `answers` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked, self.answers = error, 0, threading.Event()
        self.answers.set()

    def check_caller(self, ref: Ref, token: str | None, *, seconds: float) -> None:
        self.asked += 1
        self.answers.wait(PATIENCE_SECONDS)
        if self.error:
            raise self.error


def tokens_of(upstream: Upstream, metrics: Metrics | None = None, **options: Any) -> Tokens:
    metrics = metrics or Metrics()
    return Tokens(upstream, Waits(Size().threads, metrics.hub_waiting.set), metrics, **options)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """A sample of these metrics."""
    return metrics.registry.get_sample_value(name, labels) or 0.0


def test_made_up_tokens_cost_the_hub_a_bounded_number_of_requests() -> None:
    upstream, now = Upstream(NotFound("no")), [1000.0]
    tokens = tokens_of(upstream, clock=lambda: now[0])
    for number in range(60):
        with pytest.raises(NotFound):
            tokens.check("org/model", f"hf_{number}", "10.0.0.1")
    with pytest.raises(Unavailable) as refused:
        tokens.check("org/model", "hf_60", "10.0.0.1")
    assert (upstream.asked, refused.value.retry_after) == (60, 60.0)
    with pytest.raises(NotFound):
        tokens.check("org/model", "hf_61", "10.0.0.2")  # another client
    now[0] += 60.0
    with pytest.raises(NotFound):
        tokens.check("org/model", "hf_62", "10.0.0.1")


def test_few_tokens_are_checked_at_a_time() -> None:
    upstream = Upstream()
    upstream.answers.clear()
    tokens = tokens_of(upstream)
    with ThreadPoolExecutor(8) as pool:
        checks = [pool.submit(tokens.check, "org/model", f"hf_{n}", f"10.0.0.{n}") for n in range(8)]
        until(lambda: upstream.asked == 8)
        with pytest.raises(Unavailable):
            tokens.check("org/model", "hf_8", "10.0.0.8")
        upstream.answers.set()
        assert [check.result() for check in checks] == [None] * 8


def test_all_who_wait_for_an_answer_get_an_unexpected_error_at_once() -> None:
    upstream = Upstream(RuntimeError("a fault"))
    upstream.answers.clear()
    metrics = Metrics()
    tokens = tokens_of(upstream, metrics)
    with ThreadPoolExecutor(2) as pool:
        checks = [pool.submit(tokens.check, "org/model", "hf_x", "10.0.0.1") for _ in range(2)]
        until(lambda: value(metrics, "cachd_hub_waiting") == 2)
        upstream.answers.set()
        assert {type(check.exception(5.0)) for check in checks} == {RuntimeError}
    assert upstream.asked == 1


def test_a_hub_that_does_not_answer_about_a_token_is_unavailable() -> None:
    upstream = Upstream()
    upstream.answers.clear()
    tokens = tokens_of(upstream, check_seconds=0.1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(tokens.check, "org/model", "hf_x", "10.0.0.1")
        until(lambda: upstream.asked)
        with pytest.raises(Unavailable):
            tokens.check("org/model", "hf_x", "10.0.0.1")
        upstream.answers.set()


@pytest.mark.parametrize("repo", ["datasets%2Forg/name", "org/na%2Fme", "spaces%2Forg/name"])
def test_an_encoded_slash_names_no_repository(repo: str) -> None:
    for target in (f"/api/models/{repo}", f"/{repo}/resolve/main/x", f"/api/models/{repo}/refs"):
        assert call_of(Request("GET", target, {}, b"", "127.0.0.1")) is None


def test_a_token_of_the_hub_says_nothing_about_a_model_of_another_source(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/open", FILES)
    place = tmp_path / "share" / "m"
    place.mkdir(parents=True)
    (place / "secret.bin").write_bytes(noise(3000))
    options = {"hub_share": "token", "allow": ["127.0.0.0/8", f"file://{tmp_path}/share/"]}
    with endpoint_node(tmp_path / "root", hub, **options) as node:
        node.pull(f"file://{place}/", name="m", hub_id="org/open")
        assert node.ready("m").status == 200
        # The two models cannot both stand at org/open in the Hub view, so the one of the Hub is not pulled.
        listing = "/api/models/org/open"
        for target in ("/org/open/resolve/main/secret.bin", listing, f"{listing}/refs"):
            got = get(node, target)
            assert got.status == 503
            assert b"secret.bin" not in got.body
            assert b"file:" not in got.body


# --- bounds ---


def test_an_absent_file_is_answered_with_its_commit_and_not_its_branch(hub: Hub, node: Node) -> None:
    commit = hub.add("org/model", FILES)
    hub.tag("org/model", "v1", commit)
    node.pull("hf://org/model@v1", exclude=["model.safetensors"], name="m")
    assert node.ready("m").status == 200
    got = get(node, "/org/model/resolve/v1/absent.txt")
    assert (got.status, got.headers["x-repo-commit"]) == (404, commit)


@pytest.fixture
def node(hub: Hub, tmp_path: Path) -> Iterator[Node]:
    hub.add("org/model", FILES)
    with endpoint_node(tmp_path / "root", hub) as started:
        yield started


def said(node: Node, sent: bytes) -> bytes:
    """What the endpoint answers to these bytes before it closes the connection."""
    place = urlsplit(endpoint_of(node))
    with socket.create_connection((place.hostname or "", place.port or 0), PATIENCE_SECONDS) as sock:
        got = b""
        try:
            sock.sendall(sent)
            while piece := sock.recv(1 << 16):
                got += piece
        except ConnectionError:
            pass
        return got


def test_a_head_and_a_body_are_bounded(node: Node) -> None:
    assert said(node, b"GET / HTTP/1.1\r\nX: " + b"x" * (40 << 10)).startswith(b"HTTP/1.1 431 ")
    long = b"POST /api/models/org/model/paths-info/main HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    body = b"x" * ((1 << 20) + 1)
    assert said(node, long % len(body) + body).startswith(b"HTTP/1.1 413 ")
    assert said(node, b"no request\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert get(node, FILE).status == 200


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"[" * 100_000),
        ("application/json", b'{"paths": 7}'),
        ("application/json", b"{"),
        ("application/x-www-form-urlencoded", b"paths=x&" * 20_000),
        ("application/x-www-form-urlencoded", b"\xff\xfe"),
    ],
)
def test_an_odd_list_of_paths_is_refused(node: Node, kind: str, body: bytes) -> None:
    got = get(node, "/api/models/org/model/paths-info/main", "POST", body, Content_Type=kind)
    assert got.status in (400, 404)
    assert get(node, FILE).status == 200


def test_connections_that_say_nothing_do_not_keep_others_from_an_answer(node: Node) -> None:
    place = urlsplit(endpoint_of(node))
    at = place.hostname or "", place.port or 0
    idle = [socket.create_connection(at, PATIENCE_SECONDS) for _ in range(200)]
    try:
        assert get(node, FILE).status == 200
    finally:
        for each in idle:
            each.close()


def test_the_endpoint_is_off_unless_an_option_says_where(hub: Hub, tmp_path: Path) -> None:
    with endpoint_node(tmp_path / "root", hub, hub_listen=[]) as node:
        node.stop()
        assert "hub endpoint" not in node.output


# --- the server alone ---

PLAIN = Size()


@contextmanager
def served(
    answer: Callable[[Request], Answer],
    metrics: Metrics | None = None,
    *,
    size: Size = PLAIN,
    **options: Any,
) -> Iterator[tuple[str, int]]:
    """The address of a server with this answer."""
    metrics = metrics or Metrics()
    waits = Waits(size.threads, metrics.hub_waiting.set)
    with (
        socket.create_server(("127.0.0.1", 0)) as sock,
        closing(HubServer([sock], answer, metrics, waits=waits, size=size, **options)) as server,
    ):
        server.start()
        yield sock.getsockname()


def asked(at: tuple[str, int], *sent: bytes) -> bytes:
    """What a server answers to the last of these requests on one connection, up to its end."""
    with socket.create_connection(at, PATIENCE_SECONDS) as sock:
        got = b""
        for each in sent:
            sock.sendall(each)
            got = sock.recv(1 << 16)
        while got and (piece := sock.recv(1 << 16)):
            got += piece
        return got


OK = b"GET /ok HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
BROKEN, HEAD = OK.replace(b"/ok", b"/broken"), b"HEAD /ok HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_connection_that_fails_ends_no_thread() -> None:
    def answer(request: Request) -> Answer:
        return Answer(200, {"X-Broken": "two\nlines"} if request.target == "/broken" else {})

    with served(answer, size=Size(threads=1)) as at:
        assert asked(at, BROKEN) == b""
        assert asked(at, OK).startswith(b"HTTP/1.1 200 ")


def test_what_is_no_request_is_answered_with_a_body_after_a_head() -> None:
    with served(lambda _: document({})) as at:
        got = asked(at, HEAD, b"no request\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 400 ")
        assert b'{"error"' in got


def test_a_message_of_any_text_is_a_header() -> None:
    for message in ("ends in a space ", "ä\r\nX-Other: 1", "x" * 299 + " y"):
        with served(lambda _, message=message: refusal(404, message)) as at:
            assert asked(at, OK).startswith(b"HTTP/1.1 404 ")


def test_a_connection_closed_for_a_new_one_ends_nothing() -> None:
    """The idlest connection sends something in the moment in which a new one takes its place and leaves."""
    is_held, goes_on = threading.Event(), threading.Event()
    goes_on.set()

    def clock() -> float:  # the thread that watches asks it, and so can be held
        if not goes_on.is_set():
            is_held.set()
            goes_on.wait(PATIENCE_SECONDS)
        return time.monotonic()

    metrics = Metrics()
    with served(lambda _: document({}), metrics, size=Size(connections=1), clock=clock) as at:
        with socket.create_connection(at) as idlest:
            idlest.sendall(HEAD)
            assert idlest.recv(1 << 16)
            until(lambda: value(metrics, "cachd_hub_requests_in_progress") == 0)
            goes_on.clear()
            assert is_held.wait(PATIENCE_SECONDS)
            idlest.send(b"G")
            leaves = socket.create_connection(at)
            leaves.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaves.close()
            goes_on.set()
        assert asked(at, OK).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_may_not_ask_holds_no_thread_and_no_connection() -> None:
    with served(
        lambda _: document({}), size=Size(threads=1), may_connect=lambda client, _: client != "127.0.0.2"
    ) as at:
        with socket.create_connection(at, 5.0, source_address=("127.0.0.2", 0)) as stranger:
            assert stranger.recv(1 << 16).startswith(b"HTTP/1.1 403 ")  # it has said nothing yet
        assert asked(at, OK).startswith(b"HTTP/1.1 200 ")


class ComesLate:
    """A body of one byte that waits until the test lets it go."""

    size, waits = 1, True

    def __init__(self) -> None:
        self.comes = threading.Event()

    def send(self, sink: Sink) -> None:
        self.comes.wait(PATIENCE_SECONDS)
        raise Aborted("it never came")


def test_clients_that_wait_for_a_pull_leave_threads_for_what_is_ready() -> None:
    body = ComesLate()
    late = OK.replace(b"/ok", b"/late")
    size = Size(threads=4)
    with served(lambda r: Answer(200, {}, body) if r.target == "/late" else document({}), size=size) as at:
        waiting = [socket.create_connection(at, PATIENCE_SECONDS) for _ in range(2)]
        for each in waiting:
            each.sendall(late)
            assert each.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        got = asked(at, late)
        assert got.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 5" in got
        assert asked(at, late.replace(b"GET", b"HEAD")).startswith(b"HTTP/1.1 200 ")
        assert asked(at, OK).startswith(b"HTTP/1.1 200 ")
        body.comes.set()
        for each in waiting:
            assert each.recv(1) == b""
            each.close()
        with socket.create_connection(at, PATIENCE_SECONDS) as again:
            again.sendall(late)
            assert again.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
