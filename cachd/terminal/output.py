"""Prints lines, documents and tables. Text of strangers passes through one filter."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from cachd.errors import CachdError, printable
from cachd.terminal.table import Line, Row, lines_of, text_of, wrapped

if TYPE_CHECKING:
    from rich.text import Text

# Consoles and bars are imported where they are used: a command that prints one path needs none.
INTERRUPTED = "^C"  # the terminal writes it behind what is redrawn; at its edge, it would begin a new line
_INDENT = "  "


def show_error(error: CachdError) -> None:
    """Print the error's detail, hint, withheld facts and code on standard error."""
    warn(f"error: {error.detail}", style="red")
    if error.hint:
        warn(f"  hint: {error.hint}")
    # An error from the daemon has none. Those of this process may be shown: its user is the operator.
    for name, fact in error.withheld.items():
        warn(f"  {name}: {fact}")
    warn(f"  code: {error.code}")


def warn(line: str, style: str | None = None) -> None:
    """Print lines on standard error. On a terminal they have the style."""
    text, width = _escaped(line), _width_of(sys.stderr)
    if width is None:
        print(text, file=sys.stderr)
        return
    from rich.console import Console

    lines = [part for each in text.split("\n") for part in _fitting(each, width)]
    Console(stderr=True).print("\n".join(lines), style=style, markup=False, highlight=False, soft_wrap=True)


def say(text: object) -> None:
    """Print lines that may hold text of strangers. Control characters in them are escaped."""
    print(_escaped(str(text)), flush=True)


def say_beside(label: str, text: object, *, at: int = 0) -> None:
    """Print a label and what belongs to it. On a terminal, a long text goes on below its own beginning.

    `at`: how much stands on the line already.
    """
    indent, width = " " * (at + len(label)), _width_of(sys.stdout)
    plain = _escaped(str(text))
    first, *rest = [indent + plain] if width is None else wrapped(plain, width, indent, indent)
    say("\n".join([label + first.removeprefix(indent), *rest]))


def say_indented(text: str) -> None:
    """Print a line. On a terminal, what does not fit goes on below, indented."""
    width, plain = _width_of(sys.stdout), _escaped(text)
    say(plain if width is None else "\n".join(_fitting(plain, width)))


def _fitting(line: str, width: int) -> list[str]:
    """A line for people as lines that fit into a terminal; those that follow the first are indented more."""
    text = line.lstrip(" ")
    indent = " " * (len(line) - len(text))
    return wrapped(text, width, indent, indent + _INDENT)


def _escaped(text: str) -> str:
    """The lines of a text, with their control characters escaped."""
    return "\n".join(map(printable, text.split("\n")))


def show_json(document: object) -> None:
    """Print the document as JSON. What JSON lacks, such as a path, is printed as text."""
    print(json.dumps(document, indent=1, default=str))


def warn_json(document: object) -> None:
    """Print the document as JSON on standard error."""
    print(json.dumps(document, indent=1, default=str), file=sys.stderr)


def show_json_line(document: object) -> None:
    """Print the document as one line of JSON, at once."""
    print(json.dumps(document, default=str), flush=True)


def show_yaml(document: Mapping[str, Any]) -> None:
    """Print the document as YAML, at once."""
    import yaml

    plain = json.loads(json.dumps(document, default=str))
    say(yaml.safe_dump(plain, sort_keys=False, width=10_000).rstrip("\n"))


def show_yaml_part(document: Mapping[str, Any]) -> None:
    """Print the document as one of a stream of YAML documents."""
    say("---")
    show_yaml(document)


def show_facts(facts: Mapping[str, object]) -> None:
    """Print each fact on a line of its own, after its name."""
    width = max(map(len, facts))
    for name, fact in facts.items():
        say_beside(f"{name:<{width}}  ", fact)


def show_table(headings: Sequence[str], rows: Sequence[Row], *, none: str = "") -> None:
    """Print a table as kubectl does. On a terminal, its lines are not longer than the terminal is wide.

    `none`: what standard error says in place of the headings if there is no row.
    """
    if none and not rows:
        warn(none)
        return
    width = _width_of(sys.stdout)
    lines = lines_of(headings, rows, width)
    if width is None:
        say("\n".join(text_of(line).rstrip() for line in lines))
        return
    from rich.console import Console

    Console(highlight=False, markup=False).print(_styled(lines), soft_wrap=True)


@contextmanager
def redrawn() -> Iterator[Callable[[Sequence[str], Sequence[Row]], None]]:
    """Yields a function that draws a table in place of the one that it drew before."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def draw(headings: Sequence[str], rows: Sequence[Row]) -> None:
            lines = lines_of(headings, rows, console.width - len(INTERRUPTED))
            live.update(_styled(lines), refresh=True)

        yield draw


def _styled(lines: Sequence[Line]) -> Text:
    from rich.text import Text

    return Text("\n", no_wrap=True, overflow="ignore").join(
        Text.assemble(*((cell.text, cell.style) for cell in line)) for line in lines
    )


def _width_of(stream: TextIO) -> int | None:
    """How many columns the terminal has that shows a stream; None if none does."""
    return shutil.get_terminal_size().columns if stream.isatty() else None
