"""Requests over kept connections: what each answer counts, and what happens when an origin refuses one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import pytest

from cachd.policy.address_policy import AddressPolicy
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http
from cachd.sources.http1 import Request
from cachd.sources.timeouts import Timeouts
from cachd.sources.trust import Authorities
from tests.fetching import PATIENCE_SECONDS, http, refused
from tests.ground.origin import Origin
from tests.ground.raw import Asked, RawServer, reply
from tests.ground.scripted import OK, Scripted, saying


def read(over: Http, url: str) -> bytes:
    return over.read(url, CancelToken(), at_most=99)


def status(over: Http, url: str, *, body: bytes = b"") -> int:
    """The status of the answer to a request. Its connection is used again."""
    length = {"Content-Length": str(len(body))} if body else {}
    asked = Request("POST" if body else "GET", urlsplit(url), length, body)
    with over.relay(asked, CancelToken()) as response:
        response.content(CancelToken(), at_most=99)
        return response.status


def test_each_answer_counts_as_progress_of_the_caller() -> None:
    token = CancelToken()
    with Scripted(saying(OK)) as server:
        over = http()
        for number in (1, 2, 3):
            with over.relay(Request("GET", urlsplit(f"{server.url}/x"), {}), token) as response:
                assert token.answered == number
                response.content(CancelToken(), at_most=2)
            assert not token.is_awaited
        over.read(f"{server.url}/x", token, at_most=2)
        assert token.answered == 5, "the head, and a block of the content"


def test_a_header_that_cannot_be_sent_is_refused_and_the_next_request_is_sent() -> None:
    with Scripted(saying(OK)) as server:
        over = http()
        asked = Request("GET", urlsplit(f"{server.url}/x"), {"Authorization": "hunter2\nx"})
        error = refused(lambda: over.relay(asked, CancelToken()), "bad_header")
        assert (error.hint, "hunter2" in str(error)) == ("check the token", False)
        assert read(over, f"{server.url}/x") == b"ok"


def test_an_origin_that_wants_a_pause_is_not_asked_by_any_client_that_shares_it() -> None:
    with RawServer(lambda asked: reply(asked, "429 Too Many Requests", "Retry-After: 60")) as origin:
        over = http()
        assert status(over, f"{origin.url}/x") == 429
        for client in (over, over.anywhere()):
            refused(lambda client=client: read(client, f"{origin.url}/x"), "rate_limited")
        assert len(origin.asked) == 1


@pytest.mark.parametrize("refusal", ["503 Service Unavailable", "502 Bad Gateway"])
def test_only_a_refusal_for_load_is_noted_as_a_pause(refusal: str) -> None:
    with RawServer(lambda asked: reply(asked, refusal, "Retry-After: 60")) as origin:
        over = http()
        assert [status(over, f"{origin.url}/x") for _ in range(2)] == [int(refusal[:3])] * 2


@contextmanager
def kept_by_another_thread(over: Http, url: str) -> Iterator[None]:
    """Inside, another thread keeps an idle connection to the origin."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(status, over, url).result(PATIENCE_SECONDS) == 200
        yield


BUSY = "503 Service Unavailable"


def first_connection_only(asked: Asked) -> bytes:
    return reply(asked, "200 OK" if asked.connection == 1 else BUSY)


def test_a_request_that_is_refused_goes_over_the_idle_connection_of_another_thread() -> None:
    with RawServer(first_connection_only) as origin:
        over, url = http(), f"{origin.url}/x"
        with kept_by_another_thread(over, url):
            assert status(over, url) == 200
            assert [asked.connection for asked in origin.asked] == [1, 2, 1]
            assert status(over, url) == 200, "it is this thread's connection now"
            assert [asked.connection for asked in origin.asked] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("lines", "body"), [(["Retry-After: 1"], b""), ([], b"\r\n\r\n")], ids=["a pause is wanted", "a body"]
)
def test_a_refusal_that_states_a_pause_or_of_a_request_with_a_body_is_the_answer(
    lines: list[str], body: bytes
) -> None:
    def answer(asked: Asked) -> bytes:
        return reply(asked) if asked.connection == 1 else reply(asked, BUSY, *lines)

    with RawServer(answer) as origin:
        over, url = http(), f"{origin.url}/x"
        with kept_by_another_thread(over, url):
            assert status(over, url, body=body) == 503
            assert [asked.connection for asked in origin.asked] == [1, 2]


def test_a_refusal_without_another_connection_is_the_answer() -> None:
    with RawServer(lambda asked: reply(asked, BUSY)) as origin:
        assert status(http(), f"{origin.url}/x") == 503
        assert len(origin.asked) == 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_origin_that_refuses_over_an_idle_connection_too_is_asked_once_for_ten_seconds() -> None:
    clock = Clock()
    over = Http(
        AddressPolicy(["127.0.0.0/8"]),
        authorities=Authorities(None),
        timeouts=Timeouts(PATIENCE_SECONDS, PATIENCE_SECONDS),
        clock=clock,
    )
    with RawServer(lambda asked: reply(asked, "200 OK" if asked.target == "/ok" else BUSY)) as origin:

        def requests_of_one() -> int:
            """How many requests are sent for one that is refused, while another thread has a connection."""
            over.anew()
            with kept_by_another_thread(over, f"{origin.url}/ok"):
                before = len(origin.asked)
                assert status(over, f"{origin.url}/busy") == 503
                return len(origin.asked) - before

        assert requests_of_one() == 2
        assert requests_of_one() == 1
        clock.now += 9.9
        assert requests_of_one() == 1
        clock.now += 0.1
        assert requests_of_one() == 2


def test_an_idle_connection_of_another_thread_that_breaks_is_the_origins_failure() -> None:
    def answer(asked: Asked) -> bytes:
        if asked.connection == 1:
            return reply(asked) if asked.request == 1 else b""
        return reply(asked, BUSY)

    with RawServer(answer) as origin:
        over, url = http(), f"{origin.url}/x"
        with kept_by_another_thread(over, url):
            refused(lambda: status(over, url), "connection_failed")


def test_no_connection_that_is_idle_is_used_again_when_new_ones_are_wanted() -> None:
    with RawServer(reply) as origin:
        over = http()
        assert [status(over, f"{origin.url}/x") for _ in range(2)] == [200, 200]
        over.anew()
        assert [status(over, f"{origin.url}/x") for _ in range(2)] == [200, 200]
        assert [asked.connection for asked in origin.asked] == [1, 1, 2, 2]


def test_a_thread_keeps_connections_to_a_few_origins_and_closes_the_one_that_is_idle_longest() -> None:
    over = http()
    with ExitStack() as stack:
        servers = [stack.enter_context(RawServer(reply)) for _ in range(5)]
        for server in (*servers, *servers[1:], servers[0]):
            assert status(over, f"{server.url}/x") == 200
        used = [[asked.connection for asked in server.asked] for server in servers]
        assert used == [[1, 2], *[[1, 1]] * 4]


def test_an_idle_connection_is_used_only_for_what_the_policy_allows_of_its_host() -> None:
    with Origin(tls=True) as origin:
        allowed, other = (
            origin.add(path, b"ok").replace("127.0.0.1", "localhost") for path in ("/ok/x", "/other")
        )
        over = http(allowed.removesuffix("x"), ca_file=origin.ca_file)
        assert status(over, allowed) == 200
        refused(lambda: status(over, other), "private_address")
        assert [seen.path for seen in origin.requests] == ["/ok/x"]
