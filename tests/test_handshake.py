"""TLS handshakes on a real event loop: which become connections, and that the others leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from uvicorn.server import ServerState

from cachd.api.admission import Bounds, Connections, Counted, Stage
from cachd.api.connection import Connection
from cachd.api.handshake import Handshake, accept
from cachd.api.tls import Certificate, TlsFiles
from tests.ground.origin.certificates import Tls, certify
from tests.test_admission_of_connections import Client
from tests.test_connection import USUAL, App, until

PATIENT = Bounds(handshake_seconds=3600.0)
GET = b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n"


@dataclass
class Accepting:
    """A socket on which connections are accepted. `handshakes`: those that led to a connection."""

    sock: socket.socket
    certificate: Certificate
    pem: Path
    connections: Connections
    app: App = field(default_factory=App)
    state: ServerState = field(default_factory=ServerState)
    handshakes: list[Counted] = field(default_factory=list)

    def made(self, handshake: Counted) -> Connection:
        self.handshakes.append(handshake)
        config = uvicorn.Config(self.app, ws="none", lifespan="off", log_config=None)
        return Connection(config, self.state, {}, connections=self.connections, handshake=handshake)

    async def dial(self, *, trusts: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, with TLS if the client trusts the certificate."""
        context = ssl.create_default_context(cafile=self.pem) if trusts else None
        host, port = self.sock.getsockname()
        name = "localhost" if trusts else None
        return await asyncio.open_connection(host, port, ssl=context, server_hostname=name)

    async def answer(self) -> bytes:
        """All that a client hears for a request."""
        reader, writer = await self.dial(trusts=True)
        writer.write(GET)
        said = await reader.read()
        writer.close()
        return said

    async def until_counted(self, *kinds: type[object]) -> list[Counted]:
        """Those that are counted, as soon as they are of these classes."""
        await until(lambda: [type(each) for each in self.connections._all] == list(kinds))
        return list(self.connections._all)


@asynccontextmanager
async def accepting(
    tmp_path: Path, *, most: int = 8, bounds: Bounds = USUAL, before: tuple[Client, ...] = ()
) -> AsyncIterator[Accepting]:
    pem, connections = tmp_path / "tls.pem", Connections(most=most, bounds=bounds)
    certify(pem, Tls())
    for each in before:
        assert connections.admit(each)
    with (
        closing(Certificate(TlsFiles(pem, pem))) as certificate,
        socket.create_server(("127.0.0.1", 0)) as sock,
    ):
        one = Accepting(sock, certificate, pem, connections)
        running = asyncio.ensure_future(accept(sock, certificate, one.made, connections))
        yield one
        assert not running.done()
        running.cancel()
        await asyncio.wait([running])


async def until_closed(reader: asyncio.StreamReader) -> None:
    """Wait for the end of what comes, or for a reset."""
    try:
        while await reader.read(1024):
            pass
    except ConnectionResetError:
        pass


async def test_a_handshake_is_counted_until_the_connection_takes_its_place(tmp_path: Path) -> None:
    async with accepting(tmp_path) as one:
        reader, writer = await one.dial(trusts=True)
        (counted,) = await one.until_counted(Connection)
        assert (counted.peer, one.handshakes[0].stage) == ("127.0.0.1", Stage.HANDSHAKE)
        writer.write(GET)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await one.until_counted()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", bytes(70_000)])
async def test_what_is_no_handshake_is_disconnected_and_no_longer_counted(
    tmp_path: Path, said: bytes
) -> None:
    async with accepting(tmp_path) as one:
        reader, writer = await one.dial(trusts=False)
        (handshake,) = await one.until_counted(Handshake)
        assert (handshake.peer, handshake.stage) == ("127.0.0.1", Stage.HANDSHAKE)
        handshake.check_deadlines(1e12)
        writer.write(said)
        await until_closed(reader)
        await one.until_counted()
        writer.close()
        assert (await one.answer()).startswith(b"HTTP/1.1 200 ")


async def test_a_handshake_that_takes_too_long_is_disconnected(tmp_path: Path) -> None:
    async with accepting(tmp_path, bounds=Bounds(handshake_seconds=0.05)) as one:
        reader, writer = await one.dial(trusts=False)
        await until_closed(reader)
        await one.until_counted()
        writer.close()


async def test_a_handshake_that_is_ended_is_disconnected(tmp_path: Path) -> None:
    async with accepting(tmp_path, bounds=PATIENT) as one:
        reader, writer = await one.dial(trusts=False)
        await one.until_counted(Handshake)
        one.connections.end_handshakes()
        await until_closed(reader)
        await one.until_counted()
        writer.close()


async def test_a_client_for_whom_there_is_no_place_is_disconnected_at_once(tmp_path: Path) -> None:
    busy = Client("other", stage=Stage.ANSWER)
    async with accepting(tmp_path, most=1, before=(busy,)) as one:
        reader, writer = await one.dial(trusts=False)
        await until_closed(reader)
        writer.close()
        assert await one.until_counted(Client) == [busy]
        one.connections.leave(busy)
        assert (await one.answer()).startswith(b"HTTP/1.1 200 ")


async def test_while_no_descriptor_is_free_clients_wait(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with accepting(tmp_path, bounds=PATIENT) as one:
        used = max(int(number) for number in os.listdir("/proc/self/fd"))
        with socket.socket() as client:
            client.setblocking(False)
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(used, client.fileno() + 1), hard))
            try:
                await loop.sock_connect(client, one.sock.getsockname())
                for _ in range(9):
                    await asyncio.sleep(0)
                assert await one.until_counted() == []
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            begun = await one.until_counted(Handshake)
            one.connections.end_handshakes()
            assert await loop.sock_recv(client, 1) == b"", "it is closed, although it has not begun"
            assert len(begun) == 1
        await one.until_counted()
