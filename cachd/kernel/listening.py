"""Says which users listen on a TCP port of this machine (proc(5), /proc/net/tcp)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"  # include/net/tcp_states.h
_ADDRESS, _STATE, _UID = 1, 3, 7  # columns


def listening_users(port: int) -> set[int]:
    """The user ids of the sockets that listen on the port, in this network namespace."""
    found = set()
    for table in _TABLES:
        with suppress(OSError, ValueError, IndexError):
            for line in table.read_text().splitlines()[1:]:
                cells = line.split()
                if cells[_STATE] == _LISTEN and int(cells[_ADDRESS].rpartition(":")[2], 16) == port:
                    found.add(int(cells[_UID]))
    return found
