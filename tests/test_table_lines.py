"""How a table is laid out, in a pipe and on terminals that are too narrow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.terminal.amounts import progress_text
from cachd.terminal.table import Cell, lines_of, text_of

HEADINGS = ("NAME", "STATE", "RATE", "USED BY", "REASON")
ROWS = (
    ("llama", Cell("failed", "red"), "-", "-", Cell("the ref is gated", "red")),
    ("qwen", "downloading", "8.0 MB/s", "pod/vllm-0, a pin", ""),
)


def table(width: int | None) -> list[str]:
    return [text_of(line).rstrip() for line in lines_of(HEADINGS, ROWS, width)]


def test_a_pipe_gets_every_column_of_a_row_on_one_line() -> None:
    assert table(None) == [
        "NAME   STATE        RATE      USED BY            REASON",
        "llama  failed       -         -                  the ref is gated",
        "qwen   downloading  8.0 MB/s  pod/vllm-0, a pin",
    ]
    assert table(70) == table(None)


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (
            50,
            [
                "NAME   STATE        RATE      USED BY",
                "llama  failed       -         -",
                "  the ref is gated",
                "qwen   downloading  8.0 MB/s  pod/vllm-0, a pin",
            ],
        ),
        (
            30,
            [
                "NAME   STATE        RATE",
                "llama  failed       -",
                "  the ref is gated",
                "qwen   downloading  8.0 MB/s",
                "  used by pod/vllm-0, a pin",
            ],
        ),
        (
            12,
            [
                "NAME",
                "llama",
                "  state failed",
                "  the ref is",
                "  gated",
                "qwen",
                "  state downloading",
                "  rate 8.0 MB/s",
                "  used by pod/vllm-0, a pin",
            ],
        ),
    ],
)
def test_columns_that_do_not_fit_stand_below_their_row(width: int, lines: list[str]) -> None:
    assert table(width) == lines


def test_a_column_without_a_value_goes_before_one_with_values() -> None:
    lines = [text_of(line) for line in lines_of(("NAME", "ETA", "STATE"), [("qwen", "-", "ready")], 12)]
    assert lines == ["NAME  STATE", "qwen  ready"]


def test_a_cell_keeps_its_style_wherever_it_stands() -> None:
    for width in (None, 50):
        cells = [cell for line in lines_of(HEADINGS, ROWS, width) for cell in line]
        assert {cell.text.strip() for cell in cells if cell.style == "red"} == {"failed", "the ref is gated"}


@given(
    st.lists(st.lists(st.sampled_from(["", "-", "one", "a word or two"]), min_size=3, max_size=3)),
    st.integers(1, 60),
)
def test_no_value_is_lost_at_any_width(rows: list[list[str]], width: int) -> None:
    shown = " ".join(text_of(line) for line in lines_of(("A", "B", "C"), rows, width)).split()
    for word in ("one", "word"):
        assert shown.count(word) == sum(cell.split().count(word) for row in rows for cell in row)


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (0, 2, "0/2 bytes"),
        (10_700_000, 63_000_000, "10.7/63.0 MB"),
        (900_000, 63_000_000, "0.9/63.0 MB"),
        (63_000_000, 63_000_000, "63.0/63.0 MB"),
        (0, 2_500, "0.0/2.5 kB"),
    ],
)
def test_progress_is_in_the_unit_of_its_total(done: int, total: int, text: str) -> None:
    assert progress_text(done, total) == text
