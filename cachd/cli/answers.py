"""Prints the answer of a command in the form that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cachd import terminal
from cachd.cli.arguments import Output


def show(document: Mapping[str, Any], output: Output, text: Callable[[], object]) -> None:
    """Print a document as JSON or as its name alone, or else let `text` print it for people."""
    if output is Output.json:
        terminal.show_json(document)
    elif output is Output.name and "name" in document:
        terminal.say(document["name"])
    else:
        text()


def file_or_directory(model: Mapping[str, Any]) -> str:
    """The path to give to an engine: the model's only file, else its directory."""
    return str(model["file"] or model["path"])
