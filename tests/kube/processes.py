"""The programs of the ground while they run: each with a log, and killed in the end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

PATIENCE_SECONDS = 300.0
T = TypeVar("T")


def until(what: Callable[[], T | None], waited_for: str, seconds: float = PATIENCE_SECONDS) -> T:
    """The first true answer. Raises TimeoutError, which names what was waited for."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain: {waited_for}")
        time.sleep(0.2)
    return found


class Processes:
    """Programs by name. A context manager: none of them is left when it ends."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str) -> None:
        """Start a program; it writes to `NAME.log`, to the end of it if it ran before."""
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(words, cwd=self.place, stdout=log, stderr=log)

    def log(self, name: str) -> Path:
        return self.place / f"{name}.log"

    def kill(self, name: str) -> None:
        """As a power cut does."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def check(self) -> None:
        """Raises RuntimeError, with the end of its log, if a program ended by itself."""
        for name, process in self.running.items():
            if process.poll() is not None:
                last = self.log(name).read_text(errors="replace")[-1500:]
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{last}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.running)):
            self.kill(name)


def run(*words: str | os.PathLike[str], given: str | None = None) -> str:
    """What a command prints. Raises RuntimeError with what it said if it failed."""
    ended = subprocess.run(words, input=given, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit {ended.returncode}: {ended.stderr[-2000:]}")
    return ended.stdout
