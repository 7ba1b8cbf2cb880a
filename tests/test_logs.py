"""The log of a process as its options say: its levels, its forms, and the lines of libraries."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from structlog.contextvars import bound_contextvars

from cachd.daemon.logs import configure_logs
from cachd.report.events import EventLog

LEVELS = ["debug", "info", "warning", "error"]


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    before, handlers = structlog.get_config(), logging.root.handlers[:]
    yield
    structlog.configure(**before)
    logging.root.handlers[:] = handlers


def said() -> None:
    """Log a line of each level."""
    log = structlog.get_logger("of cachd")
    for level in LEVELS:
        getattr(log, level)(f"at {level}", empty="", none=None, number=0, listed=[])


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize("least", LEVELS)
@pytest.mark.parametrize("with_events", [False, True])
def test_the_log_has_what_is_of_its_level_or_above_and_events_have_the_rest(
    capsys: pytest.CaptureFixture[str], least: str, *, with_events: bool
) -> None:
    seen: list[str] = []

    class Events(EventLog):
        def __call__(self, logger: object, method: str, entry: Any) -> Any:
            seen.append(method)
            return super().__call__(logger, method, entry)

    configure_logs(least, "json", Events() if with_events else None)
    said()
    assert [each["level"] for each in lines(capsys)] == LEVELS[LEVELS.index(least) :]
    heard = LEVELS[min(LEVELS.index(least), 1) :]
    assert seen == (heard if with_events else [])


def test_a_line_of_json_has_its_time_and_all_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("error", "json")
    with bound_contextvars(who="team"):
        said()
    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "at error",
        "level": "error",
        "empty": "",
        "none": None,
        "number": 0,
        "listed": [],
        "who": "team",
    }


def test_a_line_of_text_is_for_people_and_leaves_out_what_is_empty(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("error", "text")
    said()
    text = capsys.readouterr().err
    assert "at error" in text
    assert "number" in text
    assert not any(word in text for word in ("empty", "none", "listed", "{"))


def test_an_exception_is_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    try:
        raise ZeroDivisionError("of a test")
    except ZeroDivisionError:
        structlog.get_logger().exception("it failed")
    (line,) = lines(capsys)
    assert "ZeroDivisionError: of a test" in line["exception"]


def test_without_a_form_a_terminal_gets_text_and_anything_else_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logs("error", "auto")
    said()
    assert lines(capsys)[0]["event"] == "at error"
    leader, terminal = os.openpty()
    with os.fdopen(leader, "rb", buffering=0) as shown, os.fdopen(terminal, "w", buffering=1) as errors:
        monkeypatch.setattr(sys, "stderr", errors)
        for form, is_text in (("auto", True), ("text", True), ("json", False)):
            configure_logs("error", form)
            said()
            assert (b"{" not in shown.read(4096)) is is_text


@pytest.mark.parametrize("form", ["json", "text"])
def test_warnings_of_libraries_have_the_form_of_all_lines(
    capsys: pytest.CaptureFixture[str], form: str
) -> None:
    logging.root.addHandler(logging.NullHandler())
    configure_logs("error", form)
    assert len(logging.root.handlers) == 1, "the handlers of before are gone"
    library = logging.getLogger("a.library")
    library.info("not important")
    library.warning("%s is odd", "it")
    text = capsys.readouterr().err
    assert "not important" not in text
    if form == "json":
        line = json.loads(text)
        assert (line["event"], line["level"], "timestamp" in line) == ("it is odd", "warning", True)
    else:
        assert "it is odd" in text
        assert "warning" in text
        assert "{" not in text
