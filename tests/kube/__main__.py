"""The chart and the manifests on a real node: `python -m tests.kube [CASE...]`; `--list` only lists them.

Finds or builds Kubernetes' programs and the images, starts one node in namespaces of its own, and runs one
case after the other. Ends with a table of what held. The exit status is 1 if something did not hold or was
left behind, and 2 if this machine lacks something, which one line says.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

from tests.kube import changes, image, nodes, pages, programs, serving, signals
from tests.kube.cases import CASES, Verdict, table, tried
from tests.kube.cluster import Cluster, NodeHub
from tests.kube.models import supply
from tests.kube.namespaces import INSIDE, own_mounts, run_inside
from tests.kube.plane import Plane
from tests.kube.processes import Processes
from tests.kube.worker import Worker, make_networks

assert all((serving, changes, nodes, signals, pages))  # importing them registered their cases


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kube", description=__doc__.splitlines()[0])
    parser.add_argument("cases", metavar="CASE", nargs="*", help="names of cases; all by default")
    parser.add_argument("--list", action="store_true", help="list the cases, and run none")
    parser.add_argument("--build", action="store_true", help="only find or build what the node is made of")
    parser.add_argument("--built", action="store_true", help="say whether all is here that is built once")
    parser.add_argument("--log", type=Path, help="default: kube.log in the cache directory")
    parser.add_argument(INSIDE, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if unknown := set(asked.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if asked.list:
        print(*(f"{one.name}: {one.holds}" for one in CASES.values()), sep="\n")
        return 0
    if asked.inside:
        return inside(asked.inside, asked.cases or list(CASES), asked.log or programs.CACHE / "kube.log")
    if reason := (asked.built and programs.unbuilt()) or programs.lacking():
        print(f"the cases of Kubernetes were not run: {reason}")
        return 2
    if asked.built:
        return 0
    programs.CACHE.mkdir(parents=True, exist_ok=True)
    programs.build(tell)
    image.archives(tell)
    return 0 if asked.build else run_inside(arguments)


def tell(said: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {said}", flush=True)


def inside(place: Path, names: list[str], log: Path) -> int:
    """Start the node and run the cases; what commands said goes into the log."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    images = image.archives(tell)
    own_mounts()
    make_networks()
    verdicts: list[Verdict] = []
    with Processes(place) as processes, log.open("w") as file:
        begun = time.monotonic()

        def write(said: str) -> None:
            print(f"{time.monotonic() - begun:.1f} {said}", file=file, flush=True)

        plane = Plane(place, processes)
        tell(f"the API server is ready after {time.monotonic() - begun:.1f} s")
        worker = Worker(place, plane.kubeconfig, processes, images)
        with NodeHub() as hub:
            supply(hub, place / "models")
            cluster = Cluster(place, plane, worker, hub, write)
            cluster.node_ready()
            tell(f"the node is Ready after {time.monotonic() - begun:.1f} s")
            for name in names:
                tell(name)
                verdicts.append(tried(CASES[name], cluster))
                tell(f"{name}: {verdicts[-1].failure or 'held'}")
        console.print(shown := table(verdicts))
        Console(file=file, width=160).print(shown)
    held = sum(not verdict.failure for verdict in verdicts)
    print(f"{held} of {len(verdicts)} held; the log is {log}")
    return 0 if held == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
