"""Bandwidth limits: what is received against what is allowed, and what each of two equal pulls gets of it.

A local nginx, to memory. What a daemon's pulls have received is read twice over its API, a few seconds apart;
the limit is set over the API too, before the pull or in its middle. A limit that the machine does not reach
without one shows nothing, and is not judged.
"""

from __future__ import annotations

import statistics
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
MOST_BYTES = 1000e6  # received while it is measured: a machine has more bandwidth than memory
SETTLED_SECONDS = 2.0  # a pull that comes later has its streams by then
MARGIN_SECONDS = 0.5
ALLOWED = 0.05
REACHED = 1.1  # of a limit, without it: else the machine is what limits
UNLIMITED = "what comes at four times the limit"


def run(options: Options) -> dict[str, Any]:
    """Every case at every rate, `runs` times and one before them that is not counted."""
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
                UNLIMITED: bed.unlimited,
                "one pull, limit of all": bed.one_pull,
                "one pull, limit of its source": bed.one_pull_by_source,
                "two pulls, limit of all": bed.two_pulls,
                "changed in mid-pull": bed.changed,
                "half of it, for the second of two equal pulls": bed.share,
            }
            ratios: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(runs + 1):  # the first touches memory that is slow then
                for name, way in ways.items():
                    ratio = way()
                    if turn:
                        ratios[name].append(ratio)
            results["cases"] += [
                {"rate": bed.rate, "name": name, "ratios": measured} for name, measured in ratios.items()
            ]
    return results


class Bed:
    """A daemon and an origin, for limits of `rate` bytes a second."""

    def __init__(self, node: Node, url: str, web: Path, rate: int) -> None:
        self.rate = rate
        self._node, self._url, self._web = node, url, web
        self._seconds = min(SECONDS, MOST_BYTES / rate)

    def unlimited(self) -> float:
        """Against four times the limit."""
        short = self._seconds / 4
        with self._pulling("a", lasting=4 * short, bytes_per_second=4 * self.rate):
            return sum(self._received("a", seconds=short)) / self.rate

    def one_pull(self) -> float:
        with self._pulling("a", lasting=self._seconds, bytes_per_second=self.rate):
            return sum(self._received("a")) / self.rate

    def one_pull_by_source(self) -> float:
        with self._pulling("a", lasting=self._seconds, sources={"http": self.rate}):
            return sum(self._received("a")) / self.rate

    def two_pulls(self) -> float:
        with self._pulling("a", "b", lasting=self._seconds, bytes_per_second=self.rate):
            return sum(self._received("a", "b")) / self.rate

    def changed(self) -> float:
        """From a quarter of the rate."""
        with self._pulling("a", lasting=1.25 * self._seconds, bytes_per_second=self.rate // 4):
            self._received("a")
            self._limit(bytes_per_second=self.rate)
            return sum(self._received("a")) / self.rate

    def share(self) -> float:
        """What the second gets of its half, once it has its streams."""
        settled = min(SETTLED_SECONDS, self._seconds)
        with self._pulling("a", "b", lasting=settled + self._seconds, bytes_per_second=self.rate):
            time.sleep(settled)
            first, second = self._received("a", "b")
            return 2 * second / (first + second)

    def _received(self, *names: str, seconds: float = 0.0) -> list[float]:
        """Bytes a second of each pull from now on."""
        began, before = time.perf_counter(), [self._fetched(name) for name in names]
        time.sleep(seconds or self._seconds)
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
    def _pulling(self, *names: str, lasting: float, **limits: object) -> Iterator[None]:
        """Pulls that have received something and would last so long; cancelled and freed afterwards."""
        self._limit(**limits)
        try:
            for name in names:
                with (self._web / name).open("wb") as file:  # holes: no memory, and nobody looks at them
                    file.truncate(int(self.rate * (lasting + MARGIN_SECONDS)) // MIB * MIB)
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


def judged(results: dict[str, Any], case: dict[str, Any]) -> bool:
    """Whether the machine would have received more than the limit."""
    free = next(c for c in results["cases"] if (c["rate"], c["name"]) == (case["rate"], UNLIMITED))
    return case is not free and statistics.median(free["ratios"]) >= REACHED


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The named figure that the goals are judged by: how far the worst median is off."""
    medians = [statistics.median(c["ratios"]) for c in results["cases"] if judged(results, c)]
    return {"off at most": max(abs(ratio - 1) for ratio in medians)} if medians else {}


LINES = ("limit, MB/s", "", "received / allowed", f"within {ALLOWED:.0%}")


def cells(results: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{case['rate'] / MB:.0f}",
            case["name"],
            spread(case["ratios"], digits=3),
            verdict(case) if judged(results, case) else "-",
        ]
        for case in results["cases"]
    ]


def verdict(case: dict[str, Any]) -> str:
    return "yes" if abs(statistics.median(case["ratios"]) - 1) <= ALLOWED else "no"


def table(results: dict[str, Any]) -> Table:
    return report.table("bandwidth limits", LINES, cells(results))


def markdown(results: dict[str, Any]) -> str:
    return report.markdown(LINES, cells(results))


def plot(results: dict[str, Any], path: Path) -> None:
    panels: dict[str, dict[str, list[float]]] = {}
    for case in results["cases"]:
        if case["name"] == UNLIMITED:
            continue
        panels.setdefault(f"limit of {case['rate'] / MB:.0f} MB/s", {})[f"cachd, {case['name']}"] = case[
            "ratios"
        ]
    report.bars(path, panels, "received / allowed")
