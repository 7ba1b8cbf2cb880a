"""Warm: what a second pull takes, and how late /ready is, idle and while pulls take every core.

500 probes a second come on time whatever the answers do (bench/probes.py). Their control is an nginx that
says 204 under the same load: what it shows is the machine's and the probes' own. Beside either a real-time
thread sleeps until the same moments: where that wakes late, the whole machine stood still, as a virtual one
does whose host holds it to a quota. A load is the same pull over and over, verified, from nginx to memory;
`busy` is the share of all cores that had work meanwhile.
"""

from __future__ import annotations

import json
import math
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
from rich.console import Group

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
SECONDS, QUICK_SECONDS = 6.0, 0.5
SIZE, QUICK_SIZE = 4 * GIB, 64 * MIB
SHARDS = 8
RUNS = 7
LEAST_ON_TIME, LONGEST = 3, 3  # runs; times as many as asked for
AGAIN, QUICK_AGAIN = 200, 5
AGAIN_BY_COMMAND, QUICK_AGAIN_BY_COMMAND = 5, 1
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 100.0)
IDLE, FILE, MODEL = "idle", "a pull of one file", f"a pull of {SHARDS} shards"
READY, CONTROL = ASKED = "cachd, /ready", "nginx, 204"
MOST_STILL_MS = 25.0  # of a machine that an answer can be on time on
SMALL = "ready"


