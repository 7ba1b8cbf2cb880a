"""Logs the progress of running pulls, for those who see no progress bar.

A pull gets a line when another 10 seconds or 5 % of it have passed, or when it begins to wait for something
else, but at most one a second. While no byte arrives, it gets one a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from cachd.kernel.periodic import Periodic
from cachd.transfer.pulls import Pulls
from cachd.transfer.request import Pull
from cachd.transfer.waits import Reason

log = structlog.get_logger(__name__)

_TICK_SECONDS = 1.0
_STEP_SECONDS, _STEP, _SILENT_SECONDS = 10.0, 0.05, 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """How far a pull is at the time `at` (monotonic), and what it waits for."""

    at: float
    state: str
    waits: Reason | None
    done: int
    total: int

    def deserves_a_line(self, before: Seen) -> bool:
        """Whether to log this, when `before` was logged last."""
        seconds, arrived = self.at - before.at, self.done - before.done
        if (self.state, self.waits) != (before.state, before.waits) or seconds >= _SILENT_SECONDS:
            return True
        return arrived > 0 and (seconds >= _STEP_SECONDS or arrived >= _STEP * self.total)


class ProgressLog:
    """A thread that logs the progress of the pulls that have a slot."""

    def __init__(self, pulls: Pulls, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pulls, self._clock = pulls, clock
        self._logged: dict[Pull, Seen] = {}
        self._thread = Periodic("progress", self._log_all)

    def start(self) -> None:
        """Start the thread. Raises Unavailable."""
        self._thread.start(after=_TICK_SECONDS)

    def close(self) -> None:
        """Join the thread."""
        self._thread.close()

    def _log_all(self) -> float:
        at_work = self._pulls.at_work()
        self._logged = {pull: seen for pull, seen in self._logged.items() if pull in at_work}
        for pull in at_work:
            now = _seen(pull, self._clock())
            before = self._logged.setdefault(pull, now)
            if now.deserves_a_line(before):
                self._logged[pull] = now
                _log(pull, now)
        return _TICK_SECONDS


def _seen(pull: Pull, at: float) -> Seen:
    progress = pull.progress
    figures = progress.now
    waits = progress.waits(figures)
    return Seen(at, progress.state, waits.reason if waits else None, figures.done, progress.total)


def _log(pull: Pull, seen: Seen) -> None:
    eta = pull.progress.eta_seconds(pull.progress.now)
    log.info(
        "pull progress",
        name=pull.spec.name,
        state=seen.state,
        waits=seen.waits.value if seen.waits else None,
        done_bytes=seen.done,
        size_bytes=seen.total,
        percent=100 * seen.done // seen.total if seen.total else 0,
        bytes_per_second=round(pull.progress.rate),
        eta_seconds=None if eta is None else round(eta),
    )
