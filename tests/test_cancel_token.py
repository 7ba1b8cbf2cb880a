"""A cancel token ends the waits that it reaches, and counts what a source has answered."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cachd.errors import Cancelled
from cachd.sources.cancel import CancelToken
from tests.fetching import PATIENCE_SECONDS
from tests.ground.site import until


def test_a_token_is_awaited_within_what_it_reaches_alone() -> None:
    token, waited_for = CancelToken(), CancelToken()
    assert not token.is_awaited
    with token.reaches(waited_for):
        assert token.is_awaited
    assert not token.is_awaited


def test_a_cancel_aborts_what_the_token_reaches_and_nothing_that_was_left() -> None:
    token, left, one, other = (CancelToken() for _ in range(4))
    with token.reaches(left):
        pass
    assert not token.is_cancelled
    with token.reaches(one), token.reaches(other):
        token.cancel()
    assert [each.is_cancelled for each in (token, left, one, other)] == [True, False, True, True]


def test_after_a_cancel_nothing_is_waited_for() -> None:
    token, waited_for = CancelToken(), CancelToken()
    token.check()
    token.abort()
    with pytest.raises(Cancelled):
        token.check()
    with pytest.raises(Cancelled), token.reaches(waited_for):
        pytest.fail("the wait began")
    with pytest.raises(Cancelled):
        token.wait(PATIENCE_SECONDS)
    assert not token.is_awaited
    assert not waited_for.is_cancelled


def test_a_wait_lasts_as_long_as_it_should_and_then_raises_nothing() -> None:
    began = time.monotonic()
    CancelToken().wait(0.02)
    assert time.monotonic() - began >= 0.02


def test_a_cancel_ends_a_wait_with_an_error() -> None:
    token = CancelToken()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(token.wait, PATIENCE_SECONDS)
        until(lambda: token.is_awaited)
        token.cancel()
        with pytest.raises(Cancelled):
            waiting.result(PATIENCE_SECONDS / 2)


def test_answers_are_added_up() -> None:
    token = CancelToken()
    assert token.answered == 0
    token.count()
    token.count(3)
    assert token.answered == 4
