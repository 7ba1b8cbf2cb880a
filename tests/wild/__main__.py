"""Pulls from origins with odd behaviour: `python -m tests.wild [ROW...]`; `--list` only lists them.

Starts every origin and one daemon, pulls from one origin after the other, and waits until each pull has
ended. Prints a table of what was found. The exit status is 1 if something differs from the rows: a wrong
model was ready, a pull hung, or another error was reported.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.wild.field import READY, ROWS, WILD, Verdict, among
from tests.wild.modules import MODULES


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.wild", description=__doc__.splitlines()[0])
    parser.add_argument("rows", metavar="ROW", nargs="*", help="rows of the TOML files; all by default")
    parser.add_argument("--list", action="store_true", help="list every row, and pull nothing")
    parser.add_argument("--short", action="store_true", help="do not wait for the last retry")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if asked.list:
        listed = [f"{row}: {said['server']}: {said['oddity']}" for row, said in ROWS.items() if row in WILD]
        print("\n".join(listed))
        return 0
    rows = asked.rows or list(ROWS)
    assert MODULES  # importing them registered their rows
    console = Console(width=None if sys.stdout.isatty() else 150)
    with (
        tempfile.TemporaryDirectory(prefix="wild-") as place,
        among(Path(place), rows, short=asked.short) as field,
    ):
        verdicts = [field.tried(row) for row in rows]
    console.print(table(verdicts))
    right = sum(verdict.is_right for verdict in verdicts)
    ready = sum(verdict.found == READY for verdict in verdicts)
    longest = max(verdicts, key=lambda verdict: verdict.seconds)
    console.print(
        f"{right} of {len(verdicts)} as they should be: {ready} ready, {len(verdicts) - ready} refused;"
        f" the longest took {longest.seconds:.1f} s ({longest.row})"
    )
    return 0 if right == len(verdicts) else 1


def table(verdicts: list[Verdict]) -> Table:
    shown = Table("row", "server", "oddity", "found", "s")
    for verdict in verdicts:
        row = ROWS[verdict.row]
        found = verdict.found if verdict.is_right else f"[red]NOT {row['outcome']}: {verdict.failure}[/red]"
        shown.add_row(verdict.row, row["server"], row["oddity"], found, f"{verdict.seconds:.1f}")
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
