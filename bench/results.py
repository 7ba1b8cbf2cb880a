"""Reads the results of the questions, and turns them into figures and pages."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from bench import goals, report
from bench.report import GB, MB, find, median

QUESTIONS = {
    "cold": "one file, cold",
    "models": "a model of shards, one of small files, cold",
    "resume": "after kill -9",
    "start": "time to /readyz",
    "ready": "probes under load",
}
KEPT = Path(__file__).parent / "kept"
HUB = "huggingface_hub"


def available() -> list[str]:
    """The questions whose modules are here."""
    return [name for name in QUESTIONS if importlib.util.find_spec(f"bench.{name}")]


def module(name: str) -> Any:
    """The module of a question."""
    return importlib.import_module(f"bench.{name}")


def kept(where: Path = KEPT) -> dict[str, Any]:
    """The last results of every question that has any there."""
    files = {name: where / f"{name}.json" for name in available()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Every named figure of these results, as `QUESTION: NAME`."""
    return {
        f"{name}: {figure}": value
        for name, result in results.items()
        for figure, value in module(name).figures(result).items()
    }


def when(result: dict[str, Any]) -> str:
    """The date and the machine of a measurement."""
    return f"{result['date']}, {result['machine']}; medians of interleaved runs (least-most)."


def markdown(results: dict[str, Any]) -> str:
    """The goals, then a section for each question."""
    parts = ["## Goals", goals.markdown(figures(results)).strip()]
    for name, result in results.items():
        title, shown = report.heading(QUESTIONS[name]), module(name).markdown(result).strip()
        parts += [f"## {title}", when(result), shown]
    return "\n\n".join(parts)


def summary(results: dict[str, Any]) -> str:
    """The few figures that a user cares about, as a table, below the machine that they are from."""
    rows = [*files(results["cold"]), *models(results["models"]), *lives(results)]
    head = ("Work, verified by sha256", "cachd", "fastest other client", "`huggingface_hub`")
    heading = "Medians, {date}, {machine}:".format(**results["cold"])
    return f"{heading}\n\n{report.markdown(head, rows)}".strip()


def files(cold: dict[str, Any]) -> list[list[str]]:
    """A row for one file in each transport."""
    lines, size = [], cold["size_bytes"]
    for case in cold["cases"]:
        if case["sink"] != "disk":
            continue
        speeds = [(size / seconds / GB, name) for seconds, name in verified(case["rows"])]
        ours, (best, peer), hub = speed_of(speeds, "cachd"), fastest(speeds), speed_of(speeds, HUB)
        work = f"one file of {size >> 30} GiB to disk{' over TLS' if case['tls'] else ''}"
        lines.append([work, f"{ours:.2f} GB/s", f"{best:.2f} GB/s ({peer})", f"{hub:.2f} GB/s"])
    return lines


def models(measured: dict[str, Any]) -> list[list[str]]:
    """A row for each model."""
    lines = []
    for case in measured["cases"]:
        seconds = verified(case["rows"])
        ours, (best, peer) = speed_of(seconds, "cachd"), min(s for s in seconds if "cachd" not in s[1])
        hub = speed_of(seconds, f"{HUB} snapshot_download")
        size = f"{case['size_bytes'] / (1 << 20):,.0f} MiB"
        work = f"a model of {case['files']:,} files, {size}, to {case['sink']}"
        lines.append([work, f"{ours:.2f} s", f"{best:.2f} s ({peer})", f"{hub:.2f} s"])
    return lines


def lives(results: dict[str, Any]) -> list[list[str]]:
    """Memory, a kill, a start, and a probe under load."""
    cold, resume = results["cold"]["cases"][1]["rows"], results["resume"]
    ours, hub = find(cold, "cachd", "verified"), find(cold, HUB, "verified")
    memory = [
        f"{max(run['anonymous_bytes'] for run in row['runs']) / MB:.0f} MB" for row in (ours, hub) if row
    ]
    again = {
        case["name"]: sum(run["again"] for run in case["runs"]) / len(case["runs"]) / MB
        for case in resume["cases"]
        if case["mark"] == 0.5
    }
    peers = [f"{megabytes:.0f} MB ({name})" for name, megabytes in again.items() if name != "cachd"]
    many = max(results["start"]["cases"], key=lambda case: (case["cache"] == "warm", case["snapshots"]))
    ready = figures({"ready": results["ready"]})
    return [
        ["memory while one file is pulled", memory[0], "", memory[1]],
        ["fetched again after `kill -9` half-way", f"{again['cachd']:.0f} MB", *peers, ""],
        [f"start with {many['snapshots']:,} models, until ready", f"{median(many):.2f} s", "", ""],
        [
            "`/ready`, p99, while a pull takes every core",
            f"{ready['ready: ready p99 ms, saturated']:.0f} ms",
            f"{ready['ready: control p99 ms, saturated']:.0f} ms (nginx answering 204)",
            "",
        ],
    ]


def verified(rows: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """The median seconds of each verified way, with its name."""
    return [(median(row), row["name"]) for row in rows if row["form"] == "verified" and row["runs"]]


def fastest(speeds: list[tuple[float, str]]) -> tuple[float, str]:
    """The best of those that are not cachd."""
    return max(pair for pair in speeds if not pair[1].startswith("cachd"))


def speed_of(pairs: list[tuple[float, str]], name: str) -> float:
    """The figure of the one with this name."""
    return next(value for value, named in pairs if named == name)
