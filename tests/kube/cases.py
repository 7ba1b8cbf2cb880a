"""The cases by name, in the order in which they run, and what became of each."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from tests.kube.cluster import Cluster

Run = Callable[[Cluster], str]


@dataclass(frozen=True, slots=True)
class Case:
    """`holds` is what is claimed. `run` returns the figures, and raises if it does not hold."""

    name: str
    holds: str
    run: Run


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a case. `failure` is empty if it held."""

    name: str
    said: str
    failure: str
    seconds: float


CASES: dict[str, Case] = {}


def case(holds: str) -> Callable[[Run], Run]:
    """Register a function as a case, by its name."""

    def register(run: Run) -> Run:
        name = run.__name__.replace("_", "-")
        CASES[name] = Case(name, holds, run)
        return run

    return register


def tried(one: Case, cluster: Cluster) -> Verdict:
    """Run a case on a node with nothing of cachd, and leave it so."""
    begun = time.monotonic()
    failure = said = ""
    try:
        said = one.run(cluster)
    except Exception as error:  # noqa: BLE001 a case that fails is a row of the table
        failure = f"{type(error).__name__}: {error}"
        cluster.log(traceback.format_exc())
        _describe(cluster)
    try:
        cluster.clear()
    except Exception as error:  # noqa: BLE001 the next case runs all the same
        failure = failure or f"it could not be cleared away: {error}"
        cluster.log(traceback.format_exc())
    return Verdict(one.name, said, failure, time.monotonic() - begun)


def table(verdicts: list[Verdict]) -> Table:
    shown = Table("case", "what held", "figures", "s")
    for verdict in verdicts:
        holds = CASES[verdict.name].holds
        if verdict.failure:
            holds = f"NOT: {holds}: {verdict.failure}"
        shown.add_row(verdict.name, escape(holds), escape(verdict.said), f"{verdict.seconds:.0f}")
    return shown


def _describe(cluster: Cluster) -> None:
    """Put into the log what an operator would look at."""
    for command in (
        "kubectl get pods -A -o wide",
        "kubectl get events -A --sort-by=.lastTimestamp | tail -30",
        "kubectl describe pods -A | tail -150",
        "kubectl -n cachd logs ds/cachd --all-containers --tail=60",
        "kubectl describe node | head -60",
    ):
        cluster.tried(command)
