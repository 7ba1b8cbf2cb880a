"""Which names a model may have."""

from __future__ import annotations

import posixpath
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.errors import Invalid
from cachd.model import (
    NAME_PATTERN,
    check_name,
    quoted,
)
from tests.ground.values import LONG, code_of


@pytest.mark.parametrize("name", ["a", "Llama-3.1-8B", "org--model", "0", "a.b_c-d", LONG, "model.bin"])
def test_a_plain_name_is_accepted(name: str) -> None:
    assert check_name(name) == name


CLIMBING = ["../../etc", "a/../../b", "/abs", "a//b", ".", "..", "a\\..\\b", "%2e%2e%2f", "a..b"]
ODD = ["", "a\0b", "a\nb", "a\n", " a", "a ", "a b", "-a", ".a", "_a", "x" * 97, "x" * 300, "é"]
LOOK_ALIKES = ["a\u2215b", "a\u2044b", "\u202eb", "a\u200bb", "\uff0e\uff0e"]


@pytest.mark.parametrize("name", CLIMBING + ODD + LOOK_ALIKES, ids=ascii)
def test_any_other_name_is_refused(name: str) -> None:
    assert code_of(lambda: check_name(name)) == "bad_name"


@given(st.text(max_size=120))
def test_a_name_that_passes_is_one_component_of_a_path_and_of_a_url(name: str) -> None:
    try:
        check_name(name)
    except Invalid:
        return
    assert re.fullmatch(NAME_PATTERN, name)
    assert posixpath.normpath(f"/models/{name}") == f"/models/{name}"
    assert quoted(name) == name
