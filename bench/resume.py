"""Resume: kill -9 when so much of a file has been sent, a new start, and what the origin has to send again.

The origin gives 40 MB/s a connection. Fetched again is all that it sent beyond the file's size: what was in
transfer at the kill, what was received but not in a journal, and what was in one but not trusted.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from bench import peers, report
from bench.measure import MIB, Failed, daemon, file_system, random_file, sink, spread, warmed
from bench.report import MB, Options
from tests.ground.node import Node
from tests.ground.origin import Origin

SIZE, QUICK_SIZE = 1024 * MIB, 64 * MIB
CONNECTION_RATE = 40 * MB
MARKS, QUICK_MARKS = (0.1, 0.5, 0.9), (0.5,)
RUNS = 3
PATH = "/model.bin"
LOOK_SECONDS = 0.002
PATIENCE_SECONDS = 120.0


class Client(Protocol):
    """What can be killed and started again on what it left."""

    def start(self) -> None:
        """Begin, or go on from what it left."""

    def kill(self) -> None:
        """By SIGKILL."""

    def finish(self) -> None:
        """Wait until the file is complete. Raises Failed."""


@dataclass(slots=True)
class Cachd:
    """A daemon that takes its pulls up again by itself."""

    node: Node
    ref: str
    asked: bool = False

    def start(self) -> None:
        """Ask for the pull, or start the daemon again."""
        if not self.asked:
            self.asked = True
            self.node.pull(self.ref, name="measured")
        else:
            self.node.start()

    def kill(self) -> None:
        """The daemon."""
        self.node.kill()

    def finish(self) -> None:
        """Wait until the model is ready, and delete it. Raises Failed."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (answer := self.node.ready("measured", wait=20)).status != 200:
            if time.monotonic() > deadline:
                raise Failed(f"not ready: {answer.document}")
        self.node.ask("DELETE", "/v1/models/measured")


@dataclass(slots=True)
class Aria2c:
    """aria2c that saves its state each second, as often as it can."""

    url: str
    target: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run aria2c."""
        words = (
            "-x16",
            "-s16",
            "-k1M",
            "--continue=true",
            "--auto-save-interval=1",
            "--file-allocation=none",
        )
        quiet = ("--quiet", "--no-conf", "-d", str(self.target.parent), "-o", self.target.name)
        self.process = subprocess.Popen(("aria2c", *words, *quiet, self.url))

    def kill(self) -> None:
        """The program."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def finish(self) -> None:
        """Wait for its end, and delete the file. Raises Failed."""
        assert self.process
        if status := self.process.wait(PATIENCE_SECONDS):
            raise Failed(f"aria2c ended with {status}")
        self.target.unlink()


def run(options: Options) -> dict[str, Any]:
    """Every mark with every client in turn, `runs` times and once before that is not counted."""
    runs = options.runs or (1 if options.quick else RUNS)
    size = options.size_bytes or (QUICK_SIZE if options.quick else SIZE)
    marks = QUICK_MARKS if options.quick else MARKS
    results = report.head("resume", options, size_bytes=size, rate=CONNECTION_RATE, runs=runs, cases=[])
    kind = "memory" if options.quick else "disk"  # a busy disk's syncs would decide what a short run keeps
    with sink("memory") as web, sink(kind) as place, Origin() as origin:
        url = origin.add(PATH, web / "model.bin") if random_file(web / "model.bin", size) else ""
        origin.rate = CONNECTION_RATE
        results["file_system"] = file_system(place)
        clients: dict[str, Callable[[], Any]] = {"cachd": lambda: cachd(place / "cache", url)}
        if peers.binary("aria2c"):
            clients["aria2c -x16"] = lambda: aria2c(place / "got", url)
        cases: list[dict[str, Any]] = [
            {"name": name, "mark": mark, "runs": []} for mark in marks for name in clients
        ]
        for turn in range(runs + 1):
            for case in cases:
                warmed(place, size)
                measured = killed_and_resumed(origin, clients[case["name"]], size, case["mark"])
                if turn:
                    case["runs"].append(measured)
        results["cases"] = cases
    return results


@contextmanager
def cachd(root: Path, url: str) -> Iterator[Client]:
    """A daemon with one pull."""
    with daemon(root) as node:
        yield Cachd(node, url)


@contextmanager
def aria2c(target: Path, url: str) -> Iterator[Client]:
    """One download by aria2c, which is killed at the end."""
    client = Aria2c(url, target)
    try:
        yield client
    finally:
        if client.process and client.process.poll() is None:
            client.kill()


def killed_and_resumed(
    origin: Origin, client_of: Callable[[], Any], size: int, mark: float
) -> dict[str, float]:
    """One life until `mark` of the bytes are sent, and the next until the file is complete."""
    origin.forget()
    with client_of() as client:
        client.start()
        seen(origin, int(size * mark))
        client.kill()
        before = origin.bytes_sent()
        origin.forget()
        began = time.monotonic()
        client.start()
        seen(origin, 1)
        first = time.monotonic() - began
        client.finish()
    after = origin.bytes_sent()
    return {"first_byte": first, "kept": max(0, size - after), "again": before + after - size}


def seen(origin: Origin, count: int) -> None:
    """Wait until the origin has sent so much. Raises Failed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while origin.bytes_sent() < count:
        if time.monotonic() > deadline:
            raise Failed("the origin was not asked for enough")
        time.sleep(LOOK_SECONDS)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The most that cachd fetched again."""
    ours = [run for case in results["cases"] if case["name"] == "cachd" for run in case["runs"]]
    return {"MB fetched again": max(run["again"] for run in ours) / MB}


LINES = ("", "killed at", "kept, MB", "fetched again, MB", "exec to first new byte, s")


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The cells below `LINES`."""
    return [
        [
            case["name"],
            f"{case['mark']:.0%}",
            spread((run["kept"] for run in case["runs"]), 1 / MB, 0),
            spread((run["again"] for run in case["runs"]), 1 / MB, 1),
            spread(run["first_byte"] for run in case["runs"]),
        ]
        for case in results["cases"]
    ]


def title(results: dict[str, Any]) -> str:
    """What was measured."""
    size, rate = results["size_bytes"] // MIB, results["rate"] / MB
    kind = results["file_system"]
    return (
        f"kill -9 in the download of one file of {size} MiB, {rate:.0f} MB/s a connection, to disk ({kind})"
    )


def table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    return report.table(title(results), LINES, cells(results))


def markdown(results: dict[str, Any]) -> str:
    """For the page."""
    return f"**{report.heading(title(results))}**\n\n{report.markdown(LINES, cells(results))}"
