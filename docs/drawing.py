"""Draws a row of the dashboard as SVG: graphs, bars, figures and tables of what Prometheus answered."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from docs.dashboard import GRID_WIDTH, placed
from docs.panel import GREEN, RED, YELLOW, Panel, Row

CELL_WIDTH, CELL_HEIGHT = 46, 30  # pixels of a cell of the grid
_GAP, _LEFT, _TOP, _LINE = 6, 72, 30, 15
_MOST_LINES, _GAP_SECONDS = 5, 5.0
_COLOURS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0")
_NAMED = {GREEN: "#56a64b", YELLOW: "#e0b400", RED: "#e02f44"}
_STYLE = (
    "text{fill:#1f2328}.faint{fill:#656d76}.panel{fill:#f6f8fa;stroke:#d0d7de}.grid{stroke:#d0d7de}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.faint{fill:#8b949e}"
    ".panel{fill:#161b22;stroke:#30363d}.grid{stroke:#30363d}}"
)
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_TIMES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


@dataclass(frozen=True, slots=True)
class Series:
    """What one line of a panel shows: its legend, its labels, and (seconds since the start, value)."""

    legend: str
    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> float:
        """The last value."""
        return self.points[-1][1]


@dataclass(frozen=True, slots=True)
class Box:
    """Where a panel is, in pixels, and how many seconds its graph spans."""

    x: float
    y: float
    width: float
    height: float
    seconds: float


def legend_of(legend: str, labels: Mapping[str, str]) -> str:
    """A legend with the values of its labels."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend)


def shown(value: float, unit: str) -> str:
    """A value as Grafana writes it in this unit."""
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit in ("decbytes", "Bps"):
        size, name = next(((value / step, name) for step, name in _SIZES if value >= step), (value, "B"))
        return f"{size:.3g} {name}{'/s' if unit == 'Bps' else ''}"
    if unit == "s":
        time, name = next(((value / step, name) for step, name in _TIMES if value >= step), (value, "s"))
        return f"{time:.3g} {name}"
    return f"{value:.3g}{' req/s' if unit == 'reqps' else ''}"


def drawn(row: Row, found: Callable[[Panel], Sequence[Series]], *, seconds: float) -> str:
    """A row as SVG. `found`: the series of a panel; `seconds`: how long it was watched."""
    parts, height = [], 0
    for panel, left, top in placed(row):
        box = Box(
            left * CELL_WIDTH + _GAP / 2,
            top * CELL_HEIGHT + _GAP / 2,
            panel.width * CELL_WIDTH - _GAP,
            panel.height * CELL_HEIGHT - _GAP,
            seconds,
        )
        parts.append(_panel(panel, box, found(panel)))
        height = max(height, (top + panel.height) * CELL_HEIGHT)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {GRID_WIDTH * CELL_WIDTH} {height}" '
        f'font-family="sans-serif" font-size="11" role="img">\n<title>{escape(row.title)}</title>\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(panel: Panel, box: Box, series: Sequence[Series]) -> str:
    frame = (
        f'<rect class="panel" x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="3"/>'
        + _text(box.x + 8, box.y + 18, panel.title, 'font-weight="bold"')
    )
    if not series:
        return frame + _text(box.x + 8, box.y + 40, "no data", 'class="faint"')
    return frame + "".join(_KINDS[panel.kind](panel, box, series))


