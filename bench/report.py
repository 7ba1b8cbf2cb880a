"""How results are kept and shown: JSON with every raw run, tables, plots."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.measure import Run, machine, spread

RESULTS = Path(__file__).parent / "results"
GB = 1e9
MB = 1e6


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of a question: `runs` of each way and bytes of its one file or of its model.

    None is the question's own choice; `quick` makes that small, for a look at whether everything runs.
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
    return statistics.median(run[figure] for run in row["runs"])


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
    made = Table(*columns, title=title, title_justify="left")
    for line in cells:
        made.add_row(*line)
    return made


def markdown(columns: Iterable[str], cells: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    drawn = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in drawn) + "\n"


def bars(path: Path, panels: Mapping[str, Mapping[str, list[float]]], unit: str) -> None:
    """Horizontal bars, one panel below the other: medians, with least and most as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    heights = [max(1, len(values)) for values in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(10, 0.8 + 0.28 * sum(heights) + 0.7 * len(panels)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, values) in zip(axes[:, 0], panels.items(), strict=True):
        for place, (name, runs) in enumerate(values.items()):
            middle = statistics.median(runs)
            color = (
                "tab:orange" if name.startswith("cachd") else "tab:gray" if "limit" in name else "tab:blue"
            )
            axis.barh(place, middle, color=color)
            axis.plot([min(runs), max(runs)], [place, place], color="black", linewidth=1)
        axis.set_yticks(range(len(values)), values)
        axis.invert_yaxis()
        axis.set_title(title, loc="right")  # there is more room to the left, above the names
        axis.set_xlabel(unit)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def keep(question: str, results: Mapping[str, Any], into: Path = RESULTS) -> None:
    into.mkdir(exist_ok=True, parents=True)
    (into / f"{question}.json").write_text(json.dumps(results, separators=(",", ":")) + "\n")
