"""Loads models by real clients: `make conformance`, or `python -m tests.conformance [WORD...]`.

Installs the clients into virtual environments of their own, once. Keeps what it found in
docs/conformance.json and renews the table of docs/engines.md. The exit status is 1 if a client fails that has
no fault of its own in the list, or if a fault is gone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import structlog

from docs import render
from tests.conformance import environments, kept
from tests.conformance.clients import ALL, CASES, COLUMNS, TENSORS, Client, Place
from tests.conformance.kept import USERS, users_of
from tests.conformance.made import MAKERS, model
from tests.conformance.trials import Field, field


def main(arguments: list[str]) -> int:
    asked = _asked(arguments)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    clients = [client for client in ALL if _is_asked(client, asked.words)]
    groups = {name for client in clients for name in _environments(client)}
    installed = {name: environments.installed(name, asked.environments) for name in sorted(groups)}
    pythons = {name: python for name, python in installed.items() if python}
    there = [client for client in clients if _environments(client) <= pythons.keys()]
    repos = {repo for client in there for repo in (client.model, *client.needs)}
    with tempfile.TemporaryDirectory(prefix="conformance-") as root:
        Path(root).chmod(0o755)
        models = {repo: _made(repo, asked.environments / "models", pythons) for repo in sorted(repos)}
        surprises: list[str] = []
        with field(Path(root), models) as ground:
            for user, place in itertools.product(asked.users, _places(asked)):
                for client in there:
                    if place in client.places and user in users_of(place):
                        surprises += _tried(ground, client, pythons[client.environment], user, place)
    render.renew()
    missing = [client.name for client in clients if client not in there]
    print("\n".join([*surprises, *(f"{name}: not installed" for name in missing)]) or "as documented")
    return 1 if surprises or missing else 0


def _asked(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("words", metavar="WORD", nargs="*", help="only clients whose name has one of these")
    parser.add_argument("--environments", type=Path, default=environments.place(), help="where they are")
    cases = list(dict.fromkeys(case for _, case in COLUMNS))
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, help="all by default")
    parser.add_argument("--views", nargs="+", choices=CASES, default=[*CASES], help="all by default")
    parser.add_argument("--users", nargs="+", choices=USERS, default=[*USERS], help="all by default")
    asked = parser.parse_args(arguments)
    if not any(_is_asked(client, asked.words) for client in ALL):
        parser.error(f"no such client; there are {', '.join(client.name for client in ALL)}")
    return asked


def _places(asked: argparse.Namespace) -> list[Place]:
    return [(view, case) for view, case in COLUMNS if view in asked.views and case in asked.cases]


def _is_asked(client: Client, words: Sequence[str]) -> bool:
    return not words or any(word.lower() in client.name.lower() for word in words)


def _environments(client: Client) -> set[str]:
    """Those of the client and of the libraries that make its models."""
    repos = {client.model, *client.needs} - {TENSORS}
    return {client.environment, *(MAKERS[repo][1] for repo in repos)}


def _made(repo: str, place: Path, pythons: Mapping[str, str]) -> dict[str, bytes | Path]:
    return model(repo, place / repo, pythons[MAKERS[repo][1]] if repo in MAKERS else "")


def _tried(ground: Field, client: Client, python: str, user: str, place: Place) -> Iterable[str]:
    """Try a client once, keep the result, and return what is not as documented."""
    cell = ground.tried(client, python, *place, user)
    found = cell.failure or "loaded"
    where = f"{client.name}, {place[0]}, {place[1]}, {user}"
    print(f"{where}: {found} ({cell.seconds:.1f} s)", file=sys.stderr, flush=True)
    day = datetime.now(UTC).date().isoformat()
    kept.write(client, environments.version(python, client.package), day, cell)
    return list(kept.undocumented(client, [cell]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