def run(options: Options) -> dict[str, Any]:
    """Every load with each answerer in turn, `runs` times and once before that is not counted.

    A case in which the machine was seldom on time goes on, to LONGEST times as many runs.
    """
    runs = options.runs or (1 if options.quick else RUNS)
    size = options.size_bytes or (QUICK_SIZE if options.quick else min(SIZE, available_bytes() // 4))
    seconds = QUICK_SECONDS if options.quick else SECONDS
    results = report.head("warm", options, rate=RATE, seconds=seconds, size_bytes=size, runs=runs, cases=[])
    with ExitStack() as undo:
        web, place = (undo.enter_context(sink("memory")) for _ in range(2))
        loads = laid_out(web, size)
        nginx, control = undo.enter_context(serving(web)), undo.enter_context(serving(web))
        node = undo.enter_context(daemon(place / "cache"))
        bed = Bed(node, nginx, control)
        results["second"] = second_pulls(bed, quick=options.quick)
        cases = [{"load": load, "name": name, "runs": []} for load in (IDLE, *loads) for name in ASKED]
        order, least = random.Random(1), min(runs, LEAST_ON_TIME)
        for turn in range(LONGEST * runs + 1):
            for case in order.sample(cases, len(cases)):
                if turn > runs and len(on_time(case, MOST_STILL_MS)) >= least:
                    continue
                measured = probed(bed, case["name"], loads.get(case["load"]), seconds)
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
        return f"{self.node.url}/v1/models/{SMALL}/ready" if name == READY else f"{self.control.url}/.barrier"


def laid_out(web: Path, size: int) -> dict[str, str]:
    """Files to serve; the paths with their digests that make up each load."""
    random_file(web / SMALL, MIB)
    (web / "model").mkdir()
    shards = [f"model-{number:05}-of-{SHARDS:05}.safetensors" for number in range(1, SHARDS + 1)]
    sums = "".join(f"{random_file(web / 'model' / name, size // 2 // SHARDS)}  {name}\n" for name in shards)
    (web / "model/SHA256SUMS").write_text(sums)
    return {FILE: f"/file.bin#sha256={random_file(web / 'file.bin', size)}", MODEL: "/model/"}


def second_pulls(bed: Bed, *, quick: bool) -> dict[str, Any]:
    """Milliseconds of asking again for what is ready, and the requests to the origin that it took."""
    bed.node.pull(bed.small)
    bed.node.ready(SMALL)
    before = len(bed.origin.requests())
    asked = [clocked(lambda: bed.node.pull(bed.small)) for _ in range(QUICK_AGAIN if quick else AGAIN)]
    times = QUICK_AGAIN_BY_COMMAND if quick else AGAIN_BY_COMMAND
    by_command = [clocked(lambda: bed.node.cli("pull", bed.small, "--name", SMALL)) for _ in range(times)]
    requests = len(bed.origin.requests()) - before
    return {"POST /v1/models": asked, "cachd pull REF": by_command, "requests": requests}


def clocked(ask: Any) -> float:
    began = time.perf_counter()
    answer = ask()
    took = 1000 * (time.perf_counter() - began)
    if getattr(answer, "status", 200) != 200 or getattr(answer, "returncode", 0):
        raise Failed(f"what is ready is not: {answer}")
    return took


def probed(bed: Bed, name: str, load: str | None, seconds: float) -> dict[str, Any]:
    """Percentiles of the latency in milliseconds; what was received and how busy the cores were meanwhile."""
    where = urlsplit(bed.probed_at(name))
    with pulling(bed, load) if load else ExitStack():
        before, busy, began = bed.node.metric("cachd_download_bytes_total"), cores(), time.perf_counter()
        asking = [probing(port, where.path, seconds) for port in (where.port, 0)]
        told = [process.communicate() for process in asking]
        took = time.perf_counter() - began
        received, after = bed.node.metric("cachd_download_bytes_total") - before, cores()
    for process, (_, said) in zip(asking, told, strict=True):
        if process.returncode:
            raise Failed(f"probes of {name}: {said.strip()[-2000:]}")
    late, still = (json.loads(milliseconds) for milliseconds, _ in told)
    return {
        "milliseconds": percentiles(late),
        "machine": percentiles(still),
        "probes": len(late),
        "bytes_per_second": received / took,
        "streams": bed.node.metric("cachd_streams"),
        "busy": 1 - (after[1] - busy[1]) / (after[0] - busy[0]),
    }


def probing(port: int, path: str, seconds: float) -> subprocess.Popen[str]:
    words = (sys.executable, "-m", "bench.probes", port, path, RATE, seconds)
    pipe = subprocess.PIPE
    return subprocess.Popen([str(word) for word in words], cwd=PROJECT, stdout=pipe, stderr=pipe, text=True)


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    return dict(zip(map(str, PERCENTILES), numpy.percentile(milliseconds, PERCENTILES), strict=True))


def cores() -> tuple[int, int]:
    """Time of all cores so far, and how much of it they had nothing to do (proc_stat(5))."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, words)), int(words[3]) + int(words[4])


@contextmanager
def pulling(bed: Bed, path: str) -> Iterator[None]:
    """The same model pulled and deleted all the time; the first bytes have come when the block begins."""
    over = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            while not over.is_set():
                bed.node.pull(bed.origin.url + path, name="load")
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
    """The named figures that the goals are judged by: under the load that is worse."""
    found = {}
    for shown, name in (("ready", READY), ("control", CONTROL)):
        loaded = [c for c in results["cases"] if c["load"] != IDLE and c["name"] == name]
        for which, most in (("", math.inf), (", machine on time", MOST_STILL_MS)):
            late = [on_time(case, most) for case in loaded]
            if late and all(late):
                found[f"{shown} p99 ms, saturated{which}"] = max(float(numpy.median(runs)) for runs in late)
    return found


def on_time(case: dict[str, Any], most: float) -> list[float]:
    """p99 of the runs in which the machine itself was never late by more than `most` milliseconds."""
    runs = zip(percentile(case, 99.0), percentile(case, 100.0, "machine"), strict=True)
    return [late for late, still in runs if still <= most]


def percentile(case: dict[str, Any], which: float, of: str = "milliseconds") -> list[float]:
    return [measured[of][str(which)] for measured in case["runs"]]


LINES = (
    *("while", "asked", "p50, ms", "p90", "p99", "p99.9", "most"),
    *("machine late itself, at most", "GB/s meanwhile", "streams", "busy"),
)
AGAIN_LINES = ("a second pull", "ms", "most", "times")


def cells(results: dict[str, Any]) -> list[list[str]]:
    return [
        [
            case["load"],
            case["name"],
            *(spread(percentile(case, which), digits=1) for which in PERCENTILES),
            spread(percentile(case, 100.0, "machine"), digits=1),
            spread(r["bytes_per_second"] / GB for r in case["runs"]) if case["load"] != IDLE else "",
            f"{numpy.median([r['streams'] for r in case['runs']]):.0f}" if case["load"] != IDLE else "",
            f"{numpy.median([r['busy'] for r in case['runs']]):.0%}",
        ]
        for case in results["cases"]
    ]


def again(results: dict[str, Any]) -> list[list[str]]:
    asked = {name: took for name, took in results["second"].items() if name != "requests"}
    return [
        [name, f"{numpy.median(took):.1f}", f"{max(took):.1f}", str(len(took))]
        for name, took in asked.items()
    ]


def title(results: dict[str, Any]) -> str:
    return f"{RATE} probes a second for {results['seconds']:g} s"


def below(results: dict[str, Any]) -> str:
    return f"Requests to the origin for all second pulls: {results['second']['requests']}."


def table(results: dict[str, Any]) -> Group:
    return Group(
        report.table("a model that is ready, asked for again", AGAIN_LINES, again(results)),
        below(results),
        report.table(title(results), LINES, cells(results)),
    )


def markdown(results: dict[str, Any]) -> str:
    return (
        f"{report.markdown(AGAIN_LINES, again(results))}\n{below(results)}\n\n"
        f"**{title(results)}**\n\n{report.markdown(LINES, cells(results))}"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    panels = {
        f"p{which:g} of {RATE} probes a second": {
            f"{case['name']}, {case['load']}": percentile(case, which) for case in results["cases"]
        }
        for which in (50.0, 99.0)
    }
    report.bars(path, panels, "ms")
