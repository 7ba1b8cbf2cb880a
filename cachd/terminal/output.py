"""Prints lines, documents and tables. Text of strangers passes through one filter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from cachd.errors import CachdError, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Consoles, tables and bars are imported where they are used: a command that prints one path needs none.
_PADDING, _LEAST_WIDTH = 2, 24  # columns: between cells, and of the last cell


class Cell(NamedTuple):
    """A cell of a table that is shown in a style on a terminal."""

    text: str
    style: str


Row = Sequence[str | Cell]


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
    text = _escaped(line)
    if not sys.stderr.isatty():
        print(text, file=sys.stderr)
        return
    from rich.console import Console

    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def say(text: object) -> None:
    """Print lines that may hold text of strangers. Control characters in them are escaped."""
    print(_escaped(str(text)), flush=True)


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


def show_table(headings: Sequence[str], rows: Sequence[Row]) -> None:
    """Print a table as kubectl does: no borders, upper-case headings, one row for each thing.

    Only the last column may be broken into several lines, and only on a terminal.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    _fit(console, headings, rows)
    table = table_of(headings, rows)
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    say("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show_table_or(nothing: str, headings: Sequence[str], rows: Sequence[Row]) -> None:
    """Print a table; without rows, say on standard error that there is nothing."""
    if rows:
        show_table(headings, rows)
    else:
        warn(nothing)


def table_of(headings: Sequence[str], rows: Sequence[Row]) -> Table:
    """The table that `show_table` prints."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=number < len(headings) - 1, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(text)), style=style) for text, style in map(_styled, row)))
    return table


def _fit(console: Console, headings: Sequence[str], rows: Sequence[Row]) -> None:
    """Make a console as wide as the table needs: in a pipe for all columns, on a terminal for all but one."""
    from rich.cells import cell_len

    texts = [headings, *([_styled(cell)[0] for cell in row] for row in rows)]
    widths = [max(cell_len(printable(text)) for text in column) for column in zip(*texts, strict=True)]
    if console.is_terminal:
        widths[-1] = min(widths[-1], _LEAST_WIDTH)
    needed = sum(widths) + _PADDING * len(widths)
    console.width = max(console.width, needed) if console.is_terminal else needed


def _styled(cell: str | Cell) -> tuple[str, str]:
    return cell if isinstance(cell, Cell) else (cell, "")


@contextmanager
def redrawn() -> Iterator[Callable[[Sequence[str], Sequence[Row]], None]]:
    """Yields a function that draws a table in place of the one that it drew before."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda headings, rows: live.update(table_of(headings, rows), refresh=True)
