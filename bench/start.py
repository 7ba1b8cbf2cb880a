"""Start: from exec until /readyz answers 200, over roots of 1 and 1,000 snapshots of 20 blobs, on disk.

`cold` is after every cached page and inode was dropped, as after a reboot; it takes root.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.measure import KIB, PROJECT, Failed, cpu_seconds, daemon, file_system, sink, spread
from bench.report import Options

SNAPSHOTS = (1, 1000)
BLOBS = 20
BLOB_SIZE = KIB
RUNS = 5
QUICK_SNAPSHOTS = (1, 3)
CACHES = ("warm", "cold")
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.001


def run(options: Options) -> dict[str, Any]:
    """Every root and cache in turn, `runs` times and once before that is not counted."""
    counts = QUICK_SNAPSHOTS if options.quick else SNAPSHOTS
    runs = options.runs or (1 if options.quick else RUNS)
    caches = CACHES if can_drop_caches() else CACHES[:1]
    cases: list[dict[str, Any]] = [
        {"snapshots": count, "cache": cache, "runs": []} for cache in caches for count in counts
    ]
    with sink("disk") as place:
        for count in counts:
            fill(place / str(count), count)
        for turn in range(runs + 1):
            for case in cases:
                measured = started(place / str(case["snapshots"]), case["cache"])
                if turn:
                    case["runs"].append(measured)
        kind = file_system(place)
    return report.head("start", options, blobs=BLOBS, file_system=kind, runs=runs, cases=cases)


def fill(root: Path, snapshots: int) -> None:
    """A root with so many snapshots, pulled by the daemon from a share; copied, as syncs take their time."""
    with tempfile.TemporaryDirectory(prefix="bench-start-", dir="/dev/shm") as memory:
        share, made = Path(memory, "share"), Path(memory, "root")
        chosen = random.Random(1)
        for number in range(snapshots):
            write_model(share / f"model-{number:04}", chosen)
        with daemon(made, allow=[f"file://{share}/"], pulls=8) as node:
            names = [node.pull(f"file://{model}/").document["name"] for model in sorted(share.iterdir())]
            for name in names:
                if node.ready(name).status != 200:
                    raise Failed(f"{name} is not ready")
        subprocess.run(("cp", "-a", made, root), check=True)
    os.sync()


def write_model(directory: Path, chosen: random.Random) -> None:
    """One model of random files, with their checksums."""
    directory.mkdir(parents=True)
    sums = ""
    for number in range(BLOBS):
        content = chosen.randbytes(BLOB_SIZE)
        name = f"model-{number:05}-of-{BLOBS:05}.safetensors"
        (directory / name).write_bytes(content)
        sums += f"{hashlib.sha256(content).hexdigest()}  {name}\n"
    (directory / "SHA256SUMS").write_text(sums)


def started(root: Path, cache: str) -> dict[str, float]:
    """Seconds from exec to the first 200 of /readyz, and the daemon's CPU until then. Raises Failed."""
    if cache == "cold":
        drop_caches()
    with tempfile.TemporaryFile("w+") as said, free_port() as port:
        words = (sys.executable, "-m", "cachd", "serve", "--root", root, "--listen", f"127.0.0.1:{port}")
        env = {**os.environ, "PYTHONPATH": str(PROJECT), "CACHD_LOG_LEVEL": "info"}
        began = time.monotonic()
        process = subprocess.Popen([str(word) for word in words], stderr=said, env=env)
        try:
            while not answers(port):
                if process.poll() is not None or time.monotonic() > began + PATIENCE_SECONDS:
                    said.seek(0)
                    raise Failed(f"the daemon did not get ready: {said.read()[-2000:]}")
            return {"seconds": time.monotonic() - began, "cpu_seconds": cpu_seconds(process.pid)}
        finally:
            process.terminate()
            process.wait()


def answers(port: int) -> bool:
    """Whether /readyz answers 200. While nobody listens, this takes a millisecond."""
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
    except ConnectionRefusedError:
        time.sleep(LOOK_SECONDS)
        return False
    with connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return connection.recv(4096).startswith(b"HTTP/1.1 200 ")


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody else is given while the daemon takes it: bound, and not listened on."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def can_drop_caches() -> bool:
    """Whether this user may; it takes root."""
    return os.access("/proc/sys/vm/drop_caches", os.W_OK)


def drop_caches() -> None:
    """Drop every cached page and inode, as a reboot would."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The seconds of a start over the most snapshots, with a warm page cache."""
    warm = {case["snapshots"]: report.median(case) for case in results["cases"] if case["cache"] == "warm"}
    return {"seconds, 1000 snapshots": warm[1000]} if 1000 in warm else {}


LINES = ("snapshots", "blobs", "page cache", "seconds to /readyz", "CPU seconds")


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The cells below `LINES`."""
    return [
        [
            f"{case['snapshots']:,}",
            f"{case['snapshots'] * results['blobs']:,}",
            case["cache"],
            spread(measured["seconds"] for measured in case["runs"]),
            f"{report.median(case, 'cpu_seconds'):.2f}",
        ]
        for case in results["cases"]
    ]


def title(results: dict[str, Any]) -> str:
    """What was measured."""
    return f"from exec to /readyz, the root on disk ({results['file_system']})"


def table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    return report.table(title(results), LINES, cells(results))


def markdown(results: dict[str, Any]) -> str:
    """For the page."""
    return f"**{report.heading(title(results))}**\n\n{report.markdown(LINES, cells(results))}"
