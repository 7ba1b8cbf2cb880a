"""Bandwidth limits: what is received against what is allowed, and what each of two equal pulls gets of it.

A local nginx, to memory. What a daemon's pulls have received is read twice over its API, a few seconds apart;
the limit is set over the API too, before the pull or in its middle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.measure import MIB, Failed, daemon, serving, sink, spread
from bench.report import MB, Options
from tests.ground.node import Node

RATES_MB = (10, 50, 200, 1000)
QUICK_RATES_MB = (50,)
RUNS = 3
SECONDS = 3.0
MOST_BYTES = 1500e6  # received while it is measured: memory is what there is of it
SETTLED_SECONDS = 2.0  # a pull that comes later has its streams by then
ALLOWED = 0.05


def run(options: Options) -> dict[str, Any]:
    """Every case at every rate, `runs` times."""
    runs = options.runs or (1 if options.quick else RUNS)
    results = report.head("bandwidth", options, runs=runs, cases=[])
    with (
        sink("memory") as web,
        sink("memory") as place,
        serving(web) as nginx,
        daemon(place / "cache") as node,
    ):
        for rate in QUICK_RATES_MB if options.quick else RATES_MB:
            bed = Bed(node, nginx.url, web, int(rate * MB))
            ways: dict[str, Callable[[], float]] = {
                "one pull, limit of all": bed.one_pull,
                "one pull, limit of its source": bed.one_pull_by_source,
                "two pulls, limit of all": bed.two_pulls,
                "changed in mid-pull": bed.changed,
                "half of it, for the second of two equal pulls": bed.share,
            }
            ratios: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(runs):
                for name, way in ways.items():
                    ratios[name].append(way())
            results["cases"] += [
                {"rate": bed.rate, "name": name, "ratios": measured} for name, measured in ratios.items()
            ]
    return results


class Bed:
    """A daemon and an origin; files are as long as a measurement at `rate` bytes a second may need."""

    def __init__(self, node: Node, url: str, web: Path, rate: int) -> None:
        self.rate = rate
        self._node, self._url, self._web = node, url, web
        self._seconds = min(SECONDS, MOST_BYTES / rate)

    def one_pull(self) -> float:
        with self._pulling("a", bytes_per_second=self.rate):
            return sum(self._received("a")) / self.rate

    def one_pull_by_source(self) -> float:
        with self._pulling("a", sources={"http": self.rate}):
            return sum(self._received("a")) / self.rate

    def two_pulls(self) -> float:
        with self._pulling("a", "b", bytes_per_second=self.rate):
            return sum(self._received("a", "b")) / self.rate

    def changed(self) -> float:
        """From a quarter of the rate."""
        with self._pulling("a", bytes_per_second=self.rate // 4):
            self._received("a")
            self._limit(bytes_per_second=self.rate)
            return sum(self._received("a")) / self.rate

    def share(self) -> float:
        """What the second gets of its half, once it has its streams."""
        with self._pulling("a", "b", bytes_per_second=self.rate):
            time.sleep(SETTLED_SECONDS)
            first, second = self._received("a", "b")
            return 2 * second / (first + second)

    def _received(self, *names: str) -> list[float]:
        """Bytes a second of each pull from now on."""
        began, before = time.perf_counter(), [self._fetched(name) for name in names]
        time.sleep(self._seconds)
        ended, after = time.perf_counter(), [self._fetched(name) for name in names]
        if any(self._node.ready(name, wait=0).status == 200 for name in names):
            raise Failed("a pull ended while it was measured")
        return [(late - early) / (ended - began) for early, late in zip(before, after, strict=True)]

    def _fetched(self, name: str) -> int:
        pull = self._node.ask("GET", f"/v1/models/{name}").document["pull"]
        return int(pull["bytes"]["fetched"])

    def _limit(self, **limits: object) -> None:
        if self._node.ask("PUT", "/v1/limits", limits).status != 200:
            raise Failed(f"the limit {limits} is refused")

    @contextmanager
    def _pulling(self, *names: str, **limits: object) -> Iterator[None]:
        """Pulls that run, and have received something, under these limits; cancelled and freed afterwards."""
        self._limit(**limits)
        try:
            for name in names:
                with (self._web / name).open("wb") as file:  # holes: no memory, and nobody looks at them
                    file.truncate(int(self.rate * (2 * self._seconds + 2 * SETTLED_SECONDS)) // MIB * MIB)
                self._node.pull(f"{self._url}/{name}")
                self._wait_for_bytes(name)
            yield
        finally:
            self._limit()
            for name in names:
                self._node.ask("DELETE", f"/v1/models/{name}?force=true")

    def _wait_for_bytes(self, name: str) -> None:
        while not self._fetched(name):
            time.sleep(0.01)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The named figure that the goals are judged by: the farthest that any run was off."""
    off = [abs(ratio - 1) for case in results["cases"] for ratio in case["ratios"]]
    return {"off at most": max(off)} if off else {}


LINES = ("limit, MB/s", "", "received / allowed", f"within {ALLOWED:.0%}")


def cells(results: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{case['rate'] / MB:.0f}",
            case["name"],
            spread(case["ratios"], digits=3),
            "yes" if all(abs(ratio - 1) <= ALLOWED for ratio in case["ratios"]) else "no",
        ]
        for case in results["cases"]
    ]


def table(results: dict[str, Any]) -> Table:
    return report.table("bandwidth limits", LINES, cells(results))


def markdown(results: dict[str, Any]) -> str:
    return report.markdown(LINES, cells(results))


def plot(results: dict[str, Any], path: Path) -> None:
    panels: dict[str, dict[str, list[float]]] = {}
    for case in results["cases"]:
        panels.setdefault(f"limit of {case['rate'] / MB:.0f} MB/s", {})[f"cachd, {case['name']}"] = case[
            "ratios"
        ]
    report.bars(path, panels, "received / allowed")
