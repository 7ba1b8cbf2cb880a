"""The pause that all requests for one service share."""

from __future__ import annotations

import threading

import pytest

from cachd.errors import Cancelled
from cachd.sources.cancel import CancelToken
from cachd.sources.throttle import Throttle


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refused_again(throttle: Throttle, clock: Clock) -> float:
    """The pause after a request that is sent when the earlier pause is over, and refused."""
    clock.now += throttle.seconds_left
    throttle.refused(clock.now)
    return throttle.seconds_left


def test_pauses_double_up_to_a_bound_and_begin_short_again_after_an_answer() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    assert throttle.seconds_left == 0
    pauses = [refused_again(throttle, clock) for _ in range(9)]
    first = pauses[0]
    assert first > 0
    assert pauses[:5] == pytest.approx([first * 2**number for number in range(5)])
    assert pauses[-2:] == [20, 20]
    throttle.answered()
    assert throttle.seconds_left == 20, "the pause that is going on stays"
    assert refused_again(throttle, clock) == pytest.approx(first)


def test_a_refusal_of_a_request_from_before_the_pause_changes_nothing() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.refused(clock.now)
    pause = throttle.seconds_left
    throttle.refused(clock.now)
    throttle.refused(clock.now + pause - 0.01)
    assert throttle.seconds_left == pause
    throttle.refused(clock.now + pause)
    assert throttle.seconds_left == pytest.approx(2 * pause)


def test_a_request_may_be_sent_after_the_pause_unless_it_is_cancelled() -> None:
    clock, token = Clock(), CancelToken()
    throttle = Throttle(clock)
    assert throttle.wait(token) == clock.now
    throttle.refused(clock.now)
    waiting = threading.Thread(target=token.cancel)
    waiting.start()
    with pytest.raises(Cancelled):
        throttle.wait(token)
    waiting.join()
    clock.now += throttle.seconds_left
    assert throttle.wait(CancelToken()) == clock.now
    with pytest.raises(Cancelled):
        throttle.wait(token)
