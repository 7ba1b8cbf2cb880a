"""Lays out a table as lines: no borders, upper-case headings, one row for each thing.

Where the lines would be too long for a terminal, the columns that do not fit stand below each row:

    NAME   STATE   SIZE           NAME, STATE and SIZE fit
    llama  failed  16 GB
      eta 3m02s  used by a pin    other columns on one line, those without a value left out
      the ref is gated (gated)    the last column on lines of its own
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from cachd.errors import printable

_GAP = _INDENT = "  "
_NO_BREAK = "\N{NO-BREAK SPACE}"


class Cell(NamedTuple):
    """A cell of a table that is shown in a style on a terminal."""

    text: str
    style: str = ""


Row = Sequence[str | Cell]
Line = list[Cell]  # what stands on one line, from left to right


def lines_of(headings: Sequence[str], rows: Sequence[Row], width: int | None = None) -> list[Line]:
    """The lines of a table, of at most `width` columns unless a word is longer; None is no limit."""
    table = [[Cell(heading) for heading in headings], *(list(map(_printable, row)) for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    beside, below = _placed(table, widths, width)
    lines: list[Line] = []
    for number, row in enumerate(table):
        lines.append(_beside([(row[at], widths[at]) for at in beside]))
        if number and width is not None:
            lines += _below(headings, row, below, width)
    return lines


def text_of(line: Line) -> str:
    """A line without its styles."""
    return "".join(cell.text for cell in line)


def wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """The text in lines of `width` columns, which begin with `first` and `rest`. No word is broken."""
    words = textwrap.TextWrapper(
        width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return words.wrap(text) or [first]


def _printable(cell: str | Cell) -> Cell:
    text, style = cell if isinstance(cell, Cell) else (cell, "")
    return Cell(printable(str(text)), style)


def _width(cell: Cell) -> int:
    from rich.cells import cell_len

    return cell_len(cell.text)


def _is_empty(cell: Cell) -> bool:
    return cell.text in ("", "-")


def _placed(
    table: Sequence[Sequence[Cell]], widths: Sequence[int], width: int | None
) -> tuple[list[int], list[int]]:
    """The columns that stand beside each other, and those that stand below the first ones."""
    every = list(range(len(widths)))

    def fits(columns: Sequence[int]) -> bool:
        return width is None or sum(widths[at] + len(_GAP) for at in columns) - len(_GAP) <= width

    if fits(every):
        return every, []
    beside = [at for at in every if at == 0 or not all(_is_empty(row[at]) for row in table[1:])]
    below: list[int] = []
    while not fits(beside) and len(beside) > 1:
        below.insert(0, beside.pop())
    return beside, below


def _beside(cells: Sequence[tuple[Cell, int]]) -> Line:
    *others, (last, _) = cells
    padded = [cell._replace(text=cell.text + " " * (width - _width(cell)) + _GAP) for cell, width in others]
    return [*padded, last]


def _below(headings: Sequence[str], row: Sequence[Cell], columns: Sequence[int], width: int) -> list[Line]:
    """What stands below a row: all columns but the table's last on one line, each after its heading."""
    last = len(headings) - 1
    named = [
        f"{headings[at].lower()} {row[at].text}" for at in columns if at != last and not _is_empty(row[at])
    ]
    # A line may end between two columns, but neither after a heading nor within a value.
    texts = [Cell(_GAP.join(each.replace(" ", _NO_BREAK) for each in named))] if named else []
    if last in columns and not _is_empty(row[last]):
        texts.append(row[last])
    return [
        [cell._replace(text=line.replace(_NO_BREAK, " "))]
        for cell in texts
        for line in wrapped(cell.text, width, _INDENT, _INDENT)
    ]
