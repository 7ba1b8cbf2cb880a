"""Was the machine itself during a run? A virtual one shares cores, caches and memory with others unseen.

Two signs, neither of which looks at what the run measured. A yardstick, the same work on every core before
and after the run, took more CPU time than it did at its best; or the hypervisor gave cores to others while
programs here wanted them. Such a run is made again, whoever's it is, and how many were is told.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy

MIB = 1 << 20
SLOWER = 1.2  # times the yardstick at its best
STOLEN = 0.05  # of the CPU time that programs here wanted
TRIES = 3
WAITS, WAIT_SECONDS = 10, 0.5
LENGTHS = 7
LOST_SHARE, LOST_SECONDS = 0.5, 60.0  # that waits and runs made again may take beside those that are kept

T = TypeVar("T")


@dataclass(slots=True)
class Count:
    """Runs that are kept, runs made again, and runs that are kept though the machine was not itself."""

    kept: int = 0
    again: int = 0
    disturbed: int = 0


class Yardstick:
    """A fixed piece of work on every core at once."""

    def __init__(self) -> None:
        self._blocks = [
            (os.urandom(2 * MIB), numpy.ones(32 * MIB, numpy.uint8), numpy.ones(32 * MIB, numpy.uint8))
            for _ in range(os.cpu_count() or 1)
        ]
        self.cpu_seconds()

    def cpu_seconds(self) -> float:
        """The median of several pieces: by the CPU clock, as what a run leaves behind may still work."""
        return statistics.median(self._piece() for _ in range(LENGTHS))

    def _piece(self) -> float:
        took: list[float] = []

        def work(block: bytes, source: numpy.ndarray, target: numpy.ndarray) -> None:
            began = time.thread_time()
            hashlib.sha256(block).digest()
            numpy.copyto(target, source)
            took.append(time.thread_time() - began)

        threads = [threading.Thread(target=work, args=blocks) for blocks in self._blocks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statistics.mean(took)


class Machine:
    """The machine, its best yardstick so far, and `count` of the runs on it."""

    def __init__(
        self,
        yardstick: Callable[[], float],
        times: Callable[[], tuple[float, float]],
        rest: Callable[[float], object] = time.sleep,
    ) -> None:
        self.count = Count()
        self._yardstick, self._times, self._rest = yardstick, times, rest
        self._best = float("inf")
        self._kept_seconds = self._lost_seconds = 0.0

    def undisturbed(self, work: Callable[[], T]) -> T:
        """What a run of `work` gave: the first that nothing disturbed, or the last that time was left for."""
        for tried in range(1, TRIES + 1):
            self._await()
            wanted, stolen = self._times()
            began = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - began
            wanted, stolen = (
                after - before for before, after in zip((wanted, stolen), self._times(), strict=True)
            )
            calm = stolen <= STOLEN * wanted and self._itself()
            if calm or tried == TRIES or not self._may_lose(seconds):
                break
            self._lost_seconds += seconds
            self.count.again += 1
        self._kept_seconds += seconds
        self.count.kept += 1
        self.count.disturbed += not calm
        return result

    def counted(self) -> Count:
        """What was counted, which is counted anew from here, as is the time that may be lost."""
        count, self.count = self.count, Count()
        self._kept_seconds = self._lost_seconds = 0.0
        return count

    def _itself(self) -> bool:
        measured = self._yardstick()
        self._best = min(self._best, measured)
        return measured <= SLOWER * self._best

    def _await(self) -> None:
        for _ in range(WAITS):
            if self._itself() or not self._may_lose(WAIT_SECONDS):
                return
            self._lost_seconds += WAIT_SECONDS
            self._rest(WAIT_SECONDS)

    def _may_lose(self, seconds: float) -> bool:
        return self._lost_seconds + seconds <= LOST_SHARE * self._kept_seconds + LOST_SECONDS


def cpu_times() -> tuple[float, float]:
    """CPU time that programs wanted on all cores since the start, and how much of it others got; in ticks."""
    told = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, told)
    return float(user + nice + system + irq + softirq + steal), float(steal)


@cache
def this() -> Machine:
    """The one that this process runs on."""
    return Machine(Yardstick().cpu_seconds, cpu_times)


def undisturbed(work: Callable[[], T], runs: int) -> T:
    """What a run on this machine gave, as Machine has it; one that is the only one is taken as it comes."""
    return this().undisturbed(work) if runs > 1 else work()


def told(count: Mapping[str, int]) -> str:
    """A sentence, or nothing where no run was watched."""
    if not count["kept"]:
        return ""
    kept, again, disturbed = count["kept"], count["again"], count["disturbed"]
    return (
        f" Of {kept + again} runs, {again} were made again because others disturbed the machine"
        f" (bench/steady.py); of the {kept} that are left, {disturbed} were disturbed, too."
    )
