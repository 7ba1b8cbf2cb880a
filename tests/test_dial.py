"""A host is connected to at whichever of its addresses answers, within one time for all of them."""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cachd.errors import Cancelled
from cachd.sources.cancel import CancelToken
from cachd.sources.dial import Address, dial
from tests.fetching import PATIENCE_SECONDS
from tests.ground.scripted import black_hole
from tests.ground.site import until


def address(place: tuple[str, int]) -> Address:
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    return family, socket.SOCK_STREAM, 0, "", place


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[tuple[Address, socket.socket]]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        yield address(server.getsockname()[:2]), server


def refusing() -> Address:
    """An address where nobody listens."""
    with listening() as (found, _):
        return found


def connected(
    *addresses: Address, seconds: float = PATIENCE_SECONDS, token: CancelToken | None = None
) -> socket.socket:
    return dial(addresses, seconds, token or CancelToken())


def test_the_socket_is_connected_and_blocks_and_is_no_longer_aborted() -> None:
    token = CancelToken()
    with listening() as (place, server), connected(place, token=token) as ours:
        assert ours.gettimeout() is None
        assert not token.is_awaited
        token.cancel()
        theirs, _ = server.accept()
        with theirs:
            ours.sendall(b"hello")
            assert theirs.recv(5) == b"hello"


def test_an_address_that_refuses_leaves_it_to_the_next() -> None:
    with listening() as (place, _):
        for places in ([refusing(), place], [refusing(), refusing(), place], [place, refusing()]):
            with connected(*places) as ours:
                assert ours.getpeername() == place[4]


def test_the_last_refusal_is_raised_if_no_address_answers() -> None:
    with pytest.raises(ConnectionRefusedError):
        connected(refusing(), refusing())
    with pytest.raises(OSError, match="the name has no address") as refused:
        connected()
    assert refused.value.errno == errno.EADDRNOTAVAIL
    beyond = address(("255.255.255.255", 9))  # it fails at once
    with pytest.raises(OSError, match=r"Network is unreachable|Permission denied"):
        connected(beyond)
    with listening() as (place, _), connected(beyond, place) as ours:
        assert ours.getpeername() == place[4]


def test_an_address_that_does_not_answer_delays_the_next_one_a_little() -> None:
    with black_hole() as hole, listening() as (place, _), connected(address(hole), place) as ours:
        assert ours.getpeername() == place[4]


def test_all_addresses_together_get_the_time() -> None:
    with black_hole() as hole:
        with pytest.raises(TimeoutError, match=r"within 0[.]05 s"):
            connected(address(hole), seconds=0.05)
        with pytest.raises(TimeoutError), listening() as (place, _):
            connected(place, seconds=0.0)


def test_the_second_address_is_of_the_other_family() -> None:
    """Each attempt takes a second of this clock, and the time is over at the third."""
    clock = itertools.count(1).__next__
    with black_hole() as hole, listening("::1") as (place, _):
        one = address(hole)
        with dial([one, one, place], 2.5, CancelToken(), clock) as ours:
            assert ours.getpeername()[:2] == place[4]


def test_every_address_of_both_families_is_tried() -> None:
    with listening() as (place, _):
        six = address(("::1", int(refusing()[4][1])))
        for places in (
            [six, refusing(), refusing(), place],
            [place, six, six],
            [refusing(), six, six, place],
        ):
            with connected(*places) as ours:
                assert ours.getpeername() == place[4]


def test_a_cancel_ends_the_wait_for_an_answer() -> None:
    token = CancelToken()
    with black_hole() as hole, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connected, address(hole), token=token)
        until(lambda: token.is_awaited)
        token.cancel()
        with pytest.raises(Cancelled):
            waiting.result(PATIENCE_SECONDS / 2)
        with pytest.raises(Cancelled):
            connected(address(hole), token=token)
