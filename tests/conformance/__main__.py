"""Loads models by real clients: `make conformance`, or `python -m tests.conformance [CLIENT...]`.

Installs each client into a virtual environment of its own below `.conformance`, once. Prints a table for
docs/engines.md. The exit status is 1 if a client fails that has no fault of its own in the table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import structlog

from tests.conformance.clients import ALL, NOT_TRIED, Client
from tests.conformance.made import model
from tests.conformance.table import NETWORKS, USERS, VIEWS, Cell, field

PLACE = Path(__file__).parent.parent.parent / ".conformance"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("clients", metavar="CLIENT", nargs="*", help="names of clients; all by default")
    parser.add_argument("--environments", type=Path, default=PLACE, help="where the clients are installed")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="all by default")
    asked = parser.parse_args(arguments)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # the table goes to stdout
    if unknown := set(asked.clients) - {client.name for client in ALL}:
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    clients = [client for client in ALL if not asked.clients or client.name in asked.clients]
    installed = {client.name: _installed(client, asked.environments) for client in clients}
    pythons = {name: python for name, python in installed.items() if python}
    tried = [client for client in clients if client.name in pythons]
    with tempfile.TemporaryDirectory(prefix="conformance-") as made, tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        makers = {client.repo: pythons[client.name] for client in tried}
        models = {repo: model(repo, Path(made, repo), python) for repo, python in makers.items()}
        with field(Path(root), models) as ground:
            cells = []
            for client in tried:
                for cell in ground.cells(client, pythons[client.name], networks=asked.networks):
                    print(_line(cell), file=sys.stderr, flush=True)
                    cells.append(cell)
    versions = {client.name: _version(client, pythons[client.name]) for client in tried}
    missing = [client.name for client in clients if client.name not in pythons]
    print(table(cells, versions, [*missing, *NOT_TRIED]))
    return 0 if all(cell.is_as_documented for cell in cells) else 1


def table(cells: list[Cell], versions: dict[str, str], not_tried: list[str]) -> str:
    """The cells in Markdown: a row for each client, a column for each view and network."""
    columns = [(view, network) for view in VIEWS for network in NETWORKS]
    lines = [
        "| Client | Version | " + " | ".join(f"{view} view, {network}" for view, network in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for client in {cell.client.name: cell.client for cell in cells}.values():
        shown = [
            _shown([c for c in cells if c.client is client and (c.view, c.network) == k]) for k in columns
        ]
        lines.append(f"| {client.name} | {versions[client.name]} | " + " | ".join(shown) + " |")
    day = datetime.now(UTC).date().isoformat()
    return "\n".join([*lines, "", f"Tried on {day}. Not tried: {', '.join(not_tried)}."])


def _shown(cells: list[Cell]) -> str:
    """One cell of the table: whether it works for each user, or the fault and whose it is."""
    failed = [cell for cell in cells if cell.failure]
    if not failed:
        return "works" if cells else "not tried"
    own = (failed[0].client.faults or {}).get((failed[0].view, failed[0].network))
    users = "" if len(failed) == len(USERS) else f" as {failed[0].user}"
    return own or f"**fails{users}**: {failed[0].failure[:160]}"


def _line(cell: Cell) -> str:
    found = cell.failure or "loaded"
    return f"{cell.client.name}, {cell.view}, {cell.network}, {cell.user}: {found} ({cell.seconds:.1f} s)"


def _installed(client: Client, place: Path) -> str | None:
    """The interpreter of the client's environment; None if pip cannot install it here."""
    environment = place / client.name.replace(" ", "-")
    python, done = environment / "bin/python", environment / ".installed"
    if done.exists():
        return str(python)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    ended = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *client.packages])
    if ended.returncode:
        return None
    done.touch()
    return str(python)


def _version(client: Client, python: str) -> str:
    script = f"import importlib.metadata as m; print(m.version({client.shown!r}))"
    return subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
