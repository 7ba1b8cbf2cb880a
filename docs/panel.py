"""What a panel of the Grafana dashboard is, and the queries that many panels need.

Queries name metrics without job and node; docs/dashboard.py adds the selectors of the dashboard's variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["stat", "timeseries", "bargauge", "table"]
Steps = tuple[tuple[float, str], ...]

GREEN, YELLOW, RED = "green", "yellow", "red"
NONE_IS_GOOD: Steps = ((0, GREEN), (1, RED))
SOME_IS_ODD: Steps = ((0, GREEN), (1, YELLOW))
ONE_IS_GOOD: Steps = ((0, RED), (1, GREEN))


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel. `queries`: by legend, in which {{label}} is the value of a label.

    `unit` is one of Grafana's. `steps`: from which value on which colour. `alert`: the alert whose threshold
    they are. `most`: the end of the scale. `maybe_empty`: why Prometheus may have no data on a healthy node.
    """

    title: str
    text: str
    kind: Kind
    unit: str
    queries: Mapping[str, str]
    width: int = 8
    height: int = 7
    steps: Steps = ()
    alert: str = ""
    is_stacked: bool = False
    most: float | None = None
    maybe_empty: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def stat(title: str, text: str, unit: str, query: str, steps: Steps = (), alert: str = "") -> Panel:
    """One figure over all nodes that are chosen."""
    return Panel(title, text, "stat", unit, {title: query}, width=4, height=4, steps=steps, alert=alert)


def per_node(title: str, text: str, unit: str, query: str, steps: Steps, alert: str) -> Panel:
    """One figure of each node."""
    legend = {"{{instance}}": query}
    return Panel(title, text, "stat", unit, legend, width=4, height=5, steps=steps, alert=alert)


def rate(metric: str, *by: str) -> str:
    """A counter for each second, by labels."""
    return f"sum by ({', '.join(by)}) (rate({metric}[$__rate_interval]))"


def increase(metric: str, *by: str) -> str:
    """What a counter grew by in each interval of a graph, by labels."""
    return f"sum by ({', '.join(by)}) (increase({metric}[$__rate_interval]))"


def quantile(q: float, histogram: str, *by: str) -> str:
    """Below which value a part `q` of what a histogram observed was, by labels."""
    return f"histogram_quantile({q}, {increase(f'{histogram}_bucket', 'le', *by)})"


def top(query: str) -> str:
    """The 20 series that are highest."""
    return f"topk(20, {query})"
