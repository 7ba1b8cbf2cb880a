"""A bounded dictionary holds as many keys as it may, and begins anew with the first that is too many."""

from __future__ import annotations

from cachd.bounded import Bounded


def test_a_key_that_is_one_too_many_makes_it_forget_the_others() -> None:
    kept = Bounded[str, int](2)
    kept["a"] = 1
    kept["b"] = 2
    assert kept == {"a": 1, "b": 2}
    kept["c"] = 3
    assert kept == {"c": 3}


def test_a_new_value_of_a_key_forgets_nothing_of_a_full_one() -> None:
    kept = Bounded[str, int](2)
    kept["a"] = 1
    kept["b"] = 2
    kept["a"] = 3
    assert kept == {"a": 3, "b": 2}
