"""The Grafana dashboard: it is what the script makes, and a real Prometheus answers each of its queries."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import yaml

from cachd.metrics import table
from docs.dashboard import DASHBOARD, GRID_WIDTH, dashboard, described
from docs.panel import Panel
from docs.panels import ROWS
from tests.ground.needs import needs, require
from tests.ground.prometheus import JOB, RULES, Prometheus, QueryRefused
from tests.ground.watched import GPU_1, watched

DOCUMENT: dict[str, Any] = json.loads(DASHBOARD.read_text())
PANELS: dict[str, Panel] = {panel.title: panel for row in ROWS for panel in row.panels}
DRAWN: dict[str, Any] = {each["title"]: each for each in DOCUMENT["panels"] if each["type"] != "row"}
ALERTS = {
    rule["alert"]: rule["expr"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
}
VARIABLES = {
    "$job": JOB,
    "$node": f"({GPU_1}|other)",
    "$__rate_interval": "8s",
    "$__range": "1m",
}


def asked(drawn: dict[str, Any]) -> list[str]:
    """The queries of a panel of the file, with values for the variables."""
    queries = []
    for target in drawn["targets"]:
        query = target["expr"]
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        assert "$" not in query
        queries.append(query)
    return queries


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped a daemon before, while and after that did all that panels show."""
    require("prometheus")
    with ExitStack() as stack:
        yield stack.enter_context(watched(tmp_path_factory.mktemp("watched"), GPU_1)).prometheus


def test_the_file_is_what_the_script_makes() -> None:
    assert DASHBOARD.read_text() == dashboard(), "run: make manifests"


def test_grafana_can_import_it_anywhere() -> None:
    assert DOCUMENT["uid"] == "cachd"
    assert DOCUMENT["schemaVersion"] <= 38, "Grafana 10.0 has 38, and migrates older ones"
    assert not DOCUMENT.keys() & {"id", "__inputs", "__requires"}
    assert [each["name"] for each in DOCUMENT["templating"]["list"]] == ["datasource", "job", "node"]
    sources = [each.get("datasource") for each in (*DRAWN.values(), *DOCUMENT["templating"]["list"][1:])]
    targets = [target["datasource"] for drawn in DRAWN.values() for target in drawn["targets"]]
    assert all(each == {"type": "prometheus", "uid": "${datasource}"} for each in sources + targets)


def test_no_panel_lies_over_another() -> None:
    cells = [
        (x, y)
        for at in (each["gridPos"] for each in DOCUMENT["panels"])
        for x, y in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < GRID_WIDTH
    numbers = [each["id"] for each in DOCUMENT["panels"]]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("title", PANELS)
def test_a_panel_says_what_it_shows_in_which_unit(title: str) -> None:
    panel, drawn = PANELS[title], DRAWN[title]
    assert drawn["description"] == described(panel)
    assert panel.text.endswith(".")
    assert drawn["fieldConfig"]["defaults"]["unit"]
    assert all(target["legendFormat"] or panel.kind == "table" for target in drawn["targets"])
    assert not panel.alert or panel.alert in ALERTS
    for query in panel.queries.values():
        for metric in re.findall(r"\bcachd_\w+", query):
            assert re.sub(r"_(bucket|sum|count)$", "", metric) in {name for name, _ in table()}


def test_every_alert_has_a_panel() -> None:
    assert {panel.alert for panel in PANELS.values() if panel.alert} == set(ALERTS) - WITHOUT_PANEL


# One panel shows both reasons of the disk, under the alert that is more frequent. The signals of a node are
# off by default; the list of alerts shows this one.
WITHOUT_PANEL = {"CachdDiskFailing", "CachdNodeSignalsOutdated"}


@needs("prometheus")
@pytest.mark.parametrize("title", DRAWN)
def test_prometheus_answers_every_query_of_a_panel_with_data(prometheus: Prometheus, title: str) -> None:
    for query in asked(DRAWN[title]):
        figures = [float(value) for each in prometheus.over_all(query) for _, value in each["values"]]
        has_data = any(math.isfinite(figure) for figure in figures)
        assert has_data or PANELS[title].maybe_empty, f"no data: {query}"


@needs("prometheus")
@pytest.mark.parametrize("alert", ALERTS)
def test_prometheus_evaluates_an_alert(prometheus: Prometheus, alert: str) -> None:
    prometheus.query(ALERTS[alert])
    (rule,) = (rule for rule in prometheus.rules() if rule["name"] == alert)
    assert rule["health"] == "ok", rule.get("lastError")


@needs("prometheus")
def test_a_wrong_query_is_refused(prometheus: Prometheus) -> None:
    with pytest.raises(QueryRefused, match="parse error"):
        prometheus.query("sum(")


@needs("prometheus")
def test_the_variables_choose_nodes(prometheus: Prometheus) -> None:
    (query,) = asked(DRAWN["Leases"])
    (found,) = prometheus.query(query)
    assert found["metric"]["instance"] == GPU_1
    assert prometheus.query(query.replace(GPU_1, "gpu-9")) == []
