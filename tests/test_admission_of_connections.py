"""Which connection is admitted, and which one gives way: counts at their bounds, without a server."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest

from cachd.api.admission import Bounds, Connections, Stage, most_connections, peer_of

OFTEN = Bounds(head_seconds=0.2)


class Client:
    """A connection that notes the checks of its deadlines, and its end."""

    def __init__(self, peer: str, since: float = 0.0, stage: Stage = Stage.HEAD) -> None:
        self.peer, self.since, self.stage = peer, since, stage
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.has_ended = False
        self.checked_at: list[float] = []

    def check_deadlines(self, now: float) -> None:
        self.checked_at.append(now)

    def end(self) -> None:
        self.has_ended = True


def admitted(connections: Connections, *clients: Client) -> list[bool]:
    return [connections.admit(each) for each in clients]


async def test_one_peer_has_three_quarters_of_all_connections_and_then_its_idlest_gives_way() -> None:
    connections = Connections(most=8)
    clients = [Client("one", since=float(number)) for number in range(7)]
    other = Client("two", since=-1.0)
    assert admitted(connections, other, *clients[:6]) == [True] * 7
    assert not any(each.has_ended for each in clients)
    assert connections.admit(clients[6])
    assert [each.has_ended for each in clients] == [True] + [False] * 6
    assert not other.has_ended, "it is of another peer"


async def test_all_peers_together_have_all_connections_and_then_the_idlest_of_all_gives_way() -> None:
    connections = Connections(most=4)
    clients = [Client(f"peer {number}", since=float(9 - number)) for number in range(5)]
    assert admitted(connections, *clients[:4]) == [True] * 4
    assert not any(each.has_ended for each in clients)
    assert connections.admit(clients[4])
    assert [each.has_ended for each in clients] == [False, False, False, True, False]


async def test_the_only_connection_may_be_of_any_peer() -> None:
    connections = Connections(most=1)
    first, second = Client("one"), Client("two")
    assert admitted(connections, first, second) == [True, True]
    assert (first.has_ended, second.has_ended) == (True, False)


async def test_a_connection_that_left_makes_place_once() -> None:
    connections = Connections(most=4)
    clients = [Client("one") for _ in range(5)]
    assert admitted(connections, *clients[:3]) == [True] * 3
    for _ in range(2):
        connections.leave(clients[0])
    assert connections.admit(clients[3])
    assert not any(each.has_ended for each in clients)
    assert connections.admit(clients[4])
    assert sum(each.has_ended for each in clients) == 1


async def test_a_peer_whose_connections_all_left_begins_anew() -> None:
    connections = Connections(most=4)
    for _ in range(2):
        clients = [Client("one") for _ in range(3)]
        assert admitted(connections, *clients) == [True] * 3
        for each in clients:
            connections.leave(each)
        assert not any(each.has_ended for each in clients)


async def test_nobody_gives_way_who_awaits_an_answer() -> None:
    connections = Connections(most=4)
    busy = [Client("one", stage=Stage.ANSWER) for _ in range(3)]
    idle, late = Client("two"), Client("one")
    assert admitted(connections, *busy, idle) == [True] * 4
    assert not connections.admit(late), "its peer has no place, and none that could give way"
    assert not idle.has_ended
    assert connections.admit(Client("three"))
    assert idle.has_ended


async def test_a_connection_that_was_active_since_the_last_search_does_not_give_way() -> None:
    connections = Connections(most=3)
    clients = [Client(f"peer {number}", since=float(number)) for number in range(3)]
    admitted(connections, *clients, Client("new", since=99.0))
    assert [each.has_ended for each in clients] == [True, False, False]
    clients[1].since = 50.0
    assert connections.admit(Client("newer", since=99.0))
    assert [each.has_ended for each in clients] == [True, False, True]


async def test_the_idlest_of_a_peer_is_searched_apart_from_the_idlest_of_all() -> None:
    connections = Connections(most=4)
    ones = [Client("one", since=float(number)) for number in range(4)]
    oldest = Client("two", since=-1.0)
    admitted(connections, oldest, *ones)
    assert [each.has_ended for each in (oldest, *ones)] == [False, True, False, False, False]
    assert connections.admit(Client("three", since=9.0))
    assert oldest.has_ended
    assert connections.admit(Client("one", since=9.0))
    assert [each.has_ended for each in ones] == [True, True, False, False]


async def test_one_search_serves_many_and_who_came_after_it_waits_for_the_next() -> None:
    connections = Connections(most=4)
    clients = [Client(f"peer {number}", since=float(number)) for number in range(4)]
    late = [Client(f"late {number}", since=-9.0 + number) for number in range(5)]
    admitted(connections, *clients, *late[:4])
    assert [each.has_ended for each in clients] == [True] * 4
    assert not any(each.has_ended for each in late)
    assert connections.admit(late[4])
    assert [each.has_ended for each in late] == [True] + [False] * 4


@pytest.mark.parametrize("stage", [Stage.HANDSHAKE, Stage.BODY, Stage.REFUSED])
async def test_between_two_requests_a_client_gives_way_first_within_a_second(stage: Stage) -> None:
    for since, gives_way in ((-0.5, False), (-1.5, True)):
        connections = Connections(most=2)
        between, other = Client("one", since=0.0), Client("two", since=since, stage=stage)
        admitted(connections, between, other, Client("three"))
        assert (other.has_ended, between.has_ended) == (gives_way, not gives_way)


async def test_the_end_of_handshakes_ends_nothing_else() -> None:
    connections = Connections(most=8)
    clients = [Client("one", stage=stage) for stage in Stage]
    admitted(connections, *clients)
    connections.end_handshakes()
    assert [each.stage for each in clients if each.has_ended] == [Stage.HANDSHAKE]


class Timers(asyncio.SelectorEventLoop):
    """A loop that keeps its timers until `pass_time` calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[float, Callable[[], object]]] = []

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Any:  # type: ignore[override]  # as far as it is used
        self.waiting.append((delay, partial(callback, *args)))

    def pass_time(self) -> None:
        waiting, self.waiting = self.waiting, []
        for _, call in waiting:
            call()


