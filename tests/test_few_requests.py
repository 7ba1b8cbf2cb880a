"""Origins that take few requests at once: cachd falls to what they take, and loses nothing."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cachd.errors import Unavailable
from cachd.model import ModelSpec
from cachd.policy.origin_limit import FIRST_HOLD_SECONDS, LONGEST_HOLD_SECONDS, OriginLimit
from cachd.sources.at_once import THREADS, Questions, ask_all
from cachd.sources.cancel import CancelToken
from cachd.sources.pauses import Pauses, is_pause
from tests.conftest import Engine, spec_of
from tests.fetching import MIB, PATIENCE_SECONDS, http, refused
from tests.ground.checksums import sha256sums
from tests.ground.models import noise
from tests.ground.raw import Asked, RawServer, ranged, reply
from tests.ground.site import until

Engines = Callable[..., Engine]
FILES = {**{f"{number:02}.json": noise(3000, number) for number in range(20)}, "w.bin": noise(20 * MIB)}
SUMS = sha256sums(FILES)


def served(asked: Asked) -> bytes:
    return ranged(asked, {**FILES, "SHA256SUMS": SUMS}[asked.target.rpartition("/")[2]], 'ETag: "one"')


def published(root: Path, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "models" / name).iterdir()}


@pytest.mark.parametrize("limit", ["connections", "requests"])
@pytest.mark.parametrize("refusal", ["503 Service Unavailable", "429 Too Many Requests"])
def test_an_origin_that_takes_one_at_once_is_pulled_from_one_at_once(
    root: Path, engine: Engines, limit: str, refusal: str
) -> None:
    running = engine(streams=8, retries=3)
    limits: dict[str, Any] = {limit: 1}
    with RawServer(served, **limits, refusal=refusal) as origin:
        running.pull(f"{origin.url}/m/", name="first")
        running.pull(f"{origin.url}/m/", name="again", replace=True)
        running.pull(f"{origin.url}/m/w.bin", name="alone")
        for _ in range(20):  # on a busy machine, two requests may not meet
            if origin.refused:
                break
            running.pull(f"{origin.url}/m/w.bin", name="alone", replace=True)
        refusals = origin.refused
    assert published(root, "first") == published(root, "again") == FILES
    assert published(root, "alone") == {"w.bin": FILES["w.bin"]}
    assert 0 < refusals < 60, "few of some fifty requests, however many streams there are"


def test_an_origin_that_refuses_everything_fails_with_its_status(engine: Engines) -> None:
    running = engine(streams=4, retries=1)

    def said(asked: Asked) -> bytes:
        return served(asked) if asked.method == "HEAD" else reply(asked, "503 Service Unavailable")

    with RawServer(said) as origin:
        error = refused(lambda: running.pull(f"{origin.url}/m/w.bin"), "origin_failed")
        assert error.origin_status == 503
        assert len(origin.asked) < 40


def test_a_pull_that_is_refused_while_its_origin_serves_another_one_waits(engine: Engines) -> None:
    content = FILES["00.json"]
    sending = threading.Event()

    def said(asked: Asked) -> bytes | Iterator[bytes]:
        whole = ranged(asked, content, 'ETag: "one"')
        return in_two(whole) if (asked.method, asked.target) == ("GET", "/first") else whole

    def in_two(whole: bytes) -> Iterator[bytes]:
        yield whole[:-9]
        sending.set()
        for _ in range(7):
            assert origin.refusals.acquire(timeout=PATIENCE_SECONDS)
        yield whole[-9:]

    running = engine(retries=0, stall_seconds=PATIENCE_SECONDS)
    with RawServer(said, connections=1) as origin:
        first = running.begin(spec_of(f"{origin.url}/first"))
        assert sending.wait(PATIENCE_SECONDS)
        second = running.begin(spec_of(f"{origin.url}/second"))
        assert first.done.result(PATIENCE_SECONDS)
        assert second.done.result(PATIENCE_SECONDS)


def test_a_part_that_is_refused_while_its_origin_serves_another_part_has_not_failed(engine: Engines) -> None:
    """With no retries, the first failure of a part would end the pull."""
    content, is_served, was_refused = FILES["w.bin"], threading.Event(), threading.Event()
    gets = itertools.count(1)

    def said(asked: Asked) -> bytes | Iterator[bytes]:
        answer = ranged(asked, content, 'ETag: "one"')
        number = 0 if asked.method == "HEAD" else next(gets)
        if number == 1:
            return until_another_is_refused(answer)
        if number in (2, 3):  # what is refused goes once over the idle connection of the HEAD, too
            assert is_served.wait(PATIENCE_SECONDS)
            return reply(asked, "503 Service Unavailable")
        if number == 4:  # the same stream asks again
            was_refused.set()
        return answer

    def until_another_is_refused(answer: bytes) -> Iterator[bytes]:
        yield answer[:-9]
        assert was_refused.wait(PATIENCE_SECONDS)
        yield answer[-9:]

    running = engine(retries=0, streams=2, stall_seconds=PATIENCE_SECONDS)
    with RawServer(said) as origin:
        pull = running.begin(spec_of(f"{origin.url}/w.bin"))
        until(lambda: pull.progress.now.fetched > 0)
        is_served.set()
        try:
            assert pull.done.result(PATIENCE_SECONDS)
        finally:
            was_refused.set()


# --- pauses ---


def test_what_one_pull_learns_of_a_pause_holds_for_all_pulls_of_the_node(engine: Engines) -> None:
    times: list[float] = []

    def said(asked: Asked) -> bytes:
        times.append(time.monotonic())
        if len(times) == 1:
            return reply(asked, "429 Too Many Requests", "Retry-After: 1")
        return ranged(asked, FILES["00.json"], 'ETag: "one"')

    running = engine(retries=0)
    with RawServer(said) as origin:
        spec = ModelSpec.asked(f"{origin.url}/first", "first")
        refused(lambda: running.pulls.previews.resolve(spec), "rate_limited")
        for number in range(6):
            running.begin(spec_of(f"{origin.url}/{number}"))
        for pull in running.pulls.running():
            pull.done.result(PATIENCE_SECONDS)
    assert len(times) == 1 + 6 * 2, "a HEAD and a GET of each, after the pause"
    assert times[1] - times[0] >= 0.99


def test_a_pause_is_of_one_origin_and_of_one_bucket() -> None:
    pauses = Pauses(lambda: 0.0)
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=x"}
    asked: list[tuple[str, dict[str, str]]] = [
        ("http://a/x", {}),
        ("http://a:81/x", {}),
        ("http://b/x", {}),
        ("http://s/one/x", signed),
        ("http://s/two/x?X-Amz-Credential=y", {}),
    ]
    for number, (url, headers) in enumerate(asked):
        pauses.note(urlsplit(url), headers, {"Retry-After": str(number + 1)})
    for number, (url, headers) in enumerate(asked):
        error = refused(lambda url=url, headers=headers: pauses.check(urlsplit(url), headers), "rate_limited")
        assert error.facts["retry_after"] == number + 1
        assert is_pause(error)
    for url, headers in (("http://s/x", {}), ("http://s/three/x", signed), ("https://a/x", {})):
        pauses.check(urlsplit(url), headers)


def test_pauses_end_and_their_number_is_bounded() -> None:
    now = [0.0]
    pauses = Pauses(lambda: now[0])
    for number in range(3000):
        pauses.note(urlsplit(f"http://h{number}/"), {}, {"Retry-After": "5"})
    assert len(pauses._until) == 1000
    now[0] = 5.0
    pauses.check(urlsplit("http://h0/"), {})
    pauses.note(urlsplit("http://new/"), {}, {"Retry-After": "5"})
    refused(lambda: pauses.check(urlsplit("http://new/"), {}), "rate_limited")
    pauses.note(urlsplit("http://none/"), {}, {"RateLimit": '"a";r=5;t=9'})
    pauses.check(urlsplit("http://none/"), {})


# --- the decision ---


def limited() -> OriginLimit:
    """The limit of an origin that served one request of three."""
    limit = OriginLimit()
    limit.answered()
    limit.running = 3
    assert limit.refused(0)
    assert limit.refused(0)
    limit.running = 1
    return limit


def test_the_limit_is_what_is_served_while_others_are_refused() -> None:
    limit = limited()
    assert limit.most == 1
    assert not limit.allows(FIRST_HOLD_SECONDS - 1)
    limit.running = 0
    assert limit.allows(FIRST_HOLD_SECONDS - 1)


def test_a_limit_is_raised_after_a_time_without_refusals_and_more_rarely_when_that_was_too_much() -> None:
    limit, now, holds = limited(), 0.0, []
    for _ in range(6):
        waited = now
        while not limit.allows(now):
            now += 1
        holds.append(now - waited)
        assert limit.most == 2
        assert limit.refused(now)
        assert limit.refused(now)
        assert limit.most == 1
    assert holds[0] == FIRST_HOLD_SECONDS
    assert holds == sorted(holds)
    assert holds[-1] == LONGEST_HOLD_SECONDS


def test_a_refusal_while_nothing_is_served_is_a_failure_and_no_limit() -> None:
    limit = OriginLimit()
    assert not any(limit.refused(0) for _ in range(100))
    assert limit.most is None


def test_a_large_origin_that_refuses_one_of_a_hundred_keeps_its_streams() -> None:
    limit = OriginLimit()
    for _ in range(50):
        for _ in range(99):
            limit.answered()
        assert limit.refused(0)
        for _ in range(99):
            limit.ended()
    assert limit.most is None


# --- questions ---


def test_questions_are_answered_in_order_by_as_many_threads_as_the_origin_takes() -> None:
    with RawServer(lambda asked: reply(asked, body=asked.target.encode()), requests=1) as origin:
        over = http()
        numbers = list(range(40))
        answers = ask_all(
            lambda number: over.read(f"{origin.url}/{number}", CancelToken(), at_most=99),
            numbers,
            CancelToken(),
        )
    assert answers == [f"/{number}".encode() for number in numbers]


def busy() -> Unavailable:
    return Unavailable("busy", code="origin_failed", origin_status=503)


def test_a_thread_whose_question_is_refused_leaves_it_to_the_others_unless_it_is_the_last() -> None:
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        if len(asked) <= THREADS:
            raise busy()
        return number

    questions = Questions(ask, range(9), CancelToken())
    for count in range(1, THREADS):
        questions.work()
        assert asked == [0] * count, "it has left after one refusal"
    questions.work()
    assert questions.answers() == list(range(9))


def test_the_last_thread_asks_again_after_a_pause_unless_a_longer_one_is_asked_for() -> None:
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        if len(asked) <= THREADS + 1:  # the last of these refusals is that of the last thread
            raise busy()
        return number

    assert ask_all(ask, range(9), CancelToken()) == list(range(9))
    error = Unavailable("later", code="rate_limited", origin_status=429, retry_after=1.0)

    def refuse(_: int) -> int:
        raise error

    assert refused(lambda: ask_all(refuse, range(9), CancelToken()), "rate_limited") is error
