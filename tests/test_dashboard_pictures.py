"""The pictures of the dashboard: drawn of series, panel by panel, and those of the page are complete."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from docs.dashboard import GRID_WIDTH, placed
from docs.dashboard_pictures import PICTURES, picture_of
from docs.drawing import CELL_WIDTH, Series, drawn, finite, legend_of, shown
from docs.panel import Kind, Panel, Row
from docs.panels import ROWS

SVG = "{http://www.w3.org/2000/svg}"
LINES = [
    Series(
        "gpu-1 <a>", {"instance": "gpu-1", "alertname": "CachdAway"}, [(0.0, 0.0), (30.0, 2e6), (60.0, 1e6)]
    ),
    Series("gpu-2", {"alertname": "CachdNoSpace"}, [(0.0, 5e5), (60.0, 5e5)]),
]


def words(picture: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(picture).iter(f"{SVG}text")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_a_picture_of_the_page_has_each_panel_with_data(row: Row) -> None:
    picture = picture_of(row).read_text()
    found = words(picture)
    assert [panel.title for panel in row.panels if panel.title not in found] == [], "draw it anew"
    empty = sum(word == "no data" for word in found)
    assert empty <= sum(bool(panel.maybe_empty) for panel in row.panels)
    assert not re.search(r"/tmp/|/home/|/root/|nan|inf\b", picture)
    assert len(picture) < 200_000


def test_each_picture_is_that_of_a_row() -> None:
    assert sorted(PICTURES.glob("*")) == sorted(picture_of(row) for row in ROWS)


@pytest.mark.parametrize("kind", ["stat", "timeseries", "bargauge", "table"])
def test_a_panel_of_each_kind_is_drawn_within_its_frame(kind: Kind) -> None:
    panel = Panel(
        "It", "It.", kind, "Bps", {"{{instance}}": "x"}, width=12, steps=((0, "green"), (9e5, "red"))
    )
    row = Row("Row", (panel, panel))
    picture = drawn(row, lambda _: LINES, seconds=60.0)
    root = ElementTree.fromstring(picture)
    assert picture == drawn(row, lambda _: LINES, seconds=60.0)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.attrib["x"]) <= width
        assert 0 <= float(element.attrib["y"]) <= height
    for points in re.findall(r'd="M([^"H]+)"', picture):
        for x, y in (map(float, point.split()) for point in re.split("[LM]", points)):
            assert 0 <= x <= width
            assert 0 <= y <= height
    assert ("CachdAway" if kind == "table" else "1 MB/s") in words(picture)
    assert kind in ("table", "timeseries") or "#e02f44" in picture, "the last value is above the step"


def test_a_panel_without_series_says_so() -> None:
    row = Row("Row", (Panel("It", "It.", "stat", "s", {"It": "x"}),))
    assert words(drawn(row, lambda _: [], seconds=1.0)) == ["It", "no data"]


def test_panels_have_the_places_of_the_dashboard() -> None:
    for row in ROWS:
        found = [left + panel.width for panel, left, _ in placed(row)]
        assert max(found) <= GRID_WIDTH
        frames = drawn(row, lambda _: [], seconds=1.0).count('<rect class="panel"')
        assert frames == len(row.panels)
    assert CELL_WIDTH * GRID_WIDTH == 1104


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.5, "percentunit", "50 %"),
        (94_400_000, "decbytes", "94.4 MB"),
        (1.9e12, "Bps", "1.9 TB/s"),
        (0, "Bps", "0 B/s"),
        (0.25, "s", "0.25 s"),
        (90, "s", "1.5 min"),
        (172_800, "s", "2 d"),
        (3, "short", "3"),
        (1.5, "reqps", "1.5 req/s"),
    ],
)
def test_a_value_has_its_unit(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_a_legend_has_the_values_of_labels_and_points_are_numbers() -> None:
    assert legend_of("{{instance}} {{model}}!", {"instance": "gpu-1"}) == "gpu-1 !"
    assert finite([(11.0, "NaN"), (12.0, "4"), (13.0, "+Inf")], 10.0) == [(2.0, 4.0)]
