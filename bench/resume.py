"""Resume: a daemon is killed by kill -9 when so much of a file is on its way, and started again.

The origin (bench/pacing.py) is a link of 1 GB/s. It stops at exactly 10, 50 or 90% of the file, the kill
comes then, and all that follows is seen by the origin: what is asked for again, when the first new byte goes
out, and the time between the answer that names the file and the first request for its bytes, in which the
daemon hashes again what its journal holds. The model is verified by its sha256 in the end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.measure import (
    GIB,
    MIB,
    Failed,
    available_bytes,
    daemon,
    file_system,
    random_file,
    sink,
    spread,
    warmed,
)
from bench.pacing import Pace, Pacing
from bench.report import GB, MB, Options
from tests.ground.node import Node

SIZE, QUICK_SIZE = 4 * GIB, 96 * MIB
LINK = 1e9
MARKS, QUICK_MARKS = (0.1, 0.5, 0.9), (0.5,)
RUNS = 3
NAME = "model.bin"
LOOK_SECONDS = 0.002
PATIENCE_SECONDS = 120.0

Extent = tuple[int, int]


def run(options: Options) -> dict[str, Any]:
    """Every mark in turn, `runs` times and once before that is not counted, to memory and to disk."""
    runs = options.runs or (1 if options.quick else RUNS)
    size = options.size_bytes or (QUICK_SIZE if options.quick else min(SIZE, available_bytes() // 4))
    results = report.head("resume", options, size_bytes=size, link=LINK, runs=runs, cases=[])
    with sink("memory") as web:
        sha256 = random_file(web / NAME, size)
        for kind in ("memory",) if options.quick else ("memory", "disk"):
            with sink(kind) as place:
                marks = QUICK_MARKS if options.quick else MARKS
                facts = {"sink": kind, "file_system": file_system(place)}
                cases: list[dict[str, Any]] = [{**facts, "mark": mark, "runs": []} for mark in marks]
                for turn in range(runs + 1):
                    for case in cases:
                        warmed(place, size)
                        measured = killed_and_resumed(web, place / "cache", size, sha256, case["mark"])
                        if turn:
                            case["runs"].append(measured)
                results["cases"] += cases
    return results


def killed_and_resumed(web: Path, root: Path, size: int, sha256: str, mark: float) -> dict[str, float]:
    """One life until the mark, and the next until the model is ready; its bytes are deleted again."""
    stop_at = int(size * mark)
    with Pacing(web, Pace(total=LINK, stop_at=stop_at)) as origin, daemon(root) as node:
        node.pull(f"{origin.url}/{NAME}#sha256={sha256}", name="measured")
        wait_until_stopped(origin)
        node.kill()
        held = journalled(root)
        origin.requests()
        origin.change(stop_at=None)
        began = time.monotonic()
        node.start()
        ready(node)
        ended = time.monotonic()
        told = life(origin.requests(), held, began)
        sent = origin.state()["sent"]
        resumed = node.metric("cachd_resumed_bytes_total")
        node.ask("DELETE", "/v1/models/measured")
    if resumed != sum(stop - start for start, stop in held):
        raise Failed(f"{resumed:.0f} bytes resumed, the journal held {held}")
    return {**told, "held": resumed, "again": sent - size, "until_ready": ended - began}


def wait_until_stopped(origin: Pacing) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not origin.state()["stopped"]:
        if time.monotonic() > deadline:
            raise Failed("the origin was not asked for enough")
        time.sleep(LOOK_SECONDS)


def ready(node: Node) -> None:
    """Wait for the model. Raises Failed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (answer := node.ready("measured", wait=20)).status != 200:
        if time.monotonic() > deadline:
            raise Failed(f"not ready: {answer.document}")


def journalled(root: Path) -> list[Extent]:
    """The extents that the journal of a dead daemon holds."""
    journals = (root / ".cachd/ingest").glob("*/journal")
    lines = (line.split() for journal in journals for line in journal.read_text().splitlines())
    return [(int(words[0]), int(words[1])) for words in lines if len(words) == 3]


def life(requests: list[dict[str, Any]], held: list[Extent], began: float) -> dict[str, float]:
    """What the second life asked for: bytes that the journal held, and when, in seconds from exec."""
    gets = [r for r in requests if r["method"] == "GET"]
    named = max(r["at"] for r in requests if r["method"] == "HEAD")
    first = min(r["at"] for r in gets)
    return {
        "held_again": sum(overlap(held, (r["start"], r["start"] + r["sent"])) for r in gets),
        "first_byte": min(r["first"] for r in gets if r["first"]) - began,
        "named": named - began,
        "hashing": first - named,
    }


def overlap(extents: Iterable[Extent], other: Extent) -> int:
    return sum(max(0, min(stop, other[1]) - max(start, other[0])) for start, stop in extents)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The worst of all runs: bytes fetched again though the journal held them; seconds to the first byte."""
    runs = [measured for case in results["cases"] for measured in case["runs"]]
    return {
        "held bytes fetched again": max(measured["held_again"] for measured in runs),
        "seconds to the first new byte": max(
            statistics.median(r["first_byte"] for r in case["runs"]) for case in results["cases"]
        ),
    }


LINES = (
    *("sink", "killed at", "journal held, MB", "held, fetched again", "fetched again in all, MB"),
    *("exec to first new byte, s", "of that hashing, s", "hashing, GB/s", "exec to ready, s"),
)


def cells(results: dict[str, Any]) -> list[list[str]]:
    return [
        [
            case["sink"],
            f"{case['mark']:.0%}",
            told(case, "held", MB, 0),
            f"{max(r['held_again'] for r in case['runs'])}",
            told(case, "again", MB, 0),
            told(case, "first_byte"),
            told(case, "hashing"),
            spread((r["held"] / r["hashing"] / GB for r in case["runs"]), digits=1),
            told(case, "until_ready", digits=1),
        ]
        for case in results["cases"]
    ]


def told(case: dict[str, Any], figure: str, unit: float = 1.0, digits: int = 2) -> str:
    return spread((measured[figure] for measured in case["runs"]), 1 / unit, digits)


def title(results: dict[str, Any]) -> str:
    size = results["size_bytes"] // MIB
    return f"kill -9 in a pull of {size} MiB over a link of {results['link'] / MB:.0f} MB/s"


def table(results: dict[str, Any]) -> Table:
    return report.table(title(results), LINES, cells(results))


def markdown(results: dict[str, Any]) -> str:
    return f"**{title(results)}**\n\n{report.markdown(LINES, cells(results))}"


def plot(results: dict[str, Any], path: Path) -> None:
    def panel(figure: str, unit: float) -> dict[str, list[float]]:
        return {
            f"cachd, {case['sink']}, {case['mark']:.0%}": [r[figure] / unit for r in case["runs"]]
            for case in results["cases"]
        }

    report.bars(path, {"seconds from exec to the first new byte": panel("first_byte", 1.0)}, "seconds")
