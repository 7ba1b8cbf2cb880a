"""System calls that fail or dawdle: a command run under strace, which answers in the kernel's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.ground.needs import needs

needs_strace = needs("strace")


def injected(command: Sequence[str], fault: str, *, on: Path) -> list[str]:
    """`command` with `fault`, such as `fdatasync:error=EIO:when=1`, in its calls on the file `on`.

    strace counts calls in each thread.
    """
    call = fault.partition(":")[0]
    return [
        *("strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-P", str(on)),
        *("-e", f"trace={call}", "-e", f"inject={fault}", *command),
    ]
