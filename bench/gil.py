"""How much of a pull holds the interpreter's lock (GIL), and how many GB/s one process could move at most.

While one thread holds the lock no other runs Python: with ever more cores a process ends at
1 / (seconds of lock a GB). Two methods that err on different sides:

sampled   py-spy looks at the daemon 500 times a second: how often does a thread hold the lock? What it finds
          is wall time, a holder that waits for a core included, so the ceiling is rather too low. Its
          error is that of counting, 1 / sqrt(samples); a look that failed counts for nothing.
counted   the same engine in a process of its own, every call that lets go of the lock timed by its thread's
          CPU clock: all other CPU time needs the lock. The clocks' own cost, measured, is taken off; what
          the kernel does elsewhere for the process (threads, opens, TLS handshakes) counts as lock.

python -m bench.gil URL ROOT [CA]   is the second one's process.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.measure import (
    GIB,
    MIB,
    PROJECT,
    Failed,
    Run,
    daemon,
    pulled,
    random_file,
    serving,
    sink,
    spread,
    warmed,
)
from bench.peers import binary
from bench.report import GB, Options
from bench.steady import undisturbed

SIZE = 2 * GIB
QUICK_SIZE = 64 * MIB
RUNS = 3
LOOKS_A_SECOND = 500
FORMS = ("unverified", "verified")
TRANSPORTS = ("plaintext", "TLS")


def run(options: Options) -> dict[str, Any]:
    """Both methods, each transport, with sha256 and without."""
    size = options.size_bytes or (QUICK_SIZE if options.quick else SIZE)
    runs = options.runs or (1 if options.quick else RUNS)
    results = report.head("gil", options, size_bytes=size, runs=runs, cases=[])
    with sink("memory") as web, sink("memory") as place:
        sha256 = random_file(web / "model.bin", size)
        for transport in TRANSPORTS:
            with serving(web, tls=transport == "TLS") as origin:
                for form in FORMS:
                    ref = f"{origin.url}/model.bin" + (f"#sha256={sha256}" if form == "verified" else "")
                    counting = partial(counted, ref, place, size, origin.ca_file)
                    sampling = partial(sampled, ref, place, size, runs, origin.ca_file)
                    case = {
                        "transport": transport,
                        "form": form,
                        "sampled": undisturbed(sampling, runs),
                        "counted": [undisturbed(counting, runs) for _ in range(runs)],
                    }
                    results["cases"].append(case)
    return results


# sampled


def sampled(ref: str, place: Path, size: int, runs: int, ca_file: Path | None) -> dict[str, Any]:
    """Looks that found the lock held, looks that failed, and CPU seconds of `runs` pulls; else a `note`."""
    if binary("py-spy") is None:
        return {"note": "py-spy is not installed"}
    trust = {"ca_file": str(ca_file)} if ca_file else {}
    with daemon(place / "cache", **trust) as node:

        def pull() -> Run:
            warmed(place, size)
            return pulled(node, ref)

        pull()
        try:
            with looking(node.pid) as looks:
                pulls = [pull() for _ in range(runs)]
        except NotAllowed as error:
            return {"note": str(error)}
    return {**looks(), "cpu_seconds": sum(pull.cpu_seconds for pull in pulls)}


class NotAllowed(RuntimeError):
    """py-spy may not look into other processes here."""


@contextmanager
def looking(pid: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """py-spy looks at the process meanwhile; afterwards, what it saw. Raises NotAllowed."""
    found: dict[str, Any] = {}
    with tempfile.NamedTemporaryFile(suffix=".raw") as stacks, tempfile.TemporaryFile("w+") as said:
        words = ("record", "--gil", "--nonblocking", "--format", "raw", "--rate", str(LOOKS_A_SECOND))
        process = subprocess.Popen(
            [str(binary("py-spy")), *words, "--output", stacks.name, "--pid", str(pid)],
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            until = time.monotonic() + 10
            while "Sampling process" not in os.pread(said.fileno(), MIB, 0).decode():
                if process.poll() is not None or time.monotonic() > until:
                    said_last = os.pread(said.fileno(), MIB, 0).decode().strip().splitlines()[-1:]
                    raise NotAllowed(f"py-spy does not look: {' '.join(said_last)[:80]}")
                time.sleep(0.01)
            yield lambda: found
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            process.kill()
            process.wait()
        failed = re.search(r"Errors: (\d+)", os.pread(said.fileno(), MIB, 0).decode())
        held = sum(int(line.rpartition(" ")[2]) for line in Path(stacks.name).read_text().splitlines())
        found |= {"held": held, "failed": int(failed[1]) if failed else 0}


# counted


def counted(ref: str, place: Path, size: int, ca_file: Path | None) -> dict[str, float]:
    """CPU seconds of one pull: all, and those in calls that let go of the lock."""
    warmed(place, size)
    words = [
        sys.executable,
        "-m",
        "bench.gil",
        ref,
        str(place / "counted"),
        *([str(ca_file)] if ca_file else []),
    ]
    ended = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(PROJECT)}, capture_output=True, text=True
    )
    if ended.returncode:
        raise Failed(f"the counting pull failed: {ended.stderr[-2000:]}")
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


class Calls:
    """CPU seconds and number of the calls that are timed, by the clocks of the threads that make them."""

    def __init__(self) -> None:
        self._sums: dict[int, list[float]] = {}

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        clock, sums = time.thread_time_ns, self._sums

        def timed(*args: Any, **named: Any) -> Any:
            began = clock()
            try:
                return call(*args, **named)
            finally:
                mine = sums.setdefault(threading.get_ident(), [0, 0])
                mine[0] += (clock() - began) / 1e9
                mine[1] += 1

        return timed

    def total(self) -> tuple[float, float]:
        seconds, number = zip(*self._sums.values(), strict=True) if self._sums else ((), ())
        return sum(seconds), sum(number)


def cost() -> tuple[float, float]:
    """CPU seconds that timing a call adds: to what it tells, and to the thread."""
    calls, number = Calls(), 100_000

    def nothing() -> None:
        pass

    timed = calls.timed(nothing)
    began = time.thread_time()
    for _ in range(number):
        nothing()
    plain = time.thread_time() - began
    for _ in range(number):
        timed()
    return (calls.total()[0] - plain) / number, (time.thread_time() - began - 2 * plain) / number


def count(ref: str, root: Path, ca_file: Path | None = None) -> None:
    """Pull in this process, and tell its CPU seconds and those without the lock as one line of JSON."""
    from cachd.config import Config
    from cachd.daemon.logs import configure_logs
    from cachd.daemon.parts import assembled
    from cachd.model import ModelSpec, Ref
    from cachd.store import digests

    calls = Calls()
    for owner, names in (
        (socket.socket, ("recv_into", "sendall", "connect")),
        (ssl.SSLSocket, ("read", "do_handshake")),
        (os, ("pwrite", "preadv", "fsync", "fdatasync", "posix_fallocate", "ftruncate")),
        (digests.PartHash, ("update",)),
        (digests._InOrder, ("update",)),
    ):
        for name in names:
            setattr(owner, name, calls.timed(getattr(owner, name)))
    configure_logs("warning", "json")
    root.mkdir(mode=0o755, exist_ok=True)
    inside, whole = cost()
    with assembled(Config(root=root, allow=("127.0.0.0/8",), ca_file=ca_file, reserve_free=0)) as parts:
        for _ in range(2):  # the first imports, connects and touches memory
            (free, number), cpu = calls.total(), time.process_time()
            running = parts.pulls.start(ModelSpec(Ref.parse(ref), "measured"))
            assert running
            running.done.result()
            cpu = time.process_time() - cpu
            free, number = (b - a for a, b in zip((free, number), calls.total(), strict=True))
            parts.pulls.delete("measured")
    told = {"cpu_seconds": cpu - number * whole, "free_seconds": free - number * inside, "calls": number}
    print(json.dumps(told))


# told


def sampled_seconds(case: dict[str, Any], runs: int) -> float | None:
    """Seconds of lock a pull, by py-spy."""
    looks = case["sampled"]
    return looks["held"] / LOOKS_A_SECOND / runs if "held" in looks else None


def counted_seconds(case: dict[str, Any]) -> list[float]:
    return [run["cpu_seconds"] - run["free_seconds"] for run in case["counted"]]


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Ceilings by the method that sees more of the lock, with sha256 or without, whichever is lower."""
    found: dict[str, float] = {}
    size = results["size_bytes"] / GB
    for transport in TRANSPORTS:
        cases = [case for case in results["cases"] if case["transport"] == transport]
        for case in cases:
            cpu = statistics.median(run["cpu_seconds"] for run in case["counted"])
            share = statistics.median(counted_seconds(case)) / cpu
            found[f"share of the CPU time, {transport}, {case['form']}"] = share
        seconds = [s for case in cases if (s := most(case, results["runs"]))]
        if seconds:
            found[f"GB/s ceiling, {transport}"] = size / max(seconds)
    return found


