"""One connection of the API over a real socket: its stages and bounds, without waiting for its deadlines."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from cachd.api.admission import Bounds, Connections, Stage
from cachd.api.connection import MAX_BODY_BYTES, Connection, body_too_long
from tests.test_admission_of_connections import Client

PATIENCE_SECONDS = 60.0
FRAMING_BYTES = 64 << 10
HELD = b"GET /held HTTP/1.1\r\n\r\n"
BEGUN = b"GET /begun HTTP/1.1\r\n\r\n"
USUAL = Bounds()
LONG_BYTES = 20_000_000  # more than the buffers of both sockets


async def until(what: Callable[[], object]) -> None:
    """Let the event loop go on until this is true. Fails when it is not in time."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not what():  # noqa: ASYNC110 no event says so
            await asyncio.sleep(0)


class App:
    """Reads the body and answers with it, in steps that the path names; notes who hung up."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.asked: list[str] = []
        self.disconnected: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, body = scope["path"], b""
        self.asked.append(path)
        message: Message = {"more_body": path != "/unread"}
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected.append(path)
                return
            body += message.get("body", b"")
        body = bytes(LONG_BYTES) if path == "/long" else body
        head = [(b"content-length", str(len(body)).encode())]
        if path == "/held":
            await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": head})
        if path == "/begun":
            await receive()
            self.disconnected.append(path)
        await send({"type": "http.response.body", "body": body})


@dataclass
class Joined:
    """A connection and its client. `now`: the time of the connection's clock."""

    connections: Connections
    state: ServerState
    app: App
    now: list[float]
    connection: Connection
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, content: bytes, *, then: Stage | None = None) -> None:
        """Send, and wait until the connection has this stage."""
        self.writer.write(content)
        await self.writer.drain()
        await until(lambda: then in (None, self.connection.stage))

    async def answer(self) -> tuple[int, bytes]:
        """The status and the body of the next answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(head.split(b" ", 2)[1]), await self.reader.readexactly(length)

    async def refusal(self) -> tuple[int, str]:
        """The status and the code of the next answer, after which the connection sends nothing more."""
        status, body = await self.answer()
        assert await self.reader.read() == b""
        return status, str(json.loads(body)["code"])

    def is_open(self) -> bool:
        return not self.connection.transport.is_closing()

    def check(self, at: float) -> bool:
        """Check the deadlines; whether the connection stays open and is not refused."""
        self.connection.check_deadlines(at)
        return self.is_open() and self.connection.stage is not Stage.REFUSED


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return server.accept()[0], client


@asynccontextmanager
async def joined(
    *,
    bounds: Bounds = USUAL,
    most: int = 8,
    handshake: Client | None = None,
    own_app: ASGIApp | None = None,
    before: tuple[Client, ...] = (),
) -> AsyncIterator[Joined]:
    """A connection over `App`, with a clock that stands at 100. `before`: who was admitted before it."""
    app, state, now, loop = App(), ServerState(), [100.0], asyncio.get_running_loop()
    connections = Connections(most=most, bounds=bounds, clock=lambda: now[0])
    for each in before:
        assert connections.admit(each)
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None)
    server_end, client_end = socket_pair()

    def made() -> Connection:
        return Connection(config, state, {}, connections=connections, app=own_app, handshake=handshake)

    transport, connection = await loop.connect_accepted_socket(made, server_end)
    reader, writer = await asyncio.open_connection(sock=client_end)
    try:
        yield Joined(connections, state, app, now, connection, reader, writer)
    finally:
        app.release.set()
        writer.close()
        transport.abort()
        await until(lambda: not state.tasks and connection not in state.connections)


# --- stages ---


async def test_a_request_leads_through_the_stages_and_each_begins_now() -> None:
    async with joined() as one:
        assert (one.connection.stage, one.connection.since) == (Stage.HEAD, 100.0)
        one.now[0] = 101.0
        await one.send(b"POST /held HTTP/1.1\r\ncontent-length: 2\r\n\r\n", then=Stage.BODY)
        assert one.connection.since == 101.0
        one.now[0] = 102.0
        await one.send(b"a")
        await one.send(b"b", then=Stage.ANSWER)
        assert one.connection.since == 102.0
        one.now[0] = 103.0
        one.app.release.set()
        assert await one.answer() == (200, b"ab")
        assert (one.connection.stage, one.connection.since) == (Stage.HEAD, 103.0)
        one.now[0] = 104.0
        await one.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await one.answer() == (200, b"")
        assert one.connection.since == 104.0
        assert one.state.total_requests == 2


async def test_the_time_of_a_head_begins_with_its_first_byte() -> None:
    async with joined() as one:
        one.now[0] = 105.0
        await one.send(b"G")
        await until(lambda: one.connection.since != 100.0)
        assert (one.connection.stage, one.connection.since) == (Stage.HEAD, 105.0)


async def test_a_request_sent_ahead_is_a_head_of_its_own_and_is_answered_after_the_first() -> None:
    async with joined() as one:
        await one.send(HELD, then=Stage.ANSWER)
        one.now[0] = 106.0
        await one.send(b"POST / HTTP/1.1\r\n", then=Stage.HEAD)
        assert one.connection.since == 106.0
        await one.send(b"content-length: 1\r\n\r\nx", then=Stage.ANSWER)
        one.app.release.set()
        assert [await one.answer() for _ in range(2)] == [(200, b""), (200, b"x")]
        assert one.connection.stage is Stage.HEAD


async def test_while_a_request_sent_ahead_waits_the_connection_is_not_idle() -> None:
    async with joined() as one:
        await one.send(HELD + BEGUN, then=Stage.ANSWER)
        await until(lambda: one.connection.pipeline)
        one.app.release.set()
        assert (await one.answer())[0] == 200
        await one.reader.readuntil(b"\r\n\r\n")
        assert one.connection.stage is Stage.ANSWER


async def test_a_connection_uses_the_application_it_was_given_else_that_of_the_server() -> None:
    async def other(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    for given, status in ((other, 299), (None, 200)):
        async with joined(own_app=given) as one:
            await one.send(b"GET / HTTP/1.1\r\n\r\n")
            assert (await one.answer())[0] == status


# --- how many, and who leaves ---


async def test_a_connection_is_counted_until_it_is_lost() -> None:
    async with joined(most=1) as one:
        late = Client("other")
        assert one.connection.peer == "127.0.0.1"
        assert one.connection in one.state.connections
        await one.send(HELD, then=Stage.ANSWER)
        assert not one.connections.admit(late)
        one.writer.close()
        await until(lambda: one.connection not in one.state.connections)
        assert one.connections.admit(late)


async def test_a_connection_takes_the_place_of_its_handshake() -> None:
    handshake, other = Client("127.0.0.1", stage=Stage.ANSWER), Client("other", stage=Stage.ANSWER)
    async with joined(most=2, handshake=handshake, before=(handshake, other)) as one:
        assert one.is_open()
        await one.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await one.answer() == (200, b"")
        assert [handshake.has_ended, other.has_ended] == [False, False]


async def test_a_connection_too_many_hears_so_and_is_closed() -> None:
    busy = Client("other", stage=Stage.ANSWER)
    async with joined(most=1, before=(busy,)) as one:
        head = await one.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nretry-after: 1\r\n" in head
        assert head.endswith(b"\r\nconnection: close\r\n\r\n")
        assert json.loads(await one.reader.read())["code"] == "too_many_connections"
        assert not busy.has_ended


# --- how much ---


def test_the_error_of_a_long_body_names_the_bound() -> None:
    assert (body_too_long().code, str(MAX_BODY_BYTES) in body_too_long().detail) == ("body_too_long", True)


@pytest.mark.parametrize("more", [0, 1])
async def test_an_unfinished_head_has_so_many_bytes_and_no_more(more: int) -> None:
    async with joined() as one:
        line = b"GET / HTTP/1.1\r\nx: "
        one.connection.data_received(line + b"y" * ((32 << 10) - len(line)))
        assert one.connection.stage is Stage.HEAD
        one.connection.data_received(b"y" * more)
        if more:
            assert await one.refusal() == (431, "head_too_long")
        else:
            assert one.check(100.0)


@pytest.mark.parametrize("more", [0, 1])
async def test_a_finished_head_has_so_many_bytes_of_its_path_and_lines_and_no_more(more: int) -> None:
    async with joined(bounds=Bounds(head_bytes=100)) as one:
        path = b"/" + b"p" * 59
        await one.send(b"GET " + path + b" HTTP/1.1\r\nname: " + b"v" * (36 + more) + b"\r\n\r\n")
        if more:
            assert await one.refusal() == (431, "head_too_long")
            assert one.app.asked == []
        else:
            assert await one.answer() == (200, b"")


@pytest.mark.parametrize("lines", [3, 4])
async def test_a_head_has_so_many_lines_and_no_more(lines: int) -> None:
    async with joined(bounds=Bounds(head_lines=3)) as one:
        await one.send(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * lines + b"\r\n")
        if lines == 4:
            status, body = await one.answer()
            assert (status, "32768 bytes or 3 lines" in json.loads(body)["detail"]) == (431, True)
            assert one.app.asked == []
        else:
            assert await one.answer() == (200, b"")


@pytest.mark.parametrize("more", [0, 1])
async def test_a_body_with_its_framing_has_so_many_bytes_and_no_more(more: int) -> None:
    async with joined() as one:
        await one.send(b"POST / HTTP/1.1\r\ncontent-length: 9999999\r\n\r\n", then=Stage.BODY)
        one.connection.data_received(bytes(MAX_BODY_BYTES + FRAMING_BYTES))
        assert one.connection.stage is Stage.BODY
        one.connection.data_received(bytes(more))
        assert one.connection.stage is (Stage.REFUSED if more else Stage.BODY)
        if more:
            assert await one.refusal() == (413, "body_too_long")


@pytest.mark.parametrize("ahead", [16, 17])
async def test_so_many_requests_may_be_sent_ahead_and_no_more(ahead: int) -> None:
    async with joined() as one:
        await one.send(HELD, then=Stage.ANSWER)
        one.connection.data_received(b"GET / HTTP/1.1\r\n\r\n" * ahead)
        if ahead == 17:
            assert await one.refusal() == (503, "pipelined")
        else:
            one.app.release.set()
            assert [await one.answer() for _ in range(17)] == [(200, b"")] * 17


async def test_a_long_piece_is_parsed_up_to_the_bound_that_it_exceeds() -> None:
    async with joined() as one:
        await one.send(HELD, then=Stage.ANSWER)
        one.connection.data_received(b"GET / HTTP/1.1\r\n\r\n" * 10_000)
        assert len(one.connection.pipeline) < 1000


async def test_what_cannot_be_parsed_is_refused_and_nothing_after_it_is_read() -> None:
    async with joined() as one:
        await one.send(b"\x16\x03\x01\r\n\r\nGET / HTTP/1.1\r\n\r\n")
        assert await one.refusal() == (400, "invalid_request")
        assert one.app.asked == []


# --- how long ---


async def test_an_idle_connection_is_closed_without_an_answer_after_its_time() -> None:
    async with joined() as one:
        assert one.check(110.0)
        assert not one.check(110.1)
        assert await one.reader.read() == b""


async def test_a_connection_is_idle_again_when_its_last_answer_ended() -> None:
    async with joined() as one:
        await one.send(b"GET / HTTP/1.1\r\n\r\n")
        await one.answer()
        assert one.check(110.0)
        assert not one.check(110.1)
        assert await one.reader.read() == b""


@pytest.mark.parametrize("begun", [b"G", b"GET / HTTP/1.1\r\nx: y\r\n"])
async def test_a_head_that_takes_too_long_is_answered_so(begun: bytes) -> None:
    async with joined() as one:
        one.now[0] = 101.0
        await one.send(begun)
        await until(lambda: one.connection.since == 101.0)
        assert one.check(111.0)
        assert not one.check(111.1)
        status, body = await one.answer()
        document = json.loads(body)
        assert (status, document["code"]) == (408, "too_late")
        assert document["detail"] == "the head of the request did not arrive within 10 s"
        assert await one.reader.read() == b""


async def test_a_head_begun_behind_a_request_is_answered_so_when_it_takes_too_long() -> None:
    async with joined() as one:
        await one.send(b"GET / HTTP/1.1\r\n\r\nGET")
        assert await one.answer() == (200, b"")
        assert one.check(110.0)
        assert not one.check(110.1)
        assert await one.refusal() == (408, "too_late")


async def test_a_body_that_takes_too_long_is_answered_so() -> None:
    async with joined() as one:
        await one.send(b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nab", then=Stage.BODY)
        assert one.check(130.0)
        assert not one.check(130.1)
        status, body = await one.answer()
        assert (status, json.loads(body)["detail"].startswith("the body ")) == (408, True)
        await until(lambda: one.app.disconnected)


async def test_an_answer_that_is_being_made_has_no_deadline() -> None:
    async with joined() as one:
        await one.send(HELD, then=Stage.ANSWER)
        assert one.check(1e9)
        one.app.release.set()
        assert await one.answer() == (200, b"")


async def test_a_client_that_reads_nothing_has_its_time_from_the_first_check_on() -> None:
    async with joined() as one:
        await one.send(b"GET /long HTTP/1.1\r\n\r\n")
        await until(lambda: one.connection.transport.get_write_buffer_size())
        assert one.check(150.0)
        assert one.check(210.0), "it is not idle either: it has an answer to read"
        assert not one.check(210.1)
        await until(lambda: one.connection not in one.state.connections)
        assert len(await one.reader.read()) < LONG_BYTES


async def test_a_client_that_has_read_all_has_its_time_again() -> None:
    async with joined() as one:
        for at in (150.0, 1000.0):
            await one.send(b"GET /long HTTP/1.1\r\n\r\n")
            await until(lambda: one.connection.transport.get_write_buffer_size())
            assert one.check(at)
            assert len((await one.answer())[1]) == LONG_BYTES
            one.now[0] = at + 1
            assert not one.connection.transport.get_write_buffer_size()
            one.connection.check_deadlines(one.connection.since)
        assert one.is_open()


async def test_a_head_that_was_begun_has_its_deadline_though_an_answer_is_still_read() -> None:
    async with joined() as one:
        await one.send(b"GET /long HTTP/1.1\r\n\r\nGET")
        await until(lambda: one.connection.transport.get_write_buffer_size())
        assert one.check(110.0)
        assert not one.check(110.1)


async def test_who_was_refused_has_a_moment_to_read_it() -> None:
    async with joined() as one:
        one.now[0] = 107.0
        await one.send(b"\x16\r\n\r\n", then=Stage.REFUSED)
        one.connection.check_deadlines(109.0)
        assert one.is_open()
        one.connection.check_deadlines(109.1)
        assert not one.is_open()


# --- what is in progress when a connection is refused ---


async def test_an_answer_that_was_partly_sent_is_cut_off_and_nothing_is_put_behind_it() -> None:
    async with joined() as one:
        await one.send(BEGUN, then=Stage.ANSWER)
        await one.reader.readuntil(b"\r\n\r\n")
        await one.send(b"\x16\r\n\r\n", then=Stage.REFUSED)
        assert not one.is_open()
        with suppress(ConnectionResetError):
            assert await one.reader.read() == b""
        await until(lambda: one.app.disconnected)


async def test_a_request_that_was_not_answered_yet_hears_that_its_client_has_gone() -> None:
    async with joined() as one:
        await one.send(b"POST /a HTTP/1.1\r\ncontent-length: 9\r\n\r\n", then=Stage.BODY)
        one.connection.end()
        await until(lambda: one.app.disconnected)
        assert not one.is_open()


async def test_after_an_answer_that_was_sent_completely_a_refusal_is_still_heard() -> None:
    async with joined() as one:
        await one.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await one.answer() == (200, b"")
        await one.send(b"\x16\r\n\r\n")
        assert await one.refusal() == (400, "invalid_request")


async def test_only_the_first_refusal_is_sent() -> None:
    async with joined(bounds=Bounds(head_lines=1)) as one:
        await one.send(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9 + b"\r\nGET / HTTP/1.1\r\n\r\n")
        assert await one.refusal() == (431, "head_too_long")
        assert (one.app.asked, len(one.connection.pipeline)) == ([], 0)


async def test_who_is_answered_before_the_body_has_arrived_hears_the_end_and_the_rest_is_dropped() -> None:
    async with joined() as one:
        one.now[0] = 108.0
        await one.send(b"POST /unread HTTP/1.1\r\ncontent-length: 9999999\r\n\r\n", then=Stage.REFUSED)
        assert await one.answer() == (200, b"")
        assert await one.reader.read() == b"", "its side is closed"
        assert (one.is_open(), one.connection.since) == (True, 108.0)
        one.connection.data_received(bytes(4 << 20))
        assert one.connection.transport.is_reading()
        one.connection.data_received(b"x")
        assert not one.connection.transport.is_reading(), "it has sent more than is dropped"
        assert one.app.asked == ["/unread"]
