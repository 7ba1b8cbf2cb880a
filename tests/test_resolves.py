"""A source that is asked for a manifest: within its time, and until the caller cancels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from cachd.errors import CachdError, Cancelled, NotFound, Unavailable
from cachd.model import Digest, File, Manifest, Ref
from cachd.sources.cancel import CancelToken
from cachd.transfer.resolves import SLOW_SECONDS, TOO_SLOW, Resolves
from tests.shelf import ShelfSource

PATIENCE_SECONDS = 120.0
REF = Ref.parse("hf://org/m")
FILE = File("x", 1, "hf://org/m/x", Digest("sha256", "0" * 64))
MANIFEST = Manifest(REF.base, "a" * 40, (FILE,))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Scripted(ShelfSource):
    """A source that answers as the test says."""

    def __init__(self, answer: Callable[[CancelToken], Manifest]) -> None:
        self._answer = answer

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        assert ref == REF
        return self._answer(cancel_token)


class Asking:
    """The resolves of a node, and the failures that they report."""

    def __init__(self) -> None:
        self.clock, self.failures = Clock(), list[tuple[Ref, CachdError]]()
        self.resolves = Resolves(
            600.0,
            stall_seconds=30.0,
            failed=lambda ref, error: self.failures.append((ref, error)),
            clock=self.clock,
        )

    def ask(
        self,
        answer: Callable[[CancelToken], Manifest],
        token: CancelToken | None = None,
        *,
        seconds: float = 600.0,
        slow: Callable[[], None] = lambda: None,
    ) -> Manifest:
        return self.resolves.resolve(
            Scripted(answer), REF, token or CancelToken(), seconds=seconds, slow=slow
        )


@pytest.fixture
def asking() -> Iterator[Asking]:
    made = Asking()
    with closing(made.resolves):
        yield made
    assert not made.resolves._thread.is_alive()


def waits(token: CancelToken) -> Manifest:
    token.wait(PATIENCE_SECONDS)
    return MANIFEST


def test_the_manifest_is_what_the_source_says(asking: Asking) -> None:
    assert asking.ask(lambda _: MANIFEST) is MANIFEST
    assert (asking.failures, asking.resolves.seconds) == ([], 600.0)


def test_an_error_of_the_source_is_raised_and_reported(asking: Asking) -> None:
    error = NotFound("absent", code="repo_not_found")

    def fail(_: CancelToken) -> Manifest:
        raise error

    with pytest.raises(NotFound) as refusal:
        asking.ask(fail)
    assert refusal.value is error
    assert asking.failures == [(REF, error)]


def test_a_cancel_ends_the_wait_and_is_no_failure_of_the_source(asking: Asking) -> None:
    token, asked = CancelToken(), threading.Event()

    def answer(inner: CancelToken) -> Manifest:
        asked.set()
        return waits(inner)

    cancelling = threading.Thread(target=lambda: (asked.wait(PATIENCE_SECONDS), token.cancel()))
    cancelling.start()
    with pytest.raises(Cancelled):
        asking.ask(answer, token)
    cancelling.join()
    assert asking.failures == []
    with pytest.raises(Cancelled):
        asking.ask(lambda _: MANIFEST, token)


def test_a_manifest_that_comes_after_a_cancel_is_dropped(asking: Asking) -> None:
    token = CancelToken()

    def answer(_: CancelToken) -> Manifest:
        token.cancel()
        return MANIFEST

    with pytest.raises(Cancelled):
        asking.ask(answer, token)


def test_a_source_that_takes_longer_than_its_time_is_too_slow(asking: Asking) -> None:
    with pytest.raises(Unavailable) as refusal:
        asking.ask(waits, seconds=0.0)
    assert refusal.value.code == TOO_SLOW
    assert "its source is too slow: not done after 0 s" in refusal.value.detail
    assert refusal.value.hint
    assert asking.failures == [(REF, refusal.value)]


def test_a_source_that_answers_too_rarely_is_too_slow_and_one_that_answers_is_not(asking: Asking) -> None:
    is_slow = threading.Event()

    def rarely(token: CancelToken) -> Manifest:
        token.count(29)
        asking.clock.now += 60.0
        return waits(token)

    with pytest.raises(Unavailable, match="29 answers in 60 s"):
        asking.ask(rarely)

    def often(token: CancelToken) -> Manifest:
        token.count(30)
        asking.clock.now += 60.0
        assert is_slow.wait(PATIENCE_SECONDS)
        return MANIFEST

    assert asking.ask(often, slow=is_slow.set) is MANIFEST


def test_a_slow_source_is_reported_once_while_it_is_waited_for(asking: Asking) -> None:
    calls, again = [], threading.Event()

    def slow() -> None:
        calls.append(asking.clock.now)

    def answer(token: CancelToken) -> Manifest:
        asking.clock.now += SLOW_SECONDS
        other = threading.Thread(target=lambda: asking.ask(meanwhile, slow=again.set))
        other.start()
        other.join()
        return MANIFEST

    def meanwhile(token: CancelToken) -> Manifest:
        asking.clock.now += SLOW_SECONDS
        assert again.wait(PATIENCE_SECONDS)
        return MANIFEST

    assert asking.ask(answer, slow=slow) is MANIFEST
    assert len(calls) == 1


def test_a_token_for_several_calls_ends_with_its_time_or_its_caller(asking: Asking) -> None:
    caller = CancelToken()
    with asking.resolves.ending(caller, seconds=600.0) as token:
        caller.cancel()
        assert token.is_cancelled
    caller = CancelToken()
    with asking.resolves.ending(caller, seconds=0.0) as token, pytest.raises(Cancelled):
        token.wait(PATIENCE_SECONDS)
    assert not caller.is_cancelled
