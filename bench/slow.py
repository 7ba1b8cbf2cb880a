"""Origins that hold back: 40 MB/s a connection, 20 ms away, 400 MB/s in all (bench/pacing.py).

`link`: ten connections fill it, more do no harm. `crowd`: each connection beyond 8 takes 5 % of the whole, so
that 9 bring the most and 16 three quarters of it. A share is of the most that any number of connections is
given; `settled` is the share in the second half of a run. Connections and rates are the origin's own record.
How much of it a client gets at all is measured by a bare loop with each of several numbers of connections.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group

from bench import report
from bench.measure import GIB, MIB, Run, daemon, interleaved, pulled, sink, spread, warmed
from bench.pacing import Pace, Paced, Sample, paced
from bench.peers import PEERS, File, Peer, limit
from bench.report import GB, MB, Options
from tests.ground.node import Node

SIZE = 4 * GIB
QUICK_SIZE = 24 * MIB
RUNS = 2
CASES = {"link": Pace(), "crowd": Pace(loss=0.05)}
NAMES = ("aria2c -x16", "hf_transfer", "curl")
FRESH, KNOWN = "cachd", "cachd, not its first pull"
FIXED = (9, 10, 12)
SINGLE_PART = 16  # one connection gets a tenth: a part of the file shows its rate


def run(options: Options) -> dict[str, Any]:
    """Every way from each origin, to memory, unverified."""
    size = options.size_bytes or (QUICK_SIZE if options.quick else SIZE)
    runs = options.runs or (1 if options.quick else RUNS)
    results = report.head("slow", options, size_bytes=size, runs=runs, cases=[])
    with sink("memory") as web, sink("memory") as place:
        for name, length in (("whole", size), ("part", size // SINGLE_PART)):
            with (web / name).open("wb") as file:  # holes: no memory, and nobody looks at them
                file.truncate(length)
        for name, pace in CASES.items():
            with paced(web, pace) as origin, daemon(place / "known") as known:
                rows = case(origin, place, known, runs, size)
            results["cases"].append({"case": name, "pace": asdict(pace), "best": pace.best, "rows": rows})
    return results


@dataclass(frozen=True, slots=True)
class Observed(Run):
    """A run, and what the origin saw of it."""

    observed: list[Sample]


def fixed(count: int) -> str:
    return f"bare loop, {count} connections"


def case(origin: Paced, place: Path, known: Node, runs: int, size: int) -> list[dict[str, Any]]:
    """The rows of one origin; cachd in a new process each time, and in one that knows the origin."""
    target = place / "got"
    lengths = {"whole": size, "part": size // SINGLE_PART}

    def fresh() -> Run:
        with daemon(place / "fresh") as node:
            return pulled(node, f"{origin.url}/whole")

    def fetched(peer: Peer, path: str) -> Run:
        try:
            return peer.fetch(File(origin, path, ""), target)
        finally:
            target.unlink(missing_ok=True)

    ways: dict[str, Callable[[], Run]] = {
        FRESH: fresh,
        KNOWN: lambda: pulled(known, f"{origin.url}/whole"),
    }
    files = {FRESH: "whole", KNOWN: "whole"}
    for count in FIXED:
        files[fixed(count)] = "whole"
        ways[fixed(count)] = partial(limit, "recv", f"{origin.url}/whole", size, target, count)
    failures: dict[str, str] = {}
    for peer in (peer for peer in PEERS if peer.name in NAMES):
        files[peer.name] = "part" if peer.name == "curl" else "whole"
        ways[peer.name] = lambda peer=peer: fetched(peer, files[peer.name])  # type: ignore[misc]
        if missing := peer.missing():
            failures[peer.name] = missing

    def watched(way: Callable[[], Run]) -> Callable[[], Run]:
        def do() -> Run:
            began = time.monotonic()
            run = way()
            return Observed(*astuple(run), during(origin.record(), began, time.monotonic()))

        return do

    measured = interleaved(
        {name: watched(way) for name, way in ways.items()}, runs, partial(warmed, place, size), failures
    )
    rows = []
    for name in ways:
        form = "limit" if name in map(fixed, FIXED) else "unverified"
        row = report.row(name, form, measured[name], failures.get(name))
        rows.append({**row, "size_bytes": lengths[files[name]]})
    return rows


def during(record: Iterable[Sample], began: float, ended: float) -> list[Sample]:
    """What the origin saw from the first connection at work to the last, with times from there."""
    inside = [s for s in record if began <= s.seconds <= ended]
    busy = [place for place, sample in enumerate(inside) if sample.connections]
    if not busy:
        return []
    kept = inside[busy[0] : busy[-1] + 1]
    return [Sample(s.seconds - kept[0].seconds, s.connections, s.sent - kept[0].sent) for s in kept]


def second_half(run: dict[str, Any]) -> list[dict[str, Any]]:
    observed = run["observed"]
    return observed[len(observed) // 2 :]


def shares(row: dict[str, Any], best: float) -> list[float]:
    return [row["size_bytes"] / run["seconds"] / best for run in row["runs"]]


def settled(row: dict[str, Any], best: float) -> list[float]:
    """Shares of the second half of each run; a run of a moment has none."""
    found = []
    for half in map(second_half, row["runs"]):
        if len(half) > 1:
            seconds = half[-1]["seconds"] - half[0]["seconds"]
            found.append((half[-1]["sent"] - half[0]["sent"]) / seconds / best)
    return found


def connections(row: dict[str, Any]) -> list[float]:
    """At work in the second half of each run, on average."""
    halves = [half for half in map(second_half, row["runs"]) if half]
    return [statistics.mean(sample["connections"] for sample in half) for half in halves]


def figures(results: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for case in results["cases"]:
        name, best = case["case"], case["best"]
        rows = {row["name"]: row for row in case["rows"] if row["runs"]}
        loops = [settled(row, best) for row in rows.values() if row["form"] == "limit"]
        bare = [statistics.median(values) for values in loops if values]
        for ours, what in ((FRESH, "share"), (KNOWN, "share, known")):
            if ours in rows:
                found[f"{name}: {what}"] = statistics.median(shares(rows[ours], best))
                if values := settled(rows[ours], best):
                    found[f"{name}: {what}, settled"] = statistics.median(values)
                if values and bare:
                    found[f"{name}: {what}, settled / bare loop"] = statistics.median(values) / max(bare)
        for peer in NAMES:
            if peer in rows and FRESH in rows:
                theirs = statistics.median(shares(rows[peer], best))
                found[f"{name}: speed / {peer}"] = found[f"{name}: share"] / theirs
    return found


LINES = ("", "MB/s", "share of the best", "settled", "connections", "at most", "CPU s/GB")


def cells(case: dict[str, Any]) -> list[list[str]]:
    lines = []
    for row in case["rows"]:
        if not row["runs"]:
            lines.append([row["name"], row["note"] or "not measured", *[""] * (len(LINES) - 2)])
            continue
        best = case["best"]
        most = max((s["connections"] for run in row["runs"] for s in run["observed"]), default=0)
        later, at_work = settled(row, best), connections(row)
        lines.append(
            [
                row["name"],
                spread((share * best / MB for share in shares(row, best)), digits=0),
                spread(shares(row, best)),
                spread(later) if later else "",
                spread(at_work, digits=1) if at_work else "",
                str(most),
                spread(run["cpu_seconds"] / row["size_bytes"] * GB for run in row["runs"]),
            ]
        )
    return lines


def title(case: dict[str, Any]) -> str:
    pace = case["pace"]
    told = f"{pace['connection'] / MB:.0f} MB/s a connection, {pace['link'] / MB:.0f} MB/s in all"
    if pace["loss"]:
        told += f", {pace['loss']:.0%} less for each connection beyond {pace['crowd']}"
    return f"{told}: {case['best'] / MB:.0f} MB/s at best"


def table(results: dict[str, Any]) -> Group:
    return Group(*(report.table(title(case), LINES, cells(case)) for case in results["cases"]))


def markdown(results: dict[str, Any]) -> str:
    return "\n".join(
        f"**{title(case)}**\n\n{report.markdown(LINES, cells(case))}" for case in results["cases"]
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Connections at work over time, by the origin's record of each way's last run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cases = results["cases"]
    figure, axes = pyplot.subplots(
        len(cases), figsize=(10, 3 * len(cases)), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes[:, 0], cases, strict=True):
        for row in (row for row in case["rows"] if row["runs"] and row["name"] != "curl"):
            observed = row["runs"][-1]["observed"]
            axis.step(
                [s["seconds"] for s in observed], [s["connections"] for s in observed], label=row["name"]
            )
        axis.set_title(title(case), loc="left")
        axis.set_xlabel("seconds")
        axis.set_ylabel("connections at work")
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
