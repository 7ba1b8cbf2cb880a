"""How fast the Hub endpoint is: a ready file against nginx, and a file that is pulled against a plain pull.

    python -m bench.hub_endpoint [--runs 5] [--mib 512] [--place /tmp]

The Hub's answers come from the tests' Hub, and the bytes from nginx. One connection reads, and drops what it
reads. `direct` asks the Hub for the address of the file, and nginx for its first part; `synced` writes that
part to the cache's disk, too, and syncs it, as the daemon must before it sends a byte. The figures of a round
are measured one after the other, each with a model of its own; ratios are of the medians.
"""

from __future__ import annotations

import argparse
import http.client
import logging
import os
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from bench.measure import MIB, random_file
from tests.ground.hub import Hub
from tests.ground.hub_client import NEVER_RESUMES, endpoint_node, endpoint_of
from tests.ground.nginx import Nginx
from tests.ground.node import Node

FILE = "model.safetensors"
PART = 32 * MIB  # what the daemon asks for at once of a large file
READS = 5  # of a ready file in each round, and as many from nginx in turn
_BUFFER = bytearray(MIB)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hub_endpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="rounds; medians are shown")
    parser.add_argument("--mib", type=int, default=512, help="size of the file")
    parser.add_argument("--place", default=None, help="directory for the files and the cache")
    asked = parser.parse_args()
    logging.getLogger("aiohttp.server").disabled = True
    figures: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="hub-endpoint-", dir=asked.place) as place:
        measure(Path(place), asked.runs, asked.mib * MIB, figures)
    shown = Table("figure", "median", "lowest", "highest")
    for name, values in figures.items():
        shown.add_row(
            name, *(f"{value:.3f} s" for value in (statistics.median(values), min(values), max(values)))
        )
    Console().print(shown)
    middle = {name: statistics.median(values) for name, values in figures.items()}
    for text, above, below, goal in [
        ("first byte, pulled / direct first part", "first byte, pulled", "direct first part", "<= 2"),
        ("first byte, pulled / the same, synced", "first byte, pulled", "the same, synced", "<= 2"),
        ("complete, pulled / plain pull", "complete, pulled", "plain pull", "<= 1.1"),
        ("speed ready / nginx", "nginx", "ready", ">= 0.8"),
    ]:
        Console().print(f"{text}: {middle[above] / middle[below]:.2f} (goal {goal})")


def measure(place: Path, runs: int, size: int, figures: dict[str, list[float]]) -> None:
    """Fill in the figures of all rounds. The first round is not counted."""
    (place / "lfs").mkdir()
    with Hub() as hub, Nginx(place) as nginx, endpoint_node(place / "root", hub, limit_bytes="100%") as node:
        hub.cdn.url = nginx.url  # the signed addresses lead to nginx
        for number in range(runs + 1):
            counted = figures if number else defaultdict(list)
            for kind in ("plain", "pulled") if number % 2 else ("pulled", "plain"):
                new = place / f"{kind}-{number}"  # another name has other bytes, so nothing is here already
                digest = random_file(new, size)
                new.rename(place / "lfs" / digest)
                hub.add(f"org/{kind}-{number}", {FILE: place / "lfs" / digest})
                warm(f"{nginx.url}/lfs/{digest}")
                os.sync()  # or the next syncs would also write this file
                if kind == "plain":
                    counted["plain pull"].append(pulled(node, f"hf://org/plain-{number}"))
                    counted["direct first part"].append(direct(hub, f"org/plain-{number}"))
                    counted["the same, synced"].append(direct(hub, f"org/plain-{number}", place / "synced"))
                else:
                    first, whole = streamed(node, f"org/pulled-{number}")
                    counted["first byte, pulled"].append(first)
                    counted["complete, pulled"].append(whole)
                    ready = f"{endpoint_of(node)}/org/pulled-{number}/resolve/main/{FILE}"
                    warm(ready)
                    for _ in range(READS):
                        counted["ready"].append(read(ready)[1])
                        counted["nginx"].append(read(f"{nginx.url}/lfs/{digest}")[1])
            for name in (f"org--plain-{number}", f"org--pulled-{number}"):
                node.ready(name)
                node.ask("DELETE", f"/v1/models/{name}?force=true")
            for path in (place / "lfs").iterdir():
                path.unlink()


def read(
    url: str, headers: dict[str, str] | None = None, into: BinaryIO | None = None
) -> tuple[float, float]:
    """Seconds until the first byte of a body and until its last, from the request on."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=600)
    began = time.perf_counter()
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    connection.request("GET", target, headers={"User-Agent": NEVER_RESUMES, **(headers or {})})
    response = connection.getresponse()
    if location := response.getheader("Location"):
        response.read()
        connection.close()
        before = time.perf_counter() - began
        first, last = read(
            f"http://{parts.netloc}{location}" if location.startswith("/") else location, headers, into
        )
        return before + first, before + last
    assert response.status in (200, 206), response.status
    first = 0.0
    while count := response.readinto(_BUFFER):
        first = first or time.perf_counter() - began
        if into:
            into.write(memoryview(_BUFFER)[:count])
    connection.close()
    return first, time.perf_counter() - began


def warm(url: str) -> None:
    """Bring a file into the page cache."""
    read(url)


def direct(hub: Hub, repo: str, file: Path | None = None) -> float:
    """Seconds to ask the Hub for the commit and the address of a file, and nginx for its first part.

    With `file`, also to write the part there, and to sync it.
    """
    began = time.perf_counter()
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=600)
    connection.request("GET", f"/api/models/{repo}?blobs=true")
    connection.getresponse().read()
    connection.close()
    ranged = {"Range": f"bytes=0-{PART - 1}"}
    with file.open("wb", buffering=0) if file else nullcontext() as into:
        read(f"{hub.url}/{repo}/resolve/main/{FILE}", ranged, into)
        if into:
            os.fdatasync(into.fileno())
    return time.perf_counter() - began


def pulled(node: Node, ref: str) -> float:
    """Seconds of a pull, until the model is ready."""
    began = time.perf_counter()
    node.pull(ref)
    assert node.ready(ref.removeprefix("hf://").replace("/", "--"), wait=600).status == 200
    return time.perf_counter() - began


def streamed(node: Node, repo: str) -> tuple[float, float]:
    """As `read`, for a file that the node has to pull."""
    return read(f"{endpoint_of(node)}/{repo}/resolve/main/{FILE}")


if __name__ == "__main__":
    main()
