"""Decides how many short tasks run at once.

Python runs one thread at a time. A small file from a near origin costs little but Python, so a second thread
brings nothing: the threads only hand the interpreter's lock to each other. With four of them, a file took
twice the CPU time. More threads are needed where tasks wait for the network or the disk.
"""

from __future__ import annotations

from collections import deque

SHORT_CPU_SECONDS = 0.005  # longer tasks move many bytes: while they receive and hash, other threads run
_TASKS = 16  # the decision follows from the last ones
_HOLD_SECONDS = 0.05  # without the end of a task for so long, the running ones wait: more may run


class ShortTasks:
    """The last tasks of one kind. The caller guards it against use by several threads at once."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=_TASKS)  # seconds of waiting for each second of CPU
        self._enough: int | None = None
        self._until = 0.0

    def ended(self, seconds: float, cpu_seconds: float, now: float) -> None:
        """Note the end of a task that took `seconds`, and its thread `cpu_seconds` of CPU."""
        if cpu_seconds > SHORT_CPU_SECONDS:
            self._waits.clear()
        else:
            self._waits.append(max(0.0, seconds - cpu_seconds) / max(cpu_seconds, 1e-6))
        self._until = now + _HOLD_SECONDS
        # The least wait: the others also waited for the interpreter's lock.
        self._enough = 1 + round(min(self._waits)) if len(self._waits) == _TASKS else None

    def are_enough(self, running: int, now: float) -> bool:
        """Whether `running` tasks at once do as much as more of them would."""
        return self._enough is not None and running >= self._enough and now < self._until

    def seconds_left(self, now: float) -> float:
        """For how many seconds the answer of `are_enough` holds, if no task ends before."""
        return max(0.0, self._until - now)
