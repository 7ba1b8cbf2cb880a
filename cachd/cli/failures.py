"""Reports how a command failed: as lines for people, or as JSON where the command was asked for JSON."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import typer

from cachd import terminal
from cachd.cli.exits import exit_code
from cachd.errors import CachdError, Invalid


def report(error: CachdError) -> int:
    """Print the error on standard error. Returns the exit code."""
    status = exit_code(error)
    if wants_json(sys.argv[1:]):
        terminal.warn_json({**error.as_document(), "exit_code": status})
    else:
        terminal.show_error(error)
    return status


def report_usage(error: typer.TyperException) -> int:
    """Print what is wrong with the command line. Returns the exit code."""
    if wants_json(sys.argv[1:]):
        return report(Invalid(error.format_message(), code="usage", hint="see --help"))
    from typer.rich_utils import rich_format_error

    rich_format_error(error)  # type: ignore[arg-type]  # typer passes its own errors to it, too
    return error.exit_code


def wants_json(words: Sequence[str]) -> bool:
    """Whether a command line has `-o json`. It may be too wrong to be parsed."""
    own = words[: words.index("--")] if "--" in words else words
    pairs = itertools.pairwise(own)
    return any(word in ("-ojson", "--output=json") for word in own) or any(
        word in ("-o", "--output") and value == "json" for word, value in pairs
    )