def most(case: dict[str, Any], runs: int) -> float:
    return max(statistics.median(counted_seconds(case)), sampled_seconds(case, runs) or 0.0)


LINES = ("", "form", "CPU s/GB", "lock s/GB, counted", "lock s/GB, sampled", "share", "GB/s a process")


def cells(results: dict[str, Any]) -> list[list[str]]:
    size, runs = results["size_bytes"] / GB, results["runs"]
    lines = []
    for case in results["cases"]:
        looks, seconds = case["sampled"], sampled_seconds(case, runs)
        cpu = [run["cpu_seconds"] for run in case["counted"]]
        by_looks = looks.get("note", "")
        if seconds is not None:
            error = seconds / math.sqrt(looks["held"]) if looks["held"] else 1 / LOOKS_A_SECOND / runs
            by_looks = f"{seconds / size:.3f} ± {error / size:.3f}"
        share = statistics.median(counted_seconds(case)) / statistics.median(cpu)
        lines.append(
            [
                case["transport"],
                case["form"],
                spread(value / size for value in cpu),
                spread((value / size for value in counted_seconds(case)), digits=3),
                by_looks,
                f"{share:.0%}",
                f"{size / most(case, runs):.1f}",
            ]
        )
    return lines


def table(results: dict[str, Any]) -> Table:
    return report.table("the interpreter's lock, and what it lets one process move", LINES, cells(results))


def markdown(results: dict[str, Any]) -> str:
    return report.markdown(LINES, cells(results))


def plot(results: dict[str, Any], path: Path) -> None:
    size, runs = results["size_bytes"] / GB, results["runs"]
    bars: dict[str, list[float]] = {}
    for case in results["cases"]:
        name = f"cachd, {case['transport']}, {case['form']}"
        bars[f"{name}, counted"] = [seconds / size for seconds in counted_seconds(case)]
        if (seconds := sampled_seconds(case, runs)) is not None:
            bars[f"{name}, sampled"] = [seconds / size]
    report.bars(path, {"holding the interpreter's lock": bars}, "s/GB")


if __name__ == "__main__":
    count(sys.argv[1], Path(sys.argv[2]), *map(Path, sys.argv[3:]))