def _graph(panel: Panel, box: Box, series: Sequence[Series]) -> Iterable[str]:
    """Lines, each with its last value in the legend; those that are highest come first."""
    series = sorted(series, key=lambda each: -max(value for _, value in each.points))
    lines = _stacked(series) if panel.is_stacked else [each.points for each in series]
    named = min(len(series), _MOST_LINES)
    height = box.height - _TOP - 8 - _LINE * named
    highest = max(value for line in lines for _, value in line) or 1.0
    base = box.y + _TOP + height
    for part in (0.0, 0.5, 1.0):
        y = base - height * part
        yield f'<path class="grid" d="M{box.x + _LEFT} {y:.1f}H{box.x + box.width - 8}"/>'
        tick = shown(highest * part, panel.unit)
        yield _text(box.x + _LEFT - 5, y + 4, tick, 'class="faint" text-anchor="end"')
    across = (box.width - _LEFT - 8) / box.seconds
    for number, (each, line) in reversed(list(enumerate(zip(series, lines, strict=True)))):
        path, before = "", -math.inf
        for at, value in line:
            x, y = box.x + _LEFT + at * across, base - height * value / highest
            path += f"{'M' if at - before > _GAP_SECONDS else 'L'}{x:.1f} {y:.1f}"
            before = at
        colour = _COLOURS[number % len(_COLOURS)]
        yield f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        if number < named:
            y = base + _LINE * (number + 1)
            yield f'<rect x="{box.x + 8}" y="{y - 5:.1f}" width="10" height="3" fill="{colour}"/>'
            yield _text(box.x + 24, y, each.legend, "")
            yield _text(box.x + box.width - 8, y, shown(each.last, panel.unit), 'text-anchor="end"')


def _stacked(series: Sequence[Series]) -> list[Sequence[tuple[float, float]]]:
    """The lines of series that lie on top of each other."""
    below = defaultdict[float, float](float)
    lines: list[Sequence[tuple[float, float]]] = []
    for each in series:
        for at, value in each.points:
            below[at] += value
        lines.append([(at, below[at]) for at, _ in each.points])
    return lines


def _bars(panel: Panel, box: Box, series: Sequence[Series]) -> Iterable[str]:
    series = sorted(series, key=lambda each: -each.last)[:_MOST_LINES]
    most = panel.most or max(each.last for each in series) or 1.0
    for number, each in enumerate(series):
        y = box.y + _TOP + 2 + 34 * number
        width = (box.width - 90) * min(each.last / most, 1.0)
        yield _text(box.x + 8, y + 10, each.legend, 'class="faint"')
        colour = _colour(panel, each.last)
        yield f'<rect x="{box.x + 8}" y="{y + 14}" width="{width:.1f}" height="12" fill="{colour}"/>'
        yield _text(box.x + box.width - 8, y + 24, shown(each.last, panel.unit), 'text-anchor="end"')


def _figures(panel: Panel, box: Box, series: Sequence[Series]) -> Iterable[str]:
    series = series[:3]
    for number, each in enumerate(series):
        y = box.y + _TOP + (box.height - _TOP) * (number + 0.5) / len(series) + 5
        size = 30 if len(series) == 1 else 17
        style = f'font-size="{size}" style="fill:{_colour(panel, each.last)}" text-anchor="middle"'
        if len(panel.queries) == 1 and each.legend != panel.title:
            yield _text(box.x + 8, y, each.legend, 'class="faint"')
        yield _text(box.x + box.width / 2, y, shown(each.last, panel.unit), style)


def _table(_: Panel, box: Box, series: Sequence[Series]) -> Iterable[str]:
    columns = ("alertname", "instance", "severity")
    heads = dict(zip(columns, columns, strict=True))
    for number, row in enumerate([heads, *(each.labels for each in series)]):
        for place, column in enumerate(columns):
            y = box.y + _TOP + 14 + 20 * number
            kind = "" if number else 'class="faint"'
            yield _text(box.x + 8 + place * box.width / len(columns), y, row.get(column, ""), kind)


_KINDS = {"timeseries": _graph, "bargauge": _bars, "stat": _figures, "table": _table}


def _colour(panel: Panel, value: float) -> str:
    """That of the highest step which the value has reached."""
    reached = [colour for place, (least, colour) in enumerate(panel.steps) if not place or value >= least]
    return _NAMED[reached[-1] if reached else GREEN]


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def finite(points: Iterable[tuple[float, str]], began: float) -> list[tuple[float, float]]:
    """The points that are numbers, with their seconds since `began`."""
    return [(at - began, float(value)) for at, value in points if math.isfinite(float(value))]
