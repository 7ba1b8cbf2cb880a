"""Calls that may never return: their callers stop waiting, and only so many of them are left behind."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from cachd.errors import Cancelled, Invalid, Unavailable
from cachd.sources.cancel import CancelToken
from cachd.sources.detached import DetachedThread, DetachedThreads
from cachd.sources.dial import Address
from cachd.sources.names import MAX_LEFT, Names
from tests.fetching import PATIENCE_SECONDS, refused

FOUND: Sequence[Address] = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]


class Blocked:
    """A call that returns when the test says so."""

    def __init__(self) -> None:
        self.reached, self.goes_on = threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self, *_: object) -> Sequence[Address]:
        self.calls += 1
        self.reached.set()
        self.goes_on.wait(PATIENCE_SECONDS)
        return FOUND


@contextmanager
def blocked() -> Iterator[Blocked]:
    call = Blocked()
    try:
        yield call
    finally:
        call.goes_on.set()


def divided(one: int, other: int) -> float:
    return one / other


def test_a_call_returns_or_raises_what_it_does_in_one_thread_that_ends_with_the_context() -> None:
    closed = threading.Event()
    with DetachedThread(PATIENCE_SECONDS) as thread:
        thread.held.callback(closed.set)
        assert thread.call(divided, 6, 3) == 2
        with pytest.raises(ZeroDivisionError):
            thread.call(divided, 6, 0)
        idents = {thread.call(threading.get_ident) for _ in range(3)}
        assert len(idents) == 1
        assert threading.get_ident() not in idents
        assert thread.is_alive
        assert not closed.is_set()
    assert closed.is_set(), "the context waits for the thread"
    assert not thread.is_alive


def test_a_call_that_takes_too_long_is_abandoned_and_closes_what_it_holds_later() -> None:
    closed = threading.Event()
    with blocked() as call:
        with DetachedThread(0.01) as thread:
            thread.held.callback(closed.set)
            with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
                thread.call(call)
        assert thread.is_alive
        assert not closed.is_set()
    assert closed.wait(PATIENCE_SECONDS)


def test_an_abort_ends_a_call_that_waits() -> None:
    with blocked() as call, DetachedThread(PATIENCE_SECONDS) as thread:
        aborting = threading.Thread(target=lambda: (call.reached.wait(PATIENCE_SECONDS), thread.abort()))
        aborting.start()
        with pytest.raises(TimeoutError, match="aborted"):
            thread.call(call)
        aborting.join()


def test_no_call_begins_while_too_many_are_blocked() -> None:
    threads = DetachedThreads(2)
    with threads.one(PATIENCE_SECONDS) as thread:
        assert thread.call(divided, 6, 3) == 2
    with blocked() as call:
        for _ in range(2):
            with threads.one(0.01) as thread, pytest.raises(TimeoutError):
                thread.call(call)
        with pytest.raises(TimeoutError, match="2 earlier calls still wait"), threads.one(1.0):
            pass
    for left in threads._abandoned:
        left._thread.join()
    with threads.one(PATIENCE_SECONDS) as thread:
        assert thread.call(divided, 6, 3) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_is_not_looked_up(host: str) -> None:
    with blocked() as call:
        found = Names(PATIENCE_SECONDS, call).addresses(host, 80, CancelToken())
        assert {address[4][0] for address in found} == {host}
        assert call.calls == 0


def test_the_addresses_of_a_name_come_from_the_resolver() -> None:
    asked = []

    def resolver(host: str, port: int) -> Sequence[Address]:
        asked.append((host, port))
        return FOUND

    assert Names(PATIENCE_SECONDS, resolver).addresses("host.test", 80, CancelToken()) is FOUND
    assert asked == [("host.test", 80)]


@pytest.mark.parametrize(
    ("raised", "expected", "code", "detail"),
    [
        (socket.gaierror(-2, "Name or service not known"), Unavailable, "dns_failed", "not known"),
        (OSError("no route"), Unavailable, "dns_failed", "no route"),
        (UnicodeError("label too long"), Invalid, "bad_ref", "is not a host name"),
    ],
)
def test_a_name_that_cannot_be_looked_up_is_refused(
    raised: Exception, expected: type[Exception], code: str, detail: str
) -> None:
    def resolver(_host: str, _port: int) -> Sequence[Address]:
        raise raised

    names = Names(PATIENCE_SECONDS, resolver)
    error = refused(lambda: names.addresses("host.test", 80, CancelToken()), code)
    assert isinstance(error, expected)
    assert "host.test" in error.detail
    assert detail in error.detail
    assert error.hint


def test_a_lookup_that_takes_too_long_is_unavailable_and_so_are_all_after_too_many() -> None:
    with blocked() as call:
        names = Names(0.001, call)
        for _ in range(MAX_LEFT):
            error = refused(lambda: names.addresses("host.test", 80, CancelToken()), "dns_failed")
            assert "no answer within" in error.detail
        error = refused(lambda: names.addresses("host.test", 80, CancelToken()), "dns_failed")
        assert f"{MAX_LEFT} earlier calls still wait" in error.detail
        assert call.calls == MAX_LEFT


def test_a_cancel_ends_a_lookup() -> None:
    token = CancelToken()
    with blocked() as call:
        cancelling = threading.Thread(target=lambda: (call.reached.wait(PATIENCE_SECONDS), token.cancel()))
        cancelling.start()
        with pytest.raises(Cancelled):
            Names(PATIENCE_SECONDS, call).addresses("host.test", 80, token)
        cancelling.join()
