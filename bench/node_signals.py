"""How often many nodes write to one Kubernetes API server, to show which models they have.

    python -m bench.node_signals [--nodes 1000] [--minutes 60] [--models 10]

The API server and its etcd are real (tests/ground/kube.py). The nodes are objects in it, each with the
signals of a daemon: labels and the condition. Their clock is simulated: a step is five seconds, and takes as
long as the calls that the nodes make in it. The phases:

    start    every node starts with its models, within two minutes
    steady   nothing changes
    added    a required model is added everywhere, and arrives within five to ten minutes

`--plot FILE` draws the writes of a node in an hour.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from bench import report
from cachd.cluster.api_server import ApiServer
from cachd.cluster.pace import Pace
from cachd.cluster.signals import NodeSignals, Seen, Switches, Watched
from cachd.metrics import Metrics
from cachd.report.events import EventLog
from cachd.report.values import ModelState
from cachd.sources.kubernetes_place import Place
from tests.ground.kube import Kube

STEP_SECONDS = 5.0
START_SECONDS = 120.0
COLUMNS = (
    *("phase", "writes a node", "writes a node and hour", "reads a node and hour"),
    *("busiest minute, writes/s", "ms a call"),
)
DOWNLOAD_SECONDS = (300.0, 600.0)


@dataclass
class Clock:
    """Seconds since the start, which only the benchmark moves."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Counted(ApiServer):
    """Calls to the API server, counted over all nodes."""

    reads = writes = 0

    def get(self, path: str) -> object:
        Counted.reads += 1
        return super().get(path)

    def patch(self, *arguments: object) -> None:
        Counted.writes += 1
        super().patch(*arguments)  # type: ignore[arg-type]


@dataclass
class FakeNode:
    """A node with models, as its daemon sees them. `starts` and `has_new`: at which time."""

    name: str
    models: int
    clock: Clock
    starts: float
    added: float = float("inf")
    has_new: float = float("inf")
    required: frozenset[str] = field(default=frozenset({"model-0"}))

    def seen(self) -> Seen:
        states = {f"model-{number}": ModelState.ready for number in range(self.models)}
        if self.clock() < self.added:
            return Seen(states, self.required, is_configuration_right=True)
        states["new"] = ModelState.ready if self.clock() >= self.has_new else ModelState.downloading
        return Seen(states, self.required | {"new"}, is_configuration_right=True)


@dataclass(frozen=True)
class Phase:
    """What happened in a phase."""

    name: str
    seconds: float
    reads: int
    writes: int
    busiest: int  # writes in the busiest minute
    took: float

    def row(self, nodes: int) -> list[str]:
        per_hour = 3600 / self.seconds / nodes
        return [
            self.name,
            f"{self.writes / nodes:.2f}",
            f"{self.writes * per_hour:.2f}",
            f"{self.reads * per_hour:.2f}",
            f"{self.busiest / 60:.1f}",
            f"{1000 * self.took / max(1, self.reads + self.writes):.0f}",
        ]


class Fleet:
    """The nodes and their signals, at one API server."""

    def __init__(self, kube: Kube, nodes: int, models: int) -> None:
        self.clock, chance = Clock(), random.Random(7)
        token = kube.directory / "token"
        token.write_text(kube.admin_token)
        place = Place(kube.url, token, kube.pem)
        self.nodes: list[FakeNode] = []
        self.signals: list[NodeSignals] = []
        for number in range(nodes):
            node = FakeNode(f"node-{number}", models, self.clock, chance.uniform(0, START_SECONDS))
            kube.add_node(node.name)
            switches = Switches(node.name, labels=True, max_labels=50, condition=True)
            signals = NodeSignals(
                switches,
                Counted(place, seconds=60.0),
                Watched(node.seen, EventLog(most=1)),
                Metrics(),
                pace=Pace(chance=chance.random),
                monotonic=self.clock,
                now=lambda: 1_800_000_000 + self.clock.now,
            )
            self.nodes.append(node)
            self.signals.append(signals)
        self._chance = chance

    def add_model(self) -> None:
        for node in self.nodes:
            node.added = self.clock.now
            node.has_new = self.clock.now + self._chance.uniform(*DOWNLOAD_SECONDS)

    def run(self, name: str, seconds: float) -> Phase:
        reads, writes, began = Counted.reads, Counted.writes, time.monotonic()
        busiest, minute, end = 0, Counted.writes, self.clock.now + seconds
        while self.clock.now < end:
            for node, signals in zip(self.nodes, self.signals, strict=True):
                if self.clock.now >= node.starts:
                    signals._tick()
            self.clock.now += STEP_SECONDS
            if self.clock.now % 60 < STEP_SECONDS:
                busiest, minute = max(busiest, Counted.writes - minute), Counted.writes
        took = time.monotonic() - began
        return Phase(name, seconds, Counted.reads - reads, Counted.writes - writes, busiest, took)


def phases(fleet: Fleet, minutes: int) -> Iterator[Phase]:
    """Each phase, as it ends."""
    yield fleet.run("start", START_SECONDS + 60)
    yield fleet.run("steady", 60.0 * minutes)
    fleet.add_model()
    yield fleet.run("added", 60.0 * minutes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.node_signals")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--minutes", type=int, default=60, help="of the phases `steady` and `added`")
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory() as directory, Kube(Path(directory)) as kube:
        fleet = Fleet(kube, asked.nodes, asked.models)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        found = []
        for phase in phases(fleet, asked.minutes):
            found.append(phase)
            print(f"| {' | '.join(phase.row(asked.nodes))} |", flush=True)
    if asked.plot:
        shown = {"nothing changes": found[1], "a model is added": found[2]}
        values = {name: 3600 * each.writes / each.seconds / asked.nodes for name, each in shown.items()}
        asked.plot.write_text(report.bars(f"Writes of each of {asked.nodes:,} nodes", values, "in an hour"))


if __name__ == "__main__":
    main()
