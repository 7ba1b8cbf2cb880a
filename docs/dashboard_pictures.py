"""Draws the dashboard of docs/monitoring.md: `python -m docs.dashboard_pictures`, about two minutes.

Two daemons pull for a minute while a Prometheus scrapes them every two seconds. The pictures are drawn
from the dashboard's own queries, by docs/drawing.py: no Grafana is needed. They differ from run to run.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

from docs.dashboard import selected
from docs.drawing import Series, drawn, finite, legend_of
from docs.panel import Panel, Row
from docs.panels import ROWS
from tests.ground.hub_client import get
from tests.ground.models import noise
from tests.ground.needs import NEEDS, lacking
from tests.ground.prometheus import JOB, Prometheus
from tests.ground.site import MIB, Ground
from tests.ground.watched import GPU_1, GPU_2, watched

PICTURES = Path(__file__).parent / "dashboard-pictures"
SECONDS = 45.0
MODELS = ("Qwen/Qwen2.5-7B-Instruct", "BAAI/bge-m3", "mistralai/Mistral-7B-Instruct-v0.3")
VALUES = {"$job": JOB, "$node": ".+", "$__rate_interval": "8s", "$__range": "3m"}


def renew() -> None:
    """Write the picture of each row. Raises SystemExit without a Prometheus."""
    if reason := lacking("prometheus"):
        raise SystemExit(f"{reason}: apt-get install {NEEDS['prometheus'].debian}")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place, watched(Path(place), GPU_1, GPU_2, every="2s") as found:
        _busy(found.grounds)
        ended = time.time()
        for row in ROWS:
            picture = drawn(
                row,
                lambda panel: series_of(panel, found.prometheus, ended),
                seconds=ended - found.prometheus.began,
            )
            picture_of(row).write_text(picture)


def picture_of(row: Row) -> Path:
    """The file of a row's picture."""
    return PICTURES / f"{row.title.lower().replace(' ', '-')}.svg"


def series_of(panel: Panel, prometheus: Prometheus, ended: float) -> list[Series]:
    """What a panel shows at the Unix time `ended`: all the time before for a graph, else the values then."""
    found = []
    for legend, query in panel.queries.items():
        asked = selected(query)
        for name, value in VALUES.items():
            asked = asked.replace(name, value)
        if panel.kind == "timeseries":
            answers = [(each["metric"], each["values"]) for each in prometheus.over_all(asked, until=ended)]
        else:
            answers = [(each["metric"], [each["value"]]) for each in prometheus.query(asked, at=ended)]
        for labels, values in answers:
            if points := finite(values, prometheus.began):
                found.append(Series(legend_of(legend, labels), labels, points))
    return found


def _busy(grounds: dict[str, Ground]) -> None:
    """Let each daemon pull for `SECONDS`, and leave a pull of each unfinished."""
    until = time.monotonic() + SECONDS
    hub = next(iter(grounds.values())).hub
    for number, repo in enumerate(MODELS):
        hub.add(repo, {"config.json": b"{}", "model.safetensors": noise((3 + 2 * number) * MIB, number)})
    workers = [
        threading.Thread(target=_pull, args=(ground, number, until))
        for number, ground in enumerate(grounds.values())
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _pull(ground: Ground, number: int, until: float) -> None:
    """Pull models one after another, at a rate of the node's own, and ask for each as all clients do."""
    node, turn = ground.node, 0
    node.ask("PUT", "/v1/limits", {"bytes_per_second": (3 - number) * MIB})
    for name in ("slow.bin", "held.bin"):
        node.ask("DELETE", f"/v1/models/{name}?force=true")
    while time.monotonic() < until:
        repo = MODELS[turn % len(MODELS)]
        name = repo.replace("/", "--")
        node.ask("DELETE", f"/v1/models/{name}?force=true")  # its bytes are fetched again
        for _ in range(2):
            node.pull(f"hf://{repo}")
        assert node.ready(name).status == 200
        assert get(node, f"/{repo}/resolve/main/model.safetensors").status == 200
        node.pull(f"hf://{repo}")
        turn += 1
    node.pull(ground.add("whisper.bin", 14 * MIB))
    node.ready("whisper.bin", wait=4)


if __name__ == "__main__":
    renew()
