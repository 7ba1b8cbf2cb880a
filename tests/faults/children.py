"""Work in a forked child: everything is imported already, and what kills the child harms nobody else.

The parent may have no thread that holds a lock: a fork copies the lock and not the thread.
"""

from __future__ import annotations

import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

HUNG_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: the signal that killed it, 0 for none; and the lines its work gave, when it ended
    by itself."""

    signal: int
    told: list[str]

    @property
    def killed(self) -> bool:
        return self.signal == signal.SIGKILL


def in_child(work: Callable[[], list[str]]) -> Ended:
    """Do `work` in a child. What it raises becomes a line, and so does a child that hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            told = work()
        except BaseException:  # noqa: BLE001 - whatever it is, the parent reports it
            told = [traceback.format_exc(limit=-6)]
        with os.fdopen(writing, "w") as out:
            json.dump([line[-2000:] for line in told[:20]], out)  # what a pipe holds
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        pidfd = os.pidfd_open(child)
        try:
            hung = not select.select([pidfd], [], [], HUNG_SECONDS)[0]
            if hung:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        finally:
            os.close(pidfd)
        said = answers.read()
    if hung:
        return Ended(0, ["hung"])
    if os.WIFSIGNALED(status):
        return Ended(os.WTERMSIG(status), [])
    return Ended(0, json.loads(said))
