"""Start: from exec until /readyz answers 200, over roots of 1, 100 and 1,000 snapshots of 20 blobs, on disk.

The stages are seen from outside: the daemon notes itself in the root's lock file when it begins to open it,
and then listens. `cold` is after every cached page and inode was dropped, as after a reboot; it takes root.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.measure import KIB, PROJECT, Failed, cpu_seconds, daemon, file_system, sink, spread
from bench.report import Options
from bench.steady import undisturbed

SNAPSHOTS = (1, 100, 1000)
BLOBS = 20
BLOB_SIZE = KIB
RUNS = 5
QUICK_SNAPSHOTS = (1, 3)
CACHES = ("warm", "cold")
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.001
STAGES = ("imports", "root", "answers")
INTERPRETER = "python -c pass"


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
                start = partial(started, place / str(case["snapshots"]), case["cache"])
                if turn:
                    case["runs"].append(undisturbed(start, runs))
                else:
                    start()
        kind = file_system(place)
    interpreter = [bare() for _ in range(runs)]
    return report.head(
        "start", options, blobs=BLOBS, file_system=kind, runs=runs, interpreter=interpreter, cases=cases
    )


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
    directory.mkdir(parents=True)
    sums = ""
    for number in range(BLOBS):
        content = chosen.randbytes(BLOB_SIZE)
        name = f"model-{number:05}-of-{BLOBS:05}.safetensors"
        (directory / name).write_bytes(content)
        sums += f"{hashlib.sha256(content).hexdigest()}  {name}\n"
    (directory / "SHA256SUMS").write_text(sums)


def started(root: Path, cache: str) -> dict[str, float]:
    """Seconds from exec to the first 200 of /readyz, and of each stage; the daemon's CPU until then."""
    if cache == "cold":
        drop_caches()
    with tempfile.TemporaryFile("w+") as said, free_port() as port:
        words = (sys.executable, "-m", "cachd", "serve", "--root", root, "--listen", f"127.0.0.1:{port}")
        env = {**os.environ, "PYTHONPATH": str(PROJECT), "CACHD_LOG_LEVEL": "info"}
        began = time.time()
        process = subprocess.Popen([str(word) for word in words], stderr=said, env=env)
        try:
            opened, listening, answered = first_answer(port, process, began, root / ".cachd/lock")
            used = cpu_seconds(process.pid)
        except Failed as failed:
            said.seek(0)
            raise Failed(f"{failed}: {said.read()[-2000:]}") from failed
        finally:
            process.terminate()
            process.wait()
    return {
        "seconds": answered - began,
        "imports": opened - began,
        "root": listening - opened,
        "answers": answered - listening,
        "cpu_seconds": used,
    }


def first_answer(
    port: int, process: subprocess.Popen[bytes], began: float, lock: Path
) -> tuple[float, float, float]:
    """When the root was locked, a connection was taken first, and /readyz answered 200. Raises Failed."""
    opened = listening = 0.0
    while time.time() < began + PATIENCE_SECONDS and process.poll() is None:
        written = lock.stat().st_mtime
        opened = opened or (written if written > began else 0.0)  # answers touch it again
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
        except ConnectionRefusedError:
            time.sleep(LOOK_SECONDS)
            continue
        with connection:
            listening = listening or time.time()
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if connection.recv(4096).startswith(b"HTTP/1.1 200 "):
                return opened, listening, time.time()
    raise Failed("the daemon did not get ready")


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody else is given while the daemon takes it: bound, and not listened on."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def bare() -> float:
    """Seconds of an interpreter that does nothing."""
    began = time.perf_counter()
    subprocess.run((sys.executable, "-c", "pass"), check=True)
    return time.perf_counter() - began


def can_drop_caches() -> bool:
    return os.access("/proc/sys/vm/drop_caches", os.W_OK)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def find(results: dict[str, Any], snapshots: int, cache: str) -> dict[str, Any] | None:
    found = (c for c in results["cases"] if (c["snapshots"], c["cache"]) == (snapshots, cache))
    return next(found, None)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The named figure that the goals are judged by."""
    most = find(results, max(SNAPSHOTS), "warm")
    return {"seconds, 1000 snapshots": report.median(most)} if most else {}


LINES = ("snapshots", "blobs", "page cache", "seconds to /readyz", *STAGES, "CPU seconds")


def cells(results: dict[str, Any]) -> list[list[str]]:
    lines = [
        [
            f"{case['snapshots']:,}",
            f"{case['snapshots'] * results['blobs']:,}",
            case["cache"],
            spread(measured["seconds"] for measured in case["runs"]),
            *(f"{report.median(case, stage):.2f}" for stage in STAGES),
            f"{report.median(case, 'cpu_seconds'):.2f}",
        ]
        for case in results["cases"]
    ]
    return [*lines, [INTERPRETER, "", "warm", spread(results["interpreter"]), "", "", "", ""]]


def title(results: dict[str, Any]) -> str:
    return f"from exec to /readyz, the root on disk ({results['file_system']})"


def table(results: dict[str, Any]) -> Table:
    return report.table(title(results), LINES, cells(results))


def markdown(results: dict[str, Any]) -> str:
    return f"**{report.heading(title(results))}**\n\n{report.markdown(LINES, cells(results))}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Stages on top of each other."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    names = [f"{case['snapshots']:,}, {case['cache']}" for case in results["cases"]]
    left = [0.0] * len(names)
    for stage in STAGES:
        widths = [statistics.median(r[stage] for r in case["runs"]) for case in results["cases"]]
        axes.barh(names, widths, left=left, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds from exec")
    axes.set_ylabel("snapshots, page cache")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
