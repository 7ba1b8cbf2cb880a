"""System calls that fail or dawdle: a command run under strace, which answers in the kernel's place."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest


@cache
def permitted() -> bool:
    """Whether strace is here and may trace a child."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True).returncode == 0


needs_strace = pytest.mark.skipif(not permitted(), reason="no strace (apt-get install strace), or no ptrace")


def injected(command: Sequence[str], fault: str, *, on: Path) -> list[str]:
    """`command` with `fault`, such as `fdatasync:error=EIO:when=1`, in its calls on the file `on`.

    strace counts calls in each thread.
    """
    call = fault.partition(":")[0]
    return [
        *("strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-P", str(on)),
        *("-e", f"trace={call}", "-e", f"inject={fault}", *command),
    ]
