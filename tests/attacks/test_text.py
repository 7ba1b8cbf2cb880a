"""Text of strangers: what an origin or a client writes commands no terminal and breaks no answer."""

from __future__ import annotations

import ast
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd import terminal
from cachd.errors import CachdError, Forbidden, Invalid, NotFound, error_of, printable
from cachd.model import ModelSpec
from tests.conftest import Engine
from tests.faults.test_index import PROJECT
from tests.ground.scripted import Scripted, heard
from tests.ground.site import Ground

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
    error = Forbidden(f"origin said {text}", hint=text, hub_error=text)
    for shown in (error.detail, str(error), error.hint, str(error.facts["hub_error"])):
        assert shown.isprintable()
        shown.encode()
    assert json.dumps(error.as_document(), ensure_ascii=False).isprintable()
    told = error_of({"detail": text, "hint": text, "code": "x", "error_class": "Unavailable"})
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


def test_a_reason_phrase_with_terminal_commands_is_shown_as_text(engine: Callable[..., Engine]) -> None:
    def script(connection: socket.socket, _: int) -> None:
        while heard(connection):
            connection.sendall(b"HTTP/1.1 404 \x1b[2J\x1b]0;owned\x07 gone\r\nContent-Length: 0\r\n\r\n")

    with Scripted(script) as origin, pytest.raises(NotFound) as refusal:
        engine().pull(f"{origin.url}/x")
    assert refusal.value.detail.isprintable()
    assert "gone" in refusal.value.detail


HOSTILE = ["\ud800", "a\x1b[2Jb", "\u202etxt.exe", "a\x00b", "x" * 1_000_000, ""]


def hostile_bodies(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and body of every write, with hostile text in one field that takes text."""
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if "requestBody" not in operation:
                continue
            asked = operation["requestBody"]["content"]["application/json"]["schema"]
            references = [kind["$ref"] for kind in asked.get("anyOf", [asked]) if "$ref" in kind]
            schema = schemas[references[0].rpartition("/")[2]]
            for key, field in schema["properties"].items():
                types = {kind.get("type") for kind in field.get("anyOf", [field])}
                for text in HOSTILE if types & {"string", "array"} else []:
                    value = [text] if "array" in types else text
                    yield (
                        method.upper(),
                        path.replace("{name}", "kept"),
                        {**schema["examples"][0], key: value},
                    )


def test_hostile_text_in_any_field_is_refused_or_shown_and_no_answer_breaks(
    alone: Callable[..., Ground],
) -> None:
    ground = alone()
    ground.have("kept")
    node = ground.node
    tried = list(hostile_bodies(node.ask("GET", "/openapi.json").document))
    assert {body_key for _, _, body in tried for body_key in body} > {"include", "holder", "hub_id", "name"}
    for method, path, body in tried:
        asked = {**body, "ref": ground.origin.url + "/x"} if body.get("ref", "").startswith("hf://") else body
        assert node.ask(method, path, asked).status < 500, (method, path, str(body)[:200])
    for life in ("this", "the next"):
        if life == "the next":
            node.stop()
            node.start()
        listed = node.ask("GET", "/v1/models")
        assert listed.status == 200
        assert all(str(model).isprintable() for model in listed.document["models"])
        assert node.cli("ls").stdout.replace("\n", "").isprintable()
        assert node.ready("kept").status == 200


@pytest.mark.parametrize(
    "patterns", [["x"] * 1001, ["x" * 1000] * 40, ["\ud800"], [""], ["x" * 1025]], ids=len
)
def test_patterns_that_could_not_be_kept_or_shown_are_refused(patterns: list[str]) -> None:
    for include, exclude in ((patterns, []), ([], patterns)):
        with pytest.raises(Invalid) as refusal:
            ModelSpec.asked("hf://org/model", "x", include, exclude)
        assert refusal.value.code == "bad_pattern"


def test_the_command_line_prints_strangers_text_through_one_filter() -> None:
    """Every line that the command line prints goes through `say` or a table, which filter it."""
    for file in (*(PROJECT / "cachd/terminal").glob("*.py"), *(PROJECT / "cachd/cli").glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        printed = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "print"]
        assert {*printed} <= ALLOWED_PRINTS, file


ALLOWED_PRINTS = {
    "print(_escaped(str(text)), flush=True)",
    "print(text, file=sys.stderr)",  # in `warn`, which escapes it
    "print(json.dumps(document, indent=1, default=str))",  # ASCII
    "print(json.dumps(document, indent=1, default=str), file=sys.stderr)",
    "print(json.dumps(document, default=str), flush=True)",
    "print(__version__)",
    "print(line, file=sys.stderr, flush=True)",
}


def test_what_a_hostile_daemon_answers_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say("a\x1b[2Jb\nc\x9b31m")
    terminal.show_table(("NAME",), [("\x1b]0;owned\x07",)])
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable()
    assert "a\\x1b[2Jb\nc" in shown
