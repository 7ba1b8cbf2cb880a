"""Makes the Grafana dashboard, daemonset/monitoring/dashboard.json, of docs/panels.py: `make manifests`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.panel import Panel, Row
from docs.panels import ROWS

DASHBOARD = Path(__file__).parent.parent / "daemonset/monitoring/dashboard.json"
SCHEMA_VERSION = 38  # that of Grafana 10.0; newer ones migrate it
GRID_WIDTH = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SERIES = re.compile(r"\b(cachd_\w+|up|ALERTS)\b(\{)?")


def selected(query: str) -> str:
    """A query with the selectors of the variables `job` and `node` at each series."""

    def with_selectors(found: re.Match[str]) -> str:
        selectors = 'job=~"$job", instance=~"$node"'
        return f"{found[1]}{{{selectors}" + (", " if found[2] else "}")

    return _SERIES.sub(with_selectors, query)


def dashboard() -> str:
    """The file as it should be."""
    document = {
        "annotations": {"list": []},
        "description": "Models of the nodes that run cachd: pulls, disk, verification, alerts.",
        "editable": True,
        "graphTooltip": 1,
        "links": [],
        "panels": list(_panels()),
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": ["cachd"],
        "templating": {"list": _variables()},
        "time": {"from": "now-6h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": "cachd",
        "uid": "cachd",
        "version": 1,
        "weekStart": "",
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return [
        {
            **source,
            "current": {},
            "hide": 0,
            "includeAll": False,
            "multi": False,
            "options": [],
            "refresh": 1,
        },
        _labels("job", "Job", "label_values(cachd_build_info, job)"),
        _labels("node", "Node", 'label_values(cachd_build_info{job=~"$job"}, instance)'),
    ]


def _labels(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable whose values are those of a label during the time range."""
    return {
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "datasource": _SOURCE,
        "definition": query,
        "hide": 0,
        "includeAll": True,
        "label": label,
        "multi": True,
        "name": name,
        "options": [],
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "regex": "",
        "sort": 1,
        "type": "query",
    }


def placed(row: Row) -> Iterator[tuple[Panel, int, int]]:
    """Each panel of a row, with its left and its top cell: from left to right, then from top to bottom."""
    left = top = height = 0
    for panel in row.panels:
        if left + panel.width > GRID_WIDTH:
            top, left, height = top + height, 0, 0
        yield panel, left, top
        left, height = left + panel.width, max(height, panel.height)


def _panels() -> Iterator[dict[str, Any]]:
    """The heading and the panels of each row."""
    number = top = 0
    for row in ROWS:
        number += 1
        place = {"h": 1, "w": GRID_WIDTH, "x": 0, "y": top}
        heading = {"id": number, "title": row.title, "gridPos": place}
        yield {"type": "row", "collapsed": False, "panels": [], **heading}
        begin = top = top + 1
        for panel, left, below in placed(row):
            number += 1
            place = {"h": panel.height, "w": panel.width, "x": left, "y": begin + below}
            yield {"id": number, "gridPos": place, **_drawn(panel)}
            top = max(top, begin + below + panel.height)


def _drawn(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": described(panel),
        "datasource": _SOURCE,
        "targets": [
            _target(panel, chr(ord("A") + place), *each) for place, each in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
        **_TABLE.get(panel.kind, {}),
    }


def described(panel: Panel) -> str:
    """What a panel shows, why it may be empty, and its alert."""
    parts = [panel.text]
    if panel.maybe_empty:
        parts.append(f"Empty while {panel.maybe_empty}.")
    if panel.alert:
        parts.append(f"Alert: {panel.alert}.")
    return " ".join(parts)


def _target(panel: Panel, letter: str, legend: str, query: str) -> dict[str, Any]:
    is_range = panel.kind == "timeseries"
    return {
        "refId": letter,
        "datasource": _SOURCE,
        "editorMode": "code",
        "expr": selected(query),
        "format": "table" if panel.kind == "table" else "time_series",
        "instant": not is_range,
        "range": is_range,
        "legendFormat": legend,
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"color": colour, "value": value if place else None}
        for place, (value, colour) in enumerate(panel.steps or ((0, "green"),))
    ]
    shown: dict[str, Any] = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.kind in ("timeseries", "bargauge"):
        shown["min"] = 0
    if panel.most is not None:
        shown["max"] = panel.most
    if panel.kind == "timeseries":
        shown["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 25 if panel.is_stacked else 5,
            "lineWidth": 1,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"group": "A", "mode": "normal" if panel.is_stacked else "none"},
            "thresholdsStyle": {"mode": "line" if panel.steps else "off"},
        }
    return shown


_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "stat": {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": _LAST,
        "textMode": "auto",
    },
    "timeseries": {
        "legend": {
            "calcs": ["lastNotNull", "max"],
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "bargauge": {
        "displayMode": "basic",
        "minVizHeight": 10,
        "minVizWidth": 0,
        "orientation": "horizontal",
        "reduceOptions": _LAST,
        "showUnfilled": True,
        "valueMode": "color",
    },
    "table": {"cellHeight": "sm", "footer": {"show": False}, "showHeader": True},
}
_HIDDEN = ("Time", "Value", "__name__", "alertstate", "job")
_TABLE: dict[str, dict[str, Any]] = {
    "table": {
        "transformations": [
            {"id": "organize", "options": {"excludeByName": dict.fromkeys(_HIDDEN, True)}},
        ]
    }
}


if __name__ == "__main__":
    DASHBOARD.write_text(dashboard())
