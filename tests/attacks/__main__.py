"""Every attack of index.toml against an installed daemon: `python -m tests.attacks [--short] [ROW...]`.

Builds an environment, installs the project in it, starts the daemon there with models that pods serve from,
and tries one attack after the other. Ends with a table of what held: the promise of each row, the daemon
alive, its peak resident memory below 400 MiB, probes not later than three times a bare responder's and 50 ms
(99th percentiles), and no model lost, moved or withdrawn. The exit status is 1 if something did not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import tomllib
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.attacks import by_client, by_hub_client, by_node, by_origin, by_pod, by_share, by_tenant  # noqa: F401 they register attacks
from tests.attacks.target import MIB, Verdict, besieged, installed

PROJECT = Path(__file__).parents[2]
INDEX = tomllib.loads((Path(__file__).parent / "index.toml").read_text())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__.splitlines()[0])
    parser.add_argument("rows", metavar="ROW", nargs="*", help="rows of index.toml; all by default")
    parser.add_argument("--short", action="store_true", help="a tenth of the connections, files and tries")
    parser.add_argument(
        "--cachd", type=Path, help="the program to attack; default: the project, installed anew"
    )
    asked = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory(prefix="attacks-") as place:
        directory = Path(place)
        if not asked.cachd:
            console.print("installing the project", style="dim")
        program = [str(asked.cachd)] if asked.cachd else installed(directory, PROJECT)
        verdicts = []
        with besieged(directory, program, short=asked.short, judges_time=True) as target:
            for row in asked.rows or INDEX:
                verdicts.append(target.tried(row))
                console.print(f"{row}: {'held' if verdicts[-1].held else verdicts[-1].failure}", markup=False)
    console.print(table(verdicts))
    return 0 if all(verdict.held for verdict in verdicts) else 1


def table(verdicts: list[Verdict]) -> Table:
    shown = Table("attack", "by", "what held", "peak MiB", "/livez", "/ready", "bare", "s", title="p99 in ms")
    for verdict in verdicts:
        row, probes = INDEX[verdict.row], verdict.probes
        times = [f"{1000 * seconds:.1f}" for seconds in (probes.livez, probes.ready, probes.bare)]
        held = row["holds"] if verdict.held else f"[red]NOT: {verdict.failure}[/red]"
        shown.add_row(
            row["attack"],
            row["attacker"],
            held,
            str(verdict.peak_bytes // MIB),
            *times,
            f"{verdict.seconds:.0f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
