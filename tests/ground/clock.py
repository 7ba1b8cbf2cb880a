"""A wall clock that a daemon believes and a test moves while it runs. Monotonic time goes on as it does."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tests.ground.needs import libfaketime, preloadable, require


class Clock:
    """`env` is what a process needs to believe it. `env_at_start`: the same for one that ends before
    the clock moves, and that starts far sooner. Skips the test where there is no libfaketime.
    """

    def __init__(self, place: Path) -> None:
        require("faketime")
        self._told = place / "clock"
        self.set("+0")
        self.env_at_start = {
            "LD_PRELOAD": preloadable(str(libfaketime()), place),
            "FAKETIME_TIMESTAMP_FILE": str(self._told),
            "FAKETIME_CACHE_DURATION": "3600",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        self.env = {**self.env_at_start, "FAKETIME_NO_CACHE": "1"}

    def close(self) -> None:
        """Remove what libfaketime leaves in shared memory of processes that were killed."""
        for left in Path("/dev/shm").glob("*faketime_s*_*"):
            process = left.name.rpartition("_")[2]
            if not Path("/proc", process).exists():
                with suppress(OSError):  # another user's, or another run was quicker
                    left.unlink()

    def set(self, told: str) -> None:
        """As libfaketime reads it: `+1d`, `-1d`, `@1970-01-01 00:00:10`."""
        beside = self._told.with_suffix(".new")
        beside.write_text(told + "\n")
        beside.replace(self._told)
