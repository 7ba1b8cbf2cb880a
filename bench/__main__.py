"""Benchmarks, a module a question: `python -m bench [QUESTION...] [--runs N] [--mib N] [--quick] [--keep]`.

Raw results and plots go to bench/results, tables to the terminal, the goals last; a question that does not
run now is judged by its last results. `--keep` brings the results into bench/kept; what is there makes
bench/measurements.md, the plot beside it, and the README's part of both.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import goals, peers, readme, report, steady
from bench.measure import MIB

QUESTIONS = {
    "cold": "one file, cold",
    "tls": "one file over TLS, cold",
    "models": "a model of shards, one of small files, cold",
    "resume": "after kill -9",
    "warm": "second pulls, probes under load",
    "start": "time to /readyz",
    "upkeep": "a flipped bit, a cold model, a way back",
    "growth": "against size, streams, files, pulls",
    "gil": "the interpreter's lock, and what it lets one process move",
    "slow": "origins that hold back",
    "bandwidth": "limits, and who gets what of them",
    "trace": "what eviction costs, on a trace",
    "day": "a day on a small disk: what must never happen",
}
PROGRAMS = {"aria2c": "aria2", "curl": "curl", "nginx": "nginx-light", "openssl": "openssl"}
KEPT = Path(__file__).parent / "kept"
PLOT = Path(__file__).parent / "cold.png"


def main(argv: list[str] | None = None) -> None:
    """Run the questions asked for, all by default."""
    asked = arguments(argv)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed daemon has its bytecode
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started and mounted goes, too
    console = Console(width=None if Console().is_terminal else 160)
    for program, package in PROGRAMS.items():
        if peers.binary(program) is None and not Path("/usr/sbin", program).exists():
            console.print(f"{program} is not installed: apt-get install {package}")
    options = report.Options(asked.runs, asked.mib and asked.mib * MIB, asked.quick)
    names = asked.question or available()
    for name in names:
        question = module(name)
        console.rule(f"{name}: {QUESTIONS[name]}")
        results = question.run(options)
        results["watched"] = asdict(steady.this().counted())
        report.keep(name, results, asked.into)
        question.plot(results, asked.into / f"{name}.png")
        console.print(when(results))
        console.print(question.table(results))
    results = kept(asked.into)
    console.print(goals.table(figures(results)))
    if asked.keep:
        keep(names, asked.into)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    about, _, _ = (__doc__ or "").partition(":")
    parser = argparse.ArgumentParser("python -m bench", description=about)
    parser.add_argument("question", nargs="*", choices=[*available(), []], help=", ".join(available()))
    parser.add_argument("--runs", type=int, help="counted runs of each way")
    parser.add_argument("--mib", type=int, help="size of the one file, or of the sharded model")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--keep", action="store_true", help="keep the results for the README")
    parser.add_argument("--into", type=Path, help="where results go; default: bench/results[/quick]")
    asked = parser.parse_args(argv)
    if asked.keep and asked.quick:
        parser.error("--keep is for whole runs: --quick only tells whether everything runs")
    asked.into = asked.into or (report.RESULTS / "quick" if asked.quick else report.RESULTS)
    return asked


def available() -> list[str]:
    return [name for name in QUESTIONS if importlib.util.find_spec(f"bench.{name}")]


def module(name: str) -> Any:
    return importlib.import_module(f"bench.{name}")


def kept(where: Path) -> dict[str, Any]:
    """The last results of every question that has any there."""
    files = {name: where / f"{name}.json" for name in available()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def keep(names: Collection[str], where: Path) -> None:
    """Bring the results of these questions into the project, and write what all that is kept tells."""
    results = kept(where)
    for name in names:
        report.keep(name, results[name], KEPT)
    if PLOT.stem in names:
        shutil.copy(where / PLOT.name, PLOT)
    readme.MEASUREMENTS.write_text(markdown(kept(KEPT)))
    readme.renew()


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Every named figure of these results, as `QUESTION: NAME`."""
    return {
        f"{name}: {figure}": value
        for name, result in results.items()
        for figure, value in module(name).figures(result).items()
    }


def when(result: dict[str, Any]) -> str:
    """What is said of every question."""
    told = steady.told(result["watched"]) if "watched" in result else ""
    return f"{result['date']}, {result['machine']}; medians of interleaved runs (least-most).{told}"


def markdown(results: dict[str, Any]) -> str:
    """A section for the goals and one for every question."""
    parts = ["# Measurements", "### Goals", goals.markdown(figures(results)).strip()]
    for name, result in results.items():
        parts += [
            f"### {report.heading(QUESTIONS[name])}",
            when(result),
            module(name).markdown(result).strip(),
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
