"""How results are kept and shown: JSON with every single run, tables, one plot."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rich.table import Table

from bench.measure import Run, machine, spread

RESULTS = Path(__file__).parent / "results"
GB = 1e9
MB = 1e6


@dataclass(frozen=True, slots=True)
class Options:
    """How large a measurement is: the `runs` of each way, and the bytes of its file or model.

    None leaves the choice to the question. `quick` makes everything small, to see whether it runs.
    """

    runs: int | None = None
    size_bytes: int | None = None
    quick: bool = False


def head(question: str, options: Options, **facts: object) -> dict[str, Any]:
    """What the results of every question begin with."""
    return {
        "question": question,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "quick": options.quick,
        **facts,
    }


def row(name: str, form: str, runs: Iterable[Run], note: str | None = None) -> dict[str, Any]:
    """One line of a comparison; without runs `note` says why."""
    short = note.strip().splitlines()[-1][:120] if note else None
    return {"name": name, "form": form, "note": short, "runs": [asdict(run) for run in runs]}


def find(rows: Iterable[Mapping[str, Any]], name: str, form: str) -> Mapping[str, Any] | None:
    """The line with this name and form, if it was measured."""
    return next((r for r in rows if r["name"] == name and r["form"] == form and r["runs"]), None)


def median(row: Mapping[str, Any], figure: str = "seconds") -> float:
    """The median of a figure over the runs of a row."""
    return float(statistics.median(run[figure] for run in row["runs"]))


LINES = ("", "form", "GB/s", "CPU s/GB", "memory, MB", "time against cachd's")


def lines(rows: Iterable[Mapping[str, Any]], size_bytes: int, ours: str = "cachd") -> list[list[str]]:
    """The cells below `LINES`; the time is compared with that of `ours` in the same form."""
    rows = list(rows)
    return [
        [row["name"], row["form"], *_figures(row, find(rows, ours, row["form"]), size_bytes)] for row in rows
    ]


def _figures(row: Mapping[str, Any], ours: Mapping[str, Any] | None, size_bytes: int) -> list[str]:
    if not row["runs"]:
        return [row["note"] or "not measured", "", "", ""]
    runs = row["runs"]
    memory = max(run["anonymous_bytes"] for run in runs) / MB
    return [
        spread(size_bytes / run["seconds"] / GB for run in runs),
        spread(run["cpu_seconds"] / size_bytes * GB for run in runs),
        f"{memory:.0f}",
        f"{median(row) / median(ours):.2f} x" if ours else "",
    ]


def heading(text: str) -> str:
    """With a capital, and the units as they are."""
    return text[0].upper() + text[1:]


def table(title: str, columns: Iterable[str], cells: Iterable[Iterable[str]]) -> Table:
    """A table for the terminal."""
    made = Table(*columns, title=title, title_justify="left")
    for line in cells:
        made.add_row(*line)
    return made


def markdown(columns: Iterable[str], cells: Iterable[Iterable[str]]) -> str:
    """The same table for a page."""
    columns = list(columns)
    drawn = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in drawn) + "\n"


def bars(title: str, values: Mapping[str, float], unit: str) -> str:
    """Horizontal bars as an SVG that is readable on light and dark pages; cachd's own bars stand out."""
    most, height = max(values.values()), 26 * len(values) + 44
    rows = []
    for place, (name, value) in enumerate(values.items()):
        top, length = 40 + 26 * place, 420 * value / most
        kind = "own" if name.startswith("cachd") else "other"
        rows.append(
            f'<text x="190" y="{top + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="{kind}" x="200" y="{top}" width="{length:.1f}" height="18" rx="3"/>'
            f'<text x="{206 + length:.1f}" y="{top + 14}">{value:.2f}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {height}" font-family="sans-serif" '
        f'font-size="14" role="img">\n<title>{escape(title)}</title>\n<style>'
        "text{fill:#1f2328}.own{fill:#d9730d}.other{fill:#8c959f}@media(prefers-color-scheme:dark){text{fill:#e6edf3}.other{fill:#6e7681}}</style>\n"
        f'<text x="200" y="24" font-weight="bold">{escape(title)}, {escape(unit)}</text>\n'
        + "\n".join(rows)
        + "\n</svg>\n"
    )


def keep(question: str, results: Mapping[str, Any], into: Path = RESULTS) -> None:
    """Write the results of one question as JSON."""
    into.mkdir(exist_ok=True, parents=True)
    (into / f"{question}.json").write_text(json.dumps(results, separators=(",", ":")) + "\n")