async def test_deadlines_are_checked_as_long_as_there_are_connections_and_again_with_the_next_one() -> None:
    connections = Connections(most=8, bounds=OFTEN, clock=lambda: 7.0)
    with closing(Timers()) as loop:
        for _ in range(2):
            clients = [Client("one"), Client("two")]
            for each in clients:
                each.loop = loop
            assert admitted(connections, *clients) == [True, True]
            for _ in range(2):
                assert [seconds for seconds, _ in loop.waiting] == [0.05], "one timer for all"
                loop.pass_time()
            assert [each.checked_at for each in clients] == [[7.0, 7.0]] * 2
            for each in clients:
                connections.leave(each)
            loop.pass_time()
            assert loop.waiting == [], "nothing is left to check"


def test_deadlines_are_checked_four_times_within_the_shortest_and_not_all_the_time() -> None:
    assert Bounds(head_seconds=1.0).sweep_seconds == 0.25
    assert Bounds(body_seconds=0.8).sweep_seconds == 0.2
    assert Bounds(unread_seconds=1.2).sweep_seconds == 0.3
    assert Bounds(refused_seconds=0.01).sweep_seconds == 0.05
    assert Bounds().sweep_seconds == 0.5


def test_a_head_has_32_kib_and_100_lines() -> None:
    assert (Bounds().head_bytes, Bounds().head_lines) == (32768, 100)


@contextmanager
def open_files(most: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("descriptors", "connections"), [(40, 16), (1000, 250)])
def test_a_quarter_of_the_descriptors_is_for_connections(descriptors: int, connections: int) -> None:
    with open_files(descriptors):
        assert most_connections() == connections


async def test_the_limit_of_a_server_is_that_of_its_descriptors_unless_it_is_given() -> None:
    with open_files(64):
        connections = Connections()
    clients = [Client(f"peer {number}") for number in range(17)]
    admitted(connections, *clients[:16])
    assert not any(each.has_ended for each in clients)
    connections.admit(clients[16])
    assert sum(each.has_ended for each in clients) == 1


def test_a_peer_is_an_ipv4_address_or_an_ipv6_network_or_a_user() -> None:
    with socket.socket() as tcp:
        assert peer_of(tcp, ("10.0.0.1", 1)) == "10.0.0.1"
        assert peer_of(tcp, ("2001:db8:0:5::1", 1, 0, 0)) == "20010db800000005/64"
        assert peer_of(tcp, ("pod.example", 1)) == "pod.example"
        assert peer_of(tcp, None) == ""
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert peer_of(left, "") == f"uid {os.getuid()}"
