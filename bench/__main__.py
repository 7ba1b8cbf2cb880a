"""Runs the benchmarks, one module for each question: `python -m bench [QUESTION...] [--quick] [--keep]`.

Results go to bench/results, tables to the terminal, the goals last. A question that does not run now is
judged by its last results. `--keep` copies the results to bench/kept and renews the pages that show them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from bench import goals, peers, report
from bench.measure import MIB
from bench.results import KEPT, QUESTIONS, available, figures, kept, module, when
from docs import render

PROGRAMS = {"aria2c": "aria2", "curl": "curl", "nginx": "nginx-light", "openssl": "openssl"}


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
        report.keep(name, results, asked.into)
        console.print(when(results))
        console.print(question.table(results))
    results = kept(asked.into)
    console.print(goals.table(figures(results)))
    if asked.keep:
        keep(names, asked.into)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, read."""
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


def keep(names: Collection[str], where: Path) -> None:
    """Copy the results of these questions into the project, and renew the pages that show them."""
    results = kept(where)
    for name in names:
        report.keep(name, results[name], KEPT)
    render.renew()


if __name__ == "__main__":
    main()
