"""Questions to an origin are answered in order; an error ends them, a refusal leaves them to others."""

from __future__ import annotations

import time

import pytest

from cachd.errors import Cancelled, Unavailable
from cachd.sources.at_once import THREADS, Questions, ask_all
from cachd.sources.cancel import CancelToken


def refusal(status: int | None = 503, retry_after: float | None = None) -> Unavailable:
    return Unavailable("busy", code="origin_failed", origin_status=status, retry_after=retry_after)


class Asked:
    """Answers with ten times the number, after it has raised these errors."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.numbers = list(errors), list[int]()

    def __call__(self, number: int) -> int:
        self.numbers.append(number)
        if self.errors:
            raise self.errors.pop(0)
        return 10 * number


@pytest.mark.parametrize("count", [0, 1, 100])
def test_answers_come_in_the_order_of_their_questions(count: int) -> None:
    asked = Asked()
    assert ask_all(asked, range(count), CancelToken()) == [10 * number for number in range(count)]
    assert sorted(asked.numbers) == list(range(count))


@pytest.mark.parametrize(
    "error", [ValueError("x"), refusal(500), refusal(None), refusal(503, 7.0), refusal(429, 7.0)]
)
def test_an_error_ends_all_questions_at_once(error: Exception) -> None:
    asked = Asked(error)
    questions = Questions(asked, range(9), CancelToken())
    with pytest.raises(type(error)) as raised:
        questions.work()
    assert raised.value is error
    questions.work()
    assert (asked.numbers, questions.answers()) == ([0], [])
    with pytest.raises(type(error)):
        ask_all(Asked(error), range(9), CancelToken())


@pytest.mark.parametrize("status", [429, 503])
def test_a_thread_that_is_refused_leaves_its_question_to_the_others(status: int) -> None:
    asked = Asked(refusal(status))
    questions = Questions(asked, range(3), CancelToken())
    questions.work()
    assert (asked.numbers, questions.answers()) == ([0], [])
    questions.work()
    assert (asked.numbers, questions.answers()) == ([0, 0, 1, 2], [0, 10, 20])


def test_the_last_thread_asks_again_after_a_pause() -> None:
    asked = Asked(*[refusal()] * THREADS)
    questions = Questions(asked, range(2), CancelToken())
    for _ in range(THREADS - 1):
        questions.work()
    assert asked.numbers == [0] * (THREADS - 1)
    began = time.monotonic()
    questions.work()
    assert time.monotonic() - began >= 0.2
    assert (asked.numbers, questions.answers()) == ([0] * (THREADS + 1) + [1], [0, 10])


def test_a_cancel_ends_the_pause_of_the_last_thread() -> None:
    asked, token = Asked(*[refusal()] * (THREADS + 1)), CancelToken()
    questions = Questions(asked, range(2), token)
    for _ in range(THREADS - 1):
        questions.work()
    token.cancel()
    with pytest.raises(Cancelled):
        questions.work()
    assert len(asked.numbers) == THREADS
