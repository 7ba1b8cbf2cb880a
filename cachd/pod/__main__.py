"""Runs in the place of `cachd hold`, and holds its snapshot in half the memory."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from cachd.pod.hold import ENDS
from cachd.pod.mount import Mount

_HOLD_SECONDS = 2.0  # between two checks of a hold file that is held


def keep(fd: int, name: str, snapshot: str, mount: Mount) -> None:
    """Hold a snapshot until SIGTERM or SIGINT.

    If the snapshot was deleted by force and is pulled again, it is held again.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    while signal.sigtimedwait(ENDS, _HOLD_SECONDS) is None:
        if mount.is_held_by(fd, snapshot):
            continue
        again = mount.open_hold(snapshot)
        if again is not None:
            os.dup2(again, fd)
            os.close(again)
            print(f"{name}: snapshot {snapshot} came back and is held again", file=sys.stderr, flush=True)


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2], sys.argv[3], Mount(Path(sys.argv[4])))
