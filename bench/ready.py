"""How late an answer to a readiness probe is, idle and while a pull takes every core.

500 probes a second come on time, whatever the answers do (bench/probes.py). Their control is an nginx that
answers 204 under the same load: it shows how late the machine and the probes themselves are. The load is a
model of 8 shards that is pulled again and again, verified, from nginx to memory.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy
from rich.table import Table

from bench import report
from bench.measure import (
    GIB,
    MIB,
    PROJECT,
    Failed,
    available_bytes,
    daemon,
    random_file,
    serving,
    sink,
    spread,
)
from bench.report import GB, Options
from tests.ground.nginx import Nginx
from tests.ground.node import Node

RATE = 500
SECONDS, QUICK_SECONDS = 5.0, 0.5
SIZE, QUICK_SIZE = 2 * GIB, 32 * MIB
SHARDS = 8
RUNS = 7
PERCENTILES = (50.0, 99.0, 100.0)
IDLE, MODEL = "idle", f"a pull of {SHARDS} shards"
READY, CONTROL = ASKED = "cachd, /ready", "nginx, 204"
SMALL = "ready"


def run(options: Options) -> dict[str, Any]:
    """Each load with each answerer in turn, `runs` times, and once before that is not counted."""
    runs = options.runs or (1 if options.quick else RUNS)
    size = options.size_bytes or (QUICK_SIZE if options.quick else min(SIZE, available_bytes() // 4))
    seconds = QUICK_SECONDS if options.quick else SECONDS
    results = report.head("ready", options, rate=RATE, seconds=seconds, size_bytes=size, runs=runs)
    with ExitStack() as undo:
        web, place = (undo.enter_context(sink("memory")) for _ in range(2))
        lay_out(web, size)
        nginx, control = undo.enter_context(serving(web)), undo.enter_context(serving(web))
        bed = Bed(undo.enter_context(daemon(place / "cache")), nginx, control)
        bed.node.pull(bed.small)
        bed.node.ready(SMALL)
        cases: list[dict[str, Any]] = [
            {"load": load, "name": name, "runs": []} for load in (IDLE, MODEL) for name in ASKED
        ]
        order = random.Random(1)
        for turn in range(runs + 1):
            for case in order.sample(cases, len(cases)):
                measured = probed(bed, case["name"], seconds, loaded=case["load"] != IDLE)
                if turn:
                    case["runs"].append(measured)
        results["cases"] = cases
    return results


@dataclass(frozen=True, slots=True)
class Bed:
    """A daemon, the origin it pulls from, and another nginx to be probed."""

    node: Node
    origin: Nginx
    control: Nginx

    @property
    def small(self) -> str:
        """The ref of a model that is ready all the time."""
        return f"{self.origin.url}/{SMALL}"

    def probed_at(self, name: str) -> str:
        """The URL that an answerer is probed at."""
        return f"{self.node.url}/v1/models/{SMALL}/ready" if name == READY else f"{self.control.url}/.barrier"


def lay_out(web: Path, size: int) -> None:
    """The files to serve: a small one, and the shards of the load with their checksums."""
    random_file(web / SMALL, MIB)
    (web / "model").mkdir()
    shards = [f"model-{number:05}-of-{SHARDS:05}.safetensors" for number in range(1, SHARDS + 1)]
    sums = "".join(f"{random_file(web / 'model' / name, size // SHARDS)}  {name}\n" for name in shards)
    (web / "model/SHA256SUMS").write_text(sums)


def probed(bed: Bed, name: str, seconds: float, *, loaded: bool) -> dict[str, Any]:
    """Percentiles of the latency in milliseconds; what was received meanwhile."""
    where = urlsplit(bed.probed_at(name))
    words = (sys.executable, "-m", "bench.probes", where.port, where.path, RATE, seconds)
    with pulling(bed) if loaded else ExitStack():
        before, began = bed.node.metric("cachd_download_bytes_total"), time.perf_counter()
        asked = subprocess.run([str(word) for word in words], cwd=PROJECT, capture_output=True, text=True)
        took = time.perf_counter() - began
        received = bed.node.metric("cachd_download_bytes_total") - before
    if asked.returncode:
        raise Failed(f"probes of {name}: {asked.stderr.strip()[-2000:]}")
    return {
        "milliseconds": percentiles(json.loads(asked.stdout)),
        "bytes_per_second": received / took,
    }


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    """Each of PERCENTILES, by its number as text."""
    return dict(zip(map(str, PERCENTILES), numpy.percentile(milliseconds, PERCENTILES), strict=True))


@contextmanager
def pulling(bed: Bed) -> Iterator[None]:
    """The same model pulled and deleted all the time; the first bytes have come when the block begins."""
    over = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            while not over.is_set():
                bed.node.pull(f"{bed.origin.url}/model/", name="load")
                while not over.is_set() and bed.node.ready("load", wait=0.5).status != 200:
                    pass
                deleted = bed.node.ask("DELETE", "/v1/models/load")
                if deleted.status >= 400:
                    raise Failed(f"the load cannot be deleted: {deleted.document}")
        except Exception as error:  # noqa: BLE001 - told when the block ends
            failures.append(error)

    before = bed.node.metric("cachd_download_bytes_total")
    puller = threading.Thread(target=work)
    puller.start()
    try:
        while puller.is_alive() and bed.node.metric("cachd_download_bytes_total") == before:
            time.sleep(0.01)
        yield
    finally:
        over.set()
        puller.join()
    if failures:
        raise Failed(f"the load ended: {failures[0]!r}")


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The median of each run's 99th percentile, under load."""
    return {
        f"{shown} p99 ms, saturated": float(numpy.median(percentile(case, 99.0)))
        for shown, name in (("ready", READY), ("control", CONTROL))
        for case in results["cases"]
        if case["load"] != IDLE and case["name"] == name
    }


def percentile(case: dict[str, Any], which: float) -> list[float]:
    """One percentile of each run."""
    return [measured["milliseconds"][str(which)] for measured in case["runs"]]


LINES = ("while", "asked", "p50, ms", "p99", "most", "GB/s meanwhile")


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The cells below `LINES`."""
    return [
        [
            case["load"],
            case["name"],
            *(spread(percentile(case, which), digits=1) for which in PERCENTILES),
            spread(r["bytes_per_second"] / GB for r in case["runs"]) if case["load"] != IDLE else "",
        ]
        for case in results["cases"]
    ]


def title(results: dict[str, Any]) -> str:
    """How it was measured."""
    return f"{RATE} probes a second for {results['seconds']:g} s"


def table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    return report.table(title(results), LINES, cells(results))


def markdown(results: dict[str, Any]) -> str:
    """For the page."""
    return f"**{title(results)}**\n\n{report.markdown(LINES, cells(results))}"
