"""Prints the answer of a command in the form that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cachd import terminal
from cachd.cli.arguments import Output


def show(document: Mapping[str, Any], output: Output, text: Callable[[], object]) -> None:
    """Print a document as JSON, as YAML or as its name alone, or else let `text` print it for people."""
    if output is Output.json:
        terminal.show_json(document)
    elif output is Output.yaml:
        terminal.show_yaml(document)
    elif output is Output.name and "name" in document:
        terminal.say(document["name"])
    else:
        text()


def show_next(document: Mapping[str, Any], output: Output, *, name: str, line: Callable[[], str]) -> None:
    """Print one document of several that come one after the other: as JSON or YAML, its name or its line."""
    if output is Output.json:
        terminal.show_json_line(document)
    elif output is Output.yaml:
        terminal.show_yaml_part(document)
    else:
        terminal.say(name if output is Output.name else line())


def note(output: Output, text: str) -> None:
    """Print a line for people on standard error. A script that asked for JSON, YAML or names gets none."""
    if output in (Output.text, Output.wide):
        terminal.warn(text)
