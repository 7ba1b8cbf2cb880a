"""The places where the API listens: several at once, unix sockets, TLS, and what each of them refuses."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import ssl
import stat
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cachd.api.admission import Bounds, Connections, Counted
from cachd.api.connection import Connection
from cachd.api.handshake import accept
from cachd.api.listeners import Opened, Sockets
from cachd.api.tls import Certificate, TlsFiles
from cachd.client import Client
from cachd.config import load
from cachd.daemon.listen import check_listen
from cachd.errors import Forbidden, InUse, Invalid, Unreachable
from cachd.model.listener import Listener
from tests.attacks.test_connections import App, dialled, end_of, running, status
from tests.ground.node import Node
from tests.ground.origin.certificates import Tls, certify
from tests.ground.site import until

PATIENCE_SECONDS = 60.0
Nodes = Callable[..., Node]


def certified(path: Path, **told: Any) -> Path:
    """A PEM file with a new key and its certificate, which is its own authority."""
    certify(path, Tls(**told))
    return path


def trusting(authority: Path, shown: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority)
    if shown:
        context.load_cert_chain(shown)
    return context


@contextmanager
def opened(told: Iterable[Listener]) -> Iterator[list[Opened]]:
    with Sockets(told) as sockets:
        yield sockets.open_all()


def listening(node: Node, number: int) -> tuple[str, int]:
    """The address of the listener of this number."""
    found = until(lambda: [entry for entry in node.log if entry["event"] == "listening"][number:])[0]
    return found["host"], found["port"]


def asked(
    address: tuple[str, int], path: str, context: ssl.SSLContext | None = None, method: str = "GET"
) -> int:
    """The status of an answer."""
    if context:
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            *address, timeout=PATIENCE_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(*address, timeout=PATIENCE_SECONDS)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    finally:
        connection.close()


# --- several ---


def test_one_daemon_answers_at_several_places(node: Nodes, tmp_path: Path) -> None:
    path = tmp_path / "cachd.sock"
    running = node(listen=["127.0.0.1:0", "[::1]:0", f"unix:{path}"])
    assert asked(listening(running, 0), "/livez") == 200
    assert asked(listening(running, 1), "/livez") == 200
    assert json.loads(running.cli("ls", "-o", "json", "--url", f"unix:{path}").stdout) == {"models": []}
    assert running.cli("ls", CACHD_URL=f"unix://{path}").returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert running.stop() == 0
    assert not path.exists(), "a stop takes its file along"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("127.0.0.1:8470", ["127.0.0.1:8470"]),
        ("[::]:8470, unix:/run/c.sock mode=600", ["[::]:8470", "unix:/run/c.sock"]),
        ("['0.0.0.0:1 probes plain', '[::1]:2']", ["0.0.0.0:1", "[::1]:2"]),
    ],
)
def test_listeners_are_written_as_one_text_or_as_a_list(text: str, shown: list[str]) -> None:
    assert [str(each) for each in load(listen=text).listeners] == shown


@pytest.mark.parametrize(
    "text",
    [
        "unix:run/c.sock",
        "unix:",
        "unix:/run/",
        f"unix:/{'x' * 107}",
        "unix:/run/c.sock mode=0999",
        "unix:/run/c.sock group=",
        "unix:/run/c.sock owner=0",
        "127.0.0.1:1 mode=0660",
        "127.0.0.1:1 read-only probes",
        "127.0.0.1:1 tls",
        "",
        "[]",
    ],
)
def test_a_listener_that_is_not_understood_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(Invalid) as refusal:
        load(listen=text or [])
    assert "listen" in refusal.value.detail


# --- what a listener serves ---

ROUTES = {
    "/livez": ("probes", "read-only"),
    "/readyz?set=required": ("probes", "read-only"),
    "/v1/models": ("read-only",),
    "/v1/models/any/ready": ("probes", "read-only"),
    "/metrics": ("read-only",),
    "/openapi.json": ("read-only",),
    "/v1/models/any/ready/../../any": (),
    "/livez/": (),
    "//livez": (),
}


def test_a_listener_of_probes_or_reads_answers_nothing_else(node: Nodes) -> None:
    running = node(listen=["127.0.0.1:0", "127.0.0.1:0 probes", "127.0.0.1:0 read-only"])
    for path, served in ROUTES.items():
        assert (asked(listening(running, 1), path) != 403) == ("probes" in served), path
    for path in ROUTES:
        assert asked(listening(running, 2), path) != 403, path
    calls = running.ask("GET", "/openapi.json").document["paths"]
    for path, methods in calls.items():
        for method in {*methods, "put", "patch", "delete", "post", "trace"} - {"get"}:
            for number in (1, 2):
                told = asked(listening(running, number), path.replace("{name}", "any"), method=method.upper())
                assert told == 403, f"{method} {path} at {number}"
    host, port = listening(running, 1)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=PATIENCE_SECONDS)
    assert json.load(refused.value)["code"] == "not_on_this_listener"


def test_only_a_listener_that_serves_writes_needs_a_token_beyond_loopback(tmp_path: Path) -> None:
    for narrow in ("0.0.0.0:1 probes", "0.0.0.0:1 read-only plain", f"unix:{tmp_path}/s"):
        check_listen(load(listen=[narrow, "127.0.0.1:2"]))
    with pytest.raises(Forbidden):
        check_listen(load(listen=["127.0.0.1:2", "0.0.0.0:1 plain"]))


# --- files of unix sockets ---


def test_the_socket_file_of_a_dead_daemon_is_replaced_and_a_living_ones_is_not(
    node: Nodes, tmp_path: Path
) -> None:
    path = tmp_path / "cachd.sock"
    first = node(listen=["127.0.0.1:0", f"unix:{path} mode=0600"])
    (tmp_path / "other").mkdir(mode=0o755)
    second = first.cli("serve", "--root", str(tmp_path / "other"), "--listen", f"unix:{path}")
    assert (second.returncode, "code: cannot_listen" in second.stderr) == (9, True), second.stderr
    assert first.cli("ls", "--url", f"unix:{path}").returncode == 0, "it still listens"
    first.kill()
    assert path.exists()
    first.start()
    assert first.cli("ls", "--url", f"unix:{path}").returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_file_in_the_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    file, link, directory = tmp_path / "file", tmp_path / "link", tmp_path / "directory"
    file.write_text("precious")
    link.symlink_to(file)
    directory.mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (file, link, directory, tmp_path / "pipe", tmp_path / "absent" / "s"):
        with pytest.raises(Invalid) as refusal, opened([Listener.parse(f"unix:{path}")]):
            pass
        assert refusal.value.code == "cannot_listen"
    assert file.read_text() == "precious"
    assert link.is_symlink()


def test_when_one_place_cannot_be_had_none_stays(tmp_path: Path) -> None:
    path = tmp_path / "first.sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = [f"unix:{path}", f"127.0.0.1:{taken.getsockname()[1]}"]
        with pytest.raises(InUse), opened(map(Listener.parse, told)):
            pass
    assert not path.exists()


def test_a_socket_file_that_another_daemon_put_there_is_not_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened([Listener.parse(f"unix:{path}")]):
        path.unlink()
        successor = socket.socket(socket.AF_UNIX)
        successor.bind(str(path))
    assert path.exists()
    successor.close()


def test_a_socket_of_a_group_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as refusal, opened([Listener.parse(f"unix:{tmp_path}/s group=no-such")]):
        pass
    assert "no-such" in refusal.value.detail


# --- TLS ---


def test_the_api_speaks_tls_where_probes_stay_plain(node: Nodes, tmp_path: Path) -> None:
    pem = certified(tmp_path / "tls.pem")
    running = node(listen=["127.0.0.1:0 probes plain", "127.0.0.1:0"], tls_cert_file=str(pem))
    assert asked(listening(running, 0), "/livez") == 200
    secured = listening(running, 1)
    assert asked(secured, "/v1/models", trusting(pem)) == 200
    url = f"https://127.0.0.1:{secured[1]}"
    assert running.cli("--ca-file", str(pem), "ls", "--url", url).returncode == 0
    assert running.cli("ls", "--url", url).returncode == 6, "an unknown authority"
    assert running.cli("ls", CACHD_URL=url, CACHD_API_CA_FILE=str(pem)).returncode == 0
    with dialled(secured) as plain:
        plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"models" not in end_of(plain)
    old = trusting(pem)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        asked(secured, "/livez", old)


def test_a_client_without_a_certificate_of_the_right_authority_is_refused_at_the_handshake(
    node: Nodes, tmp_path: Path
) -> None:
    pem, clients, others = (certified(tmp_path / name) for name in ("tls.pem", "clients.pem", "others.pem"))
    options = {"tls_cert_file": str(pem), "tls_client_ca_file": str(clients)}
    running = node(listen=["127.0.0.1:0 probes plain", "127.0.0.1:0"], **options)
    secured = listening(running, 1)
    assert asked(secured, "/v1/models", trusting(pem, clients)) == 200
    for context in (trusting(pem), trusting(pem, others)):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            asked(secured, "/v1/models", context)
    url = f"https://127.0.0.1:{secured[1]}"
    shown = ("--ca-file", str(pem), "--cert-file", str(clients))
    assert running.cli(*shown, "ls", "--url", url).returncode == 0
    assert running.cli("--ca-file", str(pem), "ls", "--url", url).returncode == 6
    assert asked(listening(running, 0), "/livez") == 200
    assert "Traceback" not in running.output
    assert running.stop() == 0


def test_a_rotated_certificate_is_shown_and_a_broken_one_leaves_the_last_in_force(
    node: Nodes, tmp_path: Path
) -> None:
    """As the kubelet swaps a Secret: `..data` leads to another directory in one rename."""
    volume = tmp_path / "volume"
    volume.mkdir()

    def swapped(name: str, **told: Any) -> Path:
        made = volume / name
        made.mkdir()
        pem = certified(made / "tls.pem", **told)
        (volume / "..new").symlink_to(name)
        (volume / "..new").rename(volume / "..data")
        return pem

    first = swapped("1", to_days=1)
    (volume / "tls.pem").symlink_to("..data/tls.pem")
    running = node(
        listen=["127.0.0.1:0 read-only plain", "127.0.0.1:0"], tls_cert_file=str(volume / "tls.pem")
    )
    secured = listening(running, 1)
    assert asked(secured, "/livez", trusting(first)) == 200
    expiry = "cachd_tls_certificate_expiry_timestamp_seconds"
    before = running.metric(expiry)
    assert running.metric("cachd_tls_in_force") == 1

    second = swapped("2", to_days=30)
    until(lambda: running.metric(expiry) > before + 20 * 86400)
    assert asked(secured, "/livez", trusting(second)) == 200
    with pytest.raises(ssl.SSLError):
        asked(secured, "/livez", trusting(first))

    swapped("3").write_text("no certificate")
    assert "..data" not in running.wait_for("certificate not taken over")["reason"]
    assert running.metric("cachd_tls_in_force") == 0
    assert asked(secured, "/livez", trusting(second)) == 200

    swapped("4", to_days=60)
    until(lambda: running.metric("cachd_tls_in_force") == 1)
    assert running.metric(expiry) > before + 50 * 86400


def test_a_pair_that_does_not_work_ends_the_start(tmp_path: Path) -> None:
    pem, other = certified(tmp_path / "a.pem"), certified(tmp_path / "b.pem")
    locked, pipe = tmp_path / "locked.pem", tmp_path / "pipe"
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(pem.read_bytes(), None)
    kind, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(key.private_bytes(kind, form, serialization.BestAvailableEncryption(b"secret")))
    os.mkfifo(pipe)
    for certificate, private in (
        (pem, other),
        (pem, locked),
        (pem, pipe),
        (pem, tmp_path / "absent"),
        (locked, pem),
    ):
        with pytest.raises(Invalid) as refusal:
            Certificate(TlsFiles(certificate, private))
        assert refusal.value.code == "bad_certificate"
    with pytest.raises(Invalid):
        Certificate(TlsFiles(pem, pem, client_ca=locked))


def test_a_key_without_a_certificate_is_no_option(tmp_path: Path) -> None:
    for key in ("tls_key_file", "tls_client_ca_file"):
        with pytest.raises(Invalid) as refusal:
            load(**{key: str(tmp_path / "file")})
        assert "tls_cert_file" in refusal.value.detail


# --- handshakes as attacks ---


@contextmanager
def secured(connections: Connections, pem: Path) -> Iterator[tuple[App, tuple[str, int]]]:
    """A TLS server with these bounds over `App`; its address."""
    app = App()
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
    certificate = Certificate(TlsFiles(pem, pem))

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=[])
            self.accepting = asyncio.create_task(accept(sock, certificate, self.made, connections))

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            self.accepting.cancel()
            connections.end_handshakes()
            await super().shutdown(sockets)

        def made(self, handshake: Counted) -> Connection:
            state = self.server_state
            return Connection(config, state, {}, connections=connections, app=app, handshake=handshake)

    with socket.create_server(("127.0.0.1", 0)) as sock, running(Server(config), app):
        yield app, sock.getsockname()[:2]


def test_a_handshake_that_does_not_end_is_disconnected(tmp_path: Path) -> None:
    pem = certified(tmp_path / "tls.pem")
    bounds = Bounds(handshake_seconds=0.5)
    hello = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        trusting(pem).wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
    said = hello.read()
    with secured(Connections(bounds=bounds), pem) as (_, address):
        for begun in (b"", said[:20], said, b"GET / HTTP/1.1\r\n\r\n", bytes(70000)):
            with dialled(address) as sock, suppress(ConnectionError):
                sock.sendall(begun)
                end_of(sock)  # it ends, whatever was sent


def test_handshakes_count_as_connections_and_give_way(tmp_path: Path) -> None:
    pem = certified(tmp_path / "tls.pem")
    with secured(Connections(most=8), pem) as (_, address), ExitStack() as stack:
        idle = [stack.enter_context(dialled(address)) for _ in range(20)]
        with dialled(address) as sock, trusting(pem).wrap_socket(sock, server_hostname="localhost") as told:
            told.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert status(end_of(told)) == 200
        assert end_of(idle[0]) == b"", "the first of the idle ones was closed"


def test_over_tls_a_request_past_its_bounds_is_told_so(tmp_path: Path) -> None:
    pem = certified(tmp_path / "tls.pem")
    with secured(Connections(bounds=Bounds(refused_seconds=0.2)), pem) as (_, address):
        with dialled(address) as sock, trusting(pem).wrap_socket(sock, server_hostname="localhost") as told:
            with suppress(ConnectionError):
                told.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 101 + b"\r\n")
            assert status(told.recv(65536)) == 431
        with dialled(address) as sock, trusting(pem).wrap_socket(sock, server_hostname="localhost") as told:
            told.sendall(b"GET /5000000 HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert len(end_of(told)) > 5_000_000


async def test_an_address_that_is_none_is_told_so() -> None:
    with pytest.raises(Invalid):
        Client("ftp://host")
    async with Client("unix:/nowhere/s") as client:
        with pytest.raises(Unreachable):
            await client.models()
