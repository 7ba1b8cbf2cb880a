"""Benchmarks: cachd against curl and the machine's own limits, interleaved in one run.

    cold    one file of random bytes from a local web server: verified, synced, published; against curl
            alone, curl followed by a sync and openssl's sha256, and that sha256 alone
    warm    a second pull of a ready model, and /ready, in milliseconds
    start   from exec to /readyz with models on disk

Figures are medians of interleaved runs with the least and the most; the machine is shared, so only ratios
within one run say anything. Results go to bench/results/results.json.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.ground import nginx as nginx_ground
from tests.ground.nginx import Nginx
from tests.ground.node import Node
from tests.ground.origin import Origin

RUNS = int(os.environ.get("BENCH_RUNS", "5"))
MIB = 1 << 20
SIZE = int(os.environ.get("BENCH_MIB", "1024")) * MIB
MODELS = 200
RESULTS = Path(__file__).parent / "results"
MEASUREMENTS = Path(__file__).parent / "measurements.md"


def main() -> None:
    """Run every benchmark and print the tables."""
    RESULTS.mkdir(exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        results["cold"] = cold(place)
        results["warm"] = warm(place)
        results["start"] = start(place)
    (RESULTS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    if "--keep" in sys.argv:  # python -m bench --keep && python -m bench.readme
        MEASUREMENTS.write_text(markdown(results))


def machine() -> str:
    """Cores and kernel, which is all that the figures need to be read."""
    kernel = platform.release().split("-")[0]
    return f"{os.cpu_count()} cores, Linux {kernel}, Python {platform.python_version()}"


def cold(place: Path) -> dict[str, list[float]]:
    """Seconds of each way to get one file, interleaved."""
    web = place / "web"
    web.mkdir()
    with (web / "model.bin").open("wb") as file:
        for _ in range(SIZE // (16 * MIB)):
            file.write(os.urandom(16 * MIB))
    digest = subprocess.run(["sha256sum", web / "model.bin"], capture_output=True, text=True, check=True)
    sha256 = digest.stdout.split()[0]
    with serving(web) as url:
        ref = f"{url}/model.bin#sha256={sha256}"
        ways: dict[str, Callable[[], object]] = {
            "cachd, verified, synced, published": lambda: direct_pull(place, ref),
            "curl": lambda: curl(place, url, verify=False),
            "curl, then sync, then openssl sha256": lambda: curl(place, url, verify=True),
            "openssl sha256 of the file alone": lambda: run("openssl", "dgst", "-sha256", web / "model.bin"),
        }
        return interleaved(ways)


@contextmanager
def serving(web: Path) -> Iterator[str]:
    """nginx where it is installed, else the test origin."""
    if nginx_ground.available():
        with Nginx(web) as nginx:
            yield nginx.url
    else:
        with Origin() as origin:
            for path in web.iterdir():
                origin.add(f"/{path.name}", path)
            yield origin.url


def direct_pull(place: Path, ref: str) -> None:
    root = place / "root"
    root.mkdir(mode=0o755)
    try:
        run(
            *(sys.executable, "-m", "cachd", "pull", ref, "--direct"),
            *("--root", root, "--allow", "127.0.0.0/8"),
        )
    finally:
        shutil.rmtree(root)


def curl(place: Path, url: str, *, verify: bool) -> None:
    target = place / "got"
    run("curl", "-sf", "-o", target, f"{url}/model.bin")
    if verify:
        run("sync", target)
        run("openssl", "dgst", "-sha256", target)
    target.unlink()


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def interleaved(ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of every way in every run; one turn before the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(RUNS + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def warm(place: Path) -> dict[str, list[float]]:
    """Seconds of a second POST and of /ready, a new connection each."""
    with Origin() as origin, Node(place / "warm", {"allow": [f"{origin.url}/"]}) as node:
        origin.add("/model.bin", os.urandom(MIB))
        ref = f"{origin.url}/model.bin"
        node.pull(ref)
        node.ready("model.bin")
        ways = {"second pull": lambda: node.pull(ref), "ready": lambda: node.ready("model.bin", wait=0)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(200):
            for name, way in ways.items():
                began = time.perf_counter()
                assert way().status == 200
                seconds[name].append(time.perf_counter() - began)
        return seconds


def start(place: Path) -> dict[str, list[float]]:
    """Seconds from exec to the answer of /readyz, with and without models."""
    share = place / "share"
    share.mkdir()
    models = []
    for number in range(MODELS):
        (share / f"model-{number}").write_bytes(os.urandom(1000))
        models.append({"ref": f"file://{share}/model-{number}"})
    seconds: dict[str, list[float]] = {"no model": [], f"{MODELS} models": []}
    options = {"allow": [f"file://{share}/"]}
    with Node(place / "empty", options) as empty, Node(place / "full", {**options, "models": models}) as full:
        for number in range(MODELS):
            assert full.ready(f"model-{number}").status == 200
        for _ in range(RUNS):
            for name, node in zip(seconds, (empty, full), strict=True):
                node.kill()
                began = time.perf_counter()
                node.start()
                assert node.ask("GET", "/readyz").status == 200
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(results: dict[str, Any]) -> None:
    """The tables of one run."""
    console = Console()
    console.print(f"{results['date']}, {results['machine']}, medians (least-most)")
    cold_medians = {name: statistics.median(s) for name, s in results["cold"].items()}
    ours = next(iter(cold_medians.values()))
    table = Table(f"cold pull, {SIZE // MIB} MiB", "seconds", "GB/s", "time against cachd's")
    for name, seconds in results["cold"].items():
        median = cold_medians[name]
        table.add_row(name, spread(seconds, 1, 2), f"{SIZE / median / 1e9:.2f}", f"{median / ours:.2f} x")
    console.print(table)
    table = Table("answers and start", "milliseconds")
    for part in ("warm", "start"):
        for name, seconds in results[part].items():
            table.add_row(name if part == "warm" else f"start with {name}", spread(seconds, 1000, 1))
    console.print(table)


def markdown(results: dict[str, Any]) -> str:
    """The tables of one run for the README."""
    medians = {name: statistics.median(seconds) for name, seconds in results["cold"].items()}
    ours = next(iter(medians.values()))
    lines = [
        f"{results['date']}, {results['machine']}, shared and noisy: medians of {RUNS} interleaved runs",
        "(least-most) from a local nginx to ext4, the start of each program included. `make bench` prints",
        "them anew; read the ratios.",
        "",
        f"| One file of {SIZE // MIB} MiB, cold | seconds | time against cachd's |",
        "|---|---|---|",
        *(
            f"| {name} | {spread(seconds, 1, 2)} | {medians[name] / ours:.2f} x |"
            for name, seconds in results["cold"].items()
        ),
        "",
        "| Answers and start | milliseconds |",
        "|---|---|",
        *(f"| {name} | {spread(seconds, 1000, 1)} |" for name, seconds in results["warm"].items()),
        *(
            f"| start with {name} | {spread(seconds, 1000, 0)} |"
            for name, seconds in results["start"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def spread(seconds: list[float], unit: int, digits: int) -> str:
    low, middle, high = (unit * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
