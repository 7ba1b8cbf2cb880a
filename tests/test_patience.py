"""A resolve may take its time in all, and must bring an answer every other second of a window."""

from __future__ import annotations

from cachd.policy.patience import LEAST_A_SECOND, WINDOW_SECONDS, Patience


def patience(seconds: float = 1000.0, *, stall_seconds: float = 30.0) -> Patience:
    return Patience(seconds, stall_seconds=stall_seconds, now=100.0)


def test_a_resolve_ends_when_its_time_is_over_whatever_was_answered() -> None:
    assert patience(50.0).why_not(10**6, 149.9) == ""
    assert patience(50.0).why_not(10**6, 150.0) == f"not done after 50 s, with {10**6} answers"


def test_within_a_window_nothing_need_be_answered() -> None:
    assert patience().why_not(0, 100.0 + WINDOW_SECONDS - 0.1) == ""
    assert patience().why_not(0, 100.0 + WINDOW_SECONDS) == f"0 answers in {WINDOW_SECONDS:.0f} s"


def test_a_window_is_at_least_as_long_as_two_answers_may_take() -> None:
    slow = patience(stall_seconds=45.0)
    assert slow.why_not(0, 189.9) == ""
    assert slow.why_not(0, 190.0) == "0 answers in 90 s"


def test_each_window_counts_its_own_answers() -> None:
    enough = int(LEAST_A_SECOND * WINDOW_SECONDS)
    assert patience().why_not(enough - 1, 100.0 + WINDOW_SECONDS)
    lasting = patience()
    assert lasting.why_not(enough, 100.0 + WINDOW_SECONDS) == ""
    assert lasting.why_not(enough, 100.0 + 2 * WINDOW_SECONDS - 1) == "", "a window of its own"
    assert lasting.why_not(2 * enough - 1, 100.0 + 2 * WINDOW_SECONDS) == f"{enough - 1} answers in 60 s"
    assert lasting.why_not(2 * enough, 100.0 + 2 * WINDOW_SECONDS) == ""
