"""What several threads use of a source: while one of them has its lock, every call of the others waits."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from urllib.parse import urlsplit

import pytest

from cachd.model import Ref
from cachd.sources.at_once import Questions
from cachd.sources.aws import Keys, Place, SignIn
from cachd.sources.cancel import CancelToken
from cachd.sources.checksums import LatestChecksums
from cachd.sources.detached import DetachedThreads
from cachd.sources.pauses import Pauses
from cachd.sources.schemes import Sources
from cachd.sources.table import Table
from cachd.sources.throttle import Throttle
from cachd.sources.trust import Authorities
from tests.fetching import http
from tests.test_locks import LET_IN_SECONDS, PATIENCE_SECONDS, assert_all_wait, begun, left

SUMS = f"{'1' * 64}  x\n".encode()


def test_a_cancel_token_is_changed_by_one_thread_at_a_time() -> None:
    token = CancelToken()
    inside = left(token.reaches(CancelToken()))
    for calls in begun(token.reaches(CancelToken())):
        assert_all_wait(token._lock, token.count, *calls, *inside)
    assert_all_wait(token._lock, token.cancel)
    assert token.answered == 1


def test_questions_are_taken_left_and_ended_by_one_thread_at_a_time() -> None:
    questions = Questions[int, int](int, [], CancelToken())
    assert_all_wait(
        questions._lock,
        questions.work,
        lambda: questions._end(0.0, 0.0),
        lambda: questions._leaves(0, 5),
    )


def test_the_pauses_of_a_service_and_of_origins_are_noted_by_one_thread_at_a_time() -> None:
    throttle, pauses = Throttle(), Pauses()
    throttle.refused(throttle._clock())
    url = urlsplit("https://host/x")
    assert_all_wait(throttle._lock, lambda: throttle.refused(0.0), throttle.answered)
    assert_all_wait(pauses._lock, lambda: pauses.note(url, {}, {"Retry-After": "9"}))


def test_a_source_and_its_authorities_are_made_by_one_thread_at_a_time() -> None:
    authorities = Authorities()
    made = Sources(
        lambda *_, **__: http(),
        [],
        Table(),
        authorities={"": authorities},
        stall_seconds=PATIENCE_SECONDS,
        options={},
    )
    assert_all_wait(made._lock, lambda: made.of(Ref.parse("https://host/x")))
    assert_all_wait(authorities._lock, authorities.context)


def test_clients_of_s3_are_made_and_credentials_read_by_one_thread_at_a_time() -> None:
    sign_in = SignIn(http(), Keys(are_none=True), endpoint_url="https://s3.example")
    signed = sign_in.fresh(CancelToken())
    assert_all_wait(sign_in._signing_in, lambda: sign_in.fresh(CancelToken()))
    assert_all_wait(signed._lock, lambda: signed.client(Place("eu-central-1")))


def test_the_idle_connections_of_a_thread_become_known_by_one_thread_at_a_time() -> None:
    pool = http()._pool
    assert_all_wait(pool._lock, pool._idle)


def test_the_sums_of_a_directory_are_read_and_kept_by_one_thread_at_a_time() -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def listing(base: str, _token: CancelToken) -> bytes:
        if base == "other/":
            asked.set()
            assert goes_on.wait(PATIENCE_SECONDS)
        return SUMS

    sums = LatestChecksums(listing)
    sums.of("a/", CancelToken())
    assert_all_wait(sums._lock, lambda: sums.of("a/", CancelToken()))
    with ThreadPoolExecutor(1) as others:
        other = others.submit(sums.of, "other/", CancelToken())
        assert asked.wait(PATIENCE_SECONDS)
        with sums._lock:
            goes_on.set()
            assert not wait([other], LET_IN_SECONDS).done
        assert [*other.result(PATIENCE_SECONDS)] == ["x"]


def test_abandoned_threads_are_counted_by_one_thread_at_a_time() -> None:
    threads, goes_on = DetachedThreads(2), threading.Event()
    one = threads.one(0.01)
    with contextlib.ExitStack() as stack:
        stack.callback(goes_on.set)
        with pytest.raises(TimeoutError):
            one.__enter__().call(goes_on.wait, PATIENCE_SECONDS)
        another = threads.one(0.01)
        assert_all_wait(threads._lock, another.__enter__, lambda: one.__exit__(None, None, None))
        another.__exit__(None, None, None)
        assert len(threads._abandoned) == 1
