"""Text of strangers: what an origin or a client writes commands no terminal and breaks no answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.errors import CachdError, NotFound, Unavailable, error_of, printable
from tests.conftest import Engine
from tests.ground.scripted import Scripted, heard

ESCAPES = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "a\rb",
    "a\x00b",
    "\u202eb",
    "\ud800",
    "\x9b31m",
    "\u2066",
]


@pytest.mark.parametrize("text", ESCAPES, ids=ascii)
def test_no_text_of_an_error_holds_a_character_that_a_terminal_obeys(text: str) -> None:
    error = Unavailable(f"origin said {text}", mend=text, said=text)
    for shown in (error.detail, str(error), error.mend, str(error.facts["said"])):
        assert shown.isprintable()
        shown.encode()
    assert json.dumps(error.as_document(), ensure_ascii=False).isprintable()
    told = error_of({"detail": text, "mend": text, "code": "x", "error_class": "Unavailable"})
    assert told.detail.isprintable()


@given(st.text(st.characters(exclude_categories=())))
def test_what_is_printable_stays_and_nothing_else_does(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    if text.isprintable() and len(text) <= 4000:
        assert shown == text


def test_a_long_text_of_an_origin_is_cut() -> None:
    assert len(CachdError("x" * 10_000_000).detail) < 5000
    assert len(printable("\x1b" * 10_000_000)) < 20_000


def test_a_reason_phrase_with_terminal_commands_is_told_as_text(engine: Callable[..., Engine]) -> None:
    def script(connection: socket.socket, _: int) -> None:
        while heard(connection):
            connection.sendall(b"HTTP/1.1 404 \x1b[2J\x1b]0;owned\x07 gone\r\nContent-Length: 0\r\n\r\n")

    with Scripted(script) as origin, pytest.raises(NotFound) as refusal:
        engine().pull(f"{origin.url}/x")
    assert refusal.value.detail.isprintable()
    assert "gone" in refusal.value.detail
