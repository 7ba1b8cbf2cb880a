"""Upkeep: a flipped bit repaired, a model warmed from cold, verified, rolled back; beside the disk's rate.

The disk's rate is that of sequential reads past the page cache, 8 MiB at a time, four under way, of the same
file. Cold is a file whose pages the kernel was told to forget. Cold reads, warming and verifying take turns.
Beside what a verify leaves in memory stands what the kernel leaves there of a file that nobody touches.
"""

from __future__ import annotations

import mmap
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.measure import GIB, MIB, Failed, daemon, file_system, random_file, serving, sink, spread
from bench.report import GB, MB, Options
from cachd.kernel.calls import resident_bytes
from tests.ground.node import Node

SIZE, QUICK_SIZE = 4 * GIB, 64 * MIB
RUNS = 3
READ_BYTES, READERS = 8 * MIB, 4
NAME = "measured"
DISK, WARM, VERIFY, ALONE, REPAIR, ROLLBACK = (
    "the disk, cold",
    "warm, cold",
    "verify",
    "read, and left alone as long as a verify takes",
    "repair of one bit",
    "rollback",
)


def run(options: Options) -> dict[str, Any]:
    """Every piece of work in turn, `runs` times."""
    runs = options.runs or (1 if options.quick else RUNS)
    size = options.size_bytes or (QUICK_SIZE if options.quick else SIZE)
    results = report.head("upkeep", options, size_bytes=size, runs=runs)
    with sink("disk") as web, sink("disk") as place:
        digests = {name: random_file(web / name, each) for name, each in (("a", size), ("b", MIB))}
        with serving(web) as nginx, daemon(place / "cache", scrub_bytes_per_second=0) as node:
            for name in ("b", "a"):
                ref = f"{nginx.url}/{name}#sha256={digests[name]}"
                while node.pull(ref, name=NAME, replace=True).status != 200:  # 200: this one is ready
                    node.ready(NAME, wait=1)
            shown = (node.root / "models" / NAME / "a").resolve()
            rows: dict[str, list[dict[str, float]]] = {}
            for _ in range(runs):
                for work, measured in (
                    (DISK, disk(shown)),
                    (WARM, warm(node, shown)),
                    (VERIFY, verified := verify(node, shown)),
                    (ALONE, left_alone(shown, verified["seconds"])),
                    (REPAIR, repair(node, shown)),
                    (ROLLBACK, rollback(node)),
                ):
                    rows.setdefault(work, []).append(measured)
            results |= {"file_system": file_system(place), "rows": rows}
    return results


def chill(path: Path) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> int:
    with path.open("rb") as opened:
        return resident_bytes(opened.fileno(), 0, path.stat().st_size)


def disk(path: Path) -> dict[str, float]:
    """Read the file sequentially past the page cache."""
    chill(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    own = threading.local()

    def read(offset: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = mmap.mmap(-1, READ_BYTES)
        os.preadv(fd, [own.buffer], offset)

    began = time.monotonic()
    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(read, range(0, path.stat().st_size, READ_BYTES)))
    os.close(fd)
    return {"seconds": time.monotonic() - began}


def warm(node: Node, path: Path) -> dict[str, float]:
    chill(path)
    node.log.clear()
    node.ask("POST", f"/v1/models/{NAME}/warm")
    told = node.wait_for("warmed", name=NAME)
    if told["state"] != "warm":
        raise Failed(f"not warmed: {told}")
    return {"seconds": told["seconds"], "resident": resident(path) / path.stat().st_size}


def verify(node: Node, path: Path) -> dict[str, float]:
    """Read a warm model again; what of it is in memory afterwards."""
    began = time.monotonic()
    verification(node, "intact")
    return {"seconds": time.monotonic() - began, "resident": resident(path) / path.stat().st_size}


def left_alone(path: Path, seconds: float) -> dict[str, float]:
    """What the kernel keeps by itself of a file that was read: some take back what nobody touches."""
    with path.open("rb", buffering=0) as opened:
        while opened.read(READ_BYTES):
            pass
    time.sleep(seconds)
    return {"seconds": seconds, "resident": resident(path) / path.stat().st_size}


def verification(node: Node, state: str) -> None:
    node.log.clear()
    node.ask("POST", f"/v1/models/{NAME}/verify")
    told = node.wait_for("verified", name=NAME)
    if told["state"] != state:
        raise Failed(f"verified as {told['state']}, not {state}")


def repair(node: Node, path: Path) -> dict[str, float]:
    """Turn a bit over, and have it found and mended; from the alarm until it is ready again."""
    path.chmod(0o644)
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as seen:  # which the kernel tells nobody
        seen[len(seen) // 2] ^= 1
    path.chmod(0o444)
    before = node.metric("cachd_download_bytes_total")
    verification(node, "damaged")
    began = time.monotonic()
    published(node)
    return {
        "seconds": time.monotonic() - began,
        "fetched": node.metric("cachd_download_bytes_total") - before,
    }


def rollback(node: Node) -> dict[str, float]:
    """Back to what was before; and forth again, uncounted."""
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        while (answer := node.ask("POST", f"/v1/models/{NAME}/rollback")).status == 409:
            began = time.monotonic()  # the pull before has not told that it ended
        seconds.append(time.monotonic() - began)
        if answer.status != 200:
            raise Failed(f"not rolled back: {answer.document}")
    return {"seconds": seconds[0]}


def published(node: Node) -> None:
    """Wait until the name is ready. Raises Failed."""
    answer = node.ready(NAME)
    while answer.status == 503 and "Retry-After" in answer.headers:
        answer = node.ready(NAME)
    if answer.status != 200:
        raise Failed(f"not ready: {answer.document}")


def median(results: dict[str, Any], work: str, figure: str = "seconds") -> float:
    return statistics.median(run[figure] for run in results["rows"][work])


def figures(results: dict[str, Any]) -> dict[str, float]:
    return {
        "warm / disk": median(results, DISK) / median(results, WARM),
        "resident after verify": min(run["resident"] for run in results["rows"][VERIFY]),
        "resident when left alone": min(run["resident"] for run in results["rows"][ALONE]),
        "repair: MiB fetched": median(results, REPAIR, "fetched") / MIB,
        "repair: seconds": median(results, REPAIR),
        "rollback: seconds": max(run["seconds"] for run in results["rows"][ROLLBACK]),
    }


LINES = ("", "seconds", "GB/s", "fetched, MB", "in memory afterwards")


def cells(results: dict[str, Any]) -> list[list[str]]:
    lines = []
    for work, runs in results["rows"].items():
        rates = [results["size_bytes"] / run["seconds"] / GB for run in runs]
        lines.append(
            [
                work,
                spread((run["seconds"] for run in runs), digits=3),
                "" if work in (ALONE, ROLLBACK) else spread(rates),
                spread((run["fetched"] for run in runs), 1 / MB, 1) if "fetched" in runs[0] else "",
                spread(run["resident"] for run in runs) if "resident" in runs[0] else "",
            ]
        )
    return lines


def title(results: dict[str, Any]) -> str:
    return f"upkeep of one file of {results['size_bytes'] // MIB} MiB on disk ({results['file_system']})"


def table(results: dict[str, Any]) -> Table:
    return report.table(title(results), LINES, cells(results))


def markdown(results: dict[str, Any]) -> str:
    return f"**{report.heading(title(results))}**\n\n{report.markdown(LINES, cells(results))}"


def plot(results: dict[str, Any], path: Path) -> None:
    panel = {work: [run["seconds"] for run in runs] for work, runs in results["rows"].items()}
    report.bars(path, {title(results): panel}, "seconds")
