"""What every benchmark measures with: processes, their CPU and memory; origins; places to write to.

A figure is the median of interleaved runs with the least and the most, the first turn left out: machines are
noisy and the first touch of memory is slow, so only ratios within one run say anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from tests.ground.nginx import Nginx
from tests.ground.node import Node

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PROJECT = Path(__file__).parent.parent
SAMPLE_SECONDS = 0.1  # a sample of a process with 60 threads takes a millisecond of the same cores
SHORT_SECONDS, OFTEN = 2.0, 3
_TICKS = os.sysconf("SC_CLK_TCK")
_MARGIN_BYTES = GIB  # of memory that is left to the programs


class Failed(RuntimeError):
    """A program that was measured ended with an error; the message ends with what it said."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: wall time, CPU of the process and its children, the peak of their anonymous memory."""

    seconds: float
    cpu_seconds: float
    anonymous_bytes: int

    def then(self, after: Run) -> Run:
        """Both, one after the other."""
        return Run(
            self.seconds + after.seconds,
            self.cpu_seconds + after.cpu_seconds,
            max(self.anonymous_bytes, after.anonymous_bytes),
        )


def command(*words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Run:
    """Run a program, from its start to its end. Raises Failed."""
    return _ended(words, env, cwd)[0]


def scripted(script: str | Path, *args: object, env: Mapping[str, str] | None = None) -> Run:
    """Run Python code that does its work inside `bench.clock.clocked()`: imports do not count. Raises Failed.

    `script` is the code or its file; `args` are its `sys.argv[1:]`.
    """
    code = ("-c", script) if isinstance(script, str) else (script,)
    run, output = _ended((sys.executable, *code, *args), {"PYTHONPATH": str(PROJECT), **(env or {})}, None)
    told = json.loads(output.splitlines()[-1])
    return Run(told["seconds"], told["cpu_seconds"], run.anonymous_bytes)


def observed(pid: int, work: Callable[[], object]) -> Run:
    """What `work` costs the running process `pid`, such as a daemon that does it."""
    before = cpu_seconds(pid)
    with _peak_of(pid) as peak:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    return Run(seconds, cpu_seconds(pid) - before, peak())


def cpu_seconds(pid: int) -> float:
    """CPU that the process and its children have used, the ended ones included; 0 once it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS + sum(map(cpu_seconds, _children(pid)))
    return 0.0


def anonymous_bytes(pid: int) -> int:
    """Memory of the process and its children that no file backs, shared or not; 0 once it has ended."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE)
        return KIB * sum(map(int, found)) + sum(map(anonymous_bytes, _children(pid)))
    return 0


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def interleaved(
    ways: Mapping[str, Callable[[], Run]],
    runs: int,
    pause: Callable[[], object] | None = None,
    failures: dict[str, str] | None = None,
    once: Collection[str] = (),
) -> dict[str, list[Run]]:
    """Every way once a turn, `runs` turns; where these are several, after one that is not counted.

    A single turn is taken as it comes. Of several, a way that takes less than SHORT_SECONDS runs OFTEN times
    in each: on a noisy machine one moment is a large part of it. `pause` is called before each run. Each turn
    has an order of its own: a way that always came after the heaviest would bear what that left behind, such
    as a quota that is used up. With `failures`, a way that raises Failed is noted there with its reason and
    not tried again; its runs so far are left out. A way of `once` runs in the first counted turn only.
    """
    kept: dict[str, list[Run]] = {name: [] for name in ways}
    often: dict[str, int] = {}
    order = random.Random(1)
    for turn in range(0 if runs > 1 else 1, runs + 1):
        names = [name for name in ways for _ in range(often.get(name, 1))]
        for name in order.sample(names, len(names)):
            if (failures and name in failures) or (name in once and turn != 1):
                continue
            if pause and runs > 1:
                pause()
            try:
                run = ways[name]()
            except Failed as error:
                if failures is None:
                    raise
                failures[name] = str(error)
                kept[name].clear()
                continue
            if turn:
                kept[name].append(run)
            elif run.seconds < SHORT_SECONDS:
                often[name] = OFTEN
            _say(f"  {f'run {turn}' if turn else 'warm-up'}: {name}: {run.seconds:.2f} s")
    return kept


def spread(values: Iterable[float], unit: float = 1.0, digits: int = 2) -> str:
    """`median (least-most)` of the values times `unit`."""
    scaled = [unit * value for value in values]
    middle, least, most = (f(scaled) for f in (statistics.median, min, max))
    return f"{middle:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"


@contextmanager
def serving(directory: Path, *, tls: bool = False, **more: Any) -> Iterator[Nginx]:
    """An nginx over `directory`: `.url`, and `.ca_file` with `tls`; `more` as Nginx has it.

    One worker for two cores, and cubic: bbr, where it is the default, paces loopback to less than half.
    """
    workers = max(1, (os.cpu_count() or 1) // 2)
    with Nginx(directory, tls=tls, congestion="cubic", workers=workers, **more) as nginx:
        yield nginx


def warmed(place: Path, size: int) -> None:
    """Touch the memory that a run is about to take, as far as there is room for `size` bytes and a margin.

    A virtual machine gives memory that is free for a second or so back to its host: a GB that was written
    then took up to 1.5 CPU seconds, and 0.2 at once.
    """
    os.sync()
    block = memoryview(bytes(MIB))
    room = min(shutil.disk_usage(place).free, available_bytes()) - _MARGIN_BYTES // 4
    file = place / "warm"
    with file.open("wb", buffering=0) as opened:
        for start in range(0, min(size + size // 4 + _MARGIN_BYTES // 4, room), MIB):
            os.pwrite(opened.fileno(), block, start)
    file.unlink()


@contextmanager
def daemon(root: Path, env: Mapping[str, str] | None = None, **options: object) -> Iterator[Node]:
    """A daemon over `root`, with these options; `env` is added to its environment."""
    plain = {"CACHD_LOG_LEVEL": "info", "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    with Node(root, options, **plain, **(env or {})) as node:
        yield node


def pulled(node: Node, ref: str) -> Run:
    """From asking for `ref` until it is ready: the daemon's seconds, CPU and memory. It is deleted again."""

    def pull() -> None:
        answer = node.pull(ref, name="measured")
        while answer.status == 202 or (answer.status == 503 and "Retry-After" in answer.headers):
            answer = node.ready("measured", wait=50)
        if answer.status != 200:
            raise Failed(f"{ref} is not ready: {answer.document}")

    run = observed(node.pid, pull)
    deleted = node.ask("DELETE", "/v1/models/measured")
    if deleted.status >= 400:
        raise Failed(f"{ref} cannot be deleted: {deleted.document}")
    return run


@contextmanager
def sink(kind: str) -> Iterator[Path]:
    """An empty directory to write to, removed afterwards.

    `memory` is a file system of huge pages of its own, which takes root; without, it is /dev/shm. There a
    small file takes 2 MiB: `small files` is memory in pages of 4 KiB. `disk` is on the project's file system.
    """
    if kind != "memory":
        where = PROJECT if kind == "disk" else "/dev/shm"
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=where, ignore_cleanup_errors=True) as place:
            yield _opened(place)
        return
    with contextlib.ExitStack() as undo:
        place = undo.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm"))
        mount = ("mount", "-t", "tmpfs", "-o", f"huge=always,size={_space_bytes()}", "bench", place)
        mounted = subprocess.run(mount, capture_output=True, text=True)
        if mounted.returncode:
            _say(f"memory is /dev/shm, in pages of 4 KiB: {mounted.stderr.strip()}")
        else:
            undo.callback(subprocess.run, ("umount", "--lazy", place), check=True)
        yield _opened(place)


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, with its page size where that is not the usual one."""
    found = subprocess.run(
        ("findmnt", "-n", "-o", "FSTYPE,OPTIONS", "-T", path), capture_output=True, text=True, check=True
    )
    kind, _, options = found.stdout.strip().partition(" ")
    return f"{kind}, huge pages" if "huge=always" in options else kind


def random_file(path: Path, size: int) -> str:
    """Write `size` random bytes to `path`, the same ones for the same name; their sha256 in hex."""
    source = numpy.random.Generator(numpy.random.SFC64(list(path.name.encode())))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, size, 16 * MIB):
            block = source.bytes(min(16 * MIB, size - start))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def available_bytes() -> int:
    """Memory that programs may still take, by the kernel's estimate."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * KIB


def machine() -> str:
    """What the figures need to be read: processor, cores, memory, kernel, Python."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.split(": ", 1)[1] for line in cpuinfo.splitlines() if line.startswith("model name")), ""
    )
    memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB)
    kernel = platform.release().split("-")[0]
    python = platform.python_version()
    return (
        f"{os.cpu_count()} cores {model or platform.machine()}, {memory} GiB, Linux {kernel}, Python {python}"
    )


def _ended(words: Iterable[object], env: Mapping[str, str] | None, cwd: Path | None) -> tuple[Run, str]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
        try:
            with _peak_of(process.pid) as peak:
                _, status, used = os.wait4(process.pid, 0)
                seconds = time.perf_counter() - began
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (output, errors):
            file.seek(0)
        said = output.read().decode(errors="replace")
        if process.returncode:
            told = errors.read().decode(errors="replace").strip() or said.strip()
            raise Failed(f"{process.args!r:.80} ended with {process.returncode}: {told[-2000:]}")
    return Run(seconds, used.ru_utime + used.ru_stime, peak()), said


@contextmanager
def _peak_of(pid: int) -> Iterator[Callable[[], int]]:
    """The most anonymous memory that the process and its children had inside the block, by samples."""
    most = 0
    over = threading.Event()

    def sample() -> None:
        nonlocal most
        while True:
            most = max(most, anonymous_bytes(pid))
            if over.wait(SAMPLE_SECONDS):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield lambda: most
    finally:
        over.set()
        sampler.join()


def _opened(place: str) -> Path:
    path = Path(place)
    path.chmod(0o755)  # a root that another user may not enter is refused
    return path


def _space_bytes() -> int:
    return max(available_bytes() - _MARGIN_BYTES, 64 * MIB)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
