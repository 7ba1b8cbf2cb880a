"""How many bytes of files the node's memory can still take without pushing anything else out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_KEPT_FREE = 0.05  # of all memory: what processes may ask for meanwhile


def room_for_pages(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes: what the kernel could give (MemAvailable, man 5 proc) less a twentieth of all, and no more than
    the control groups of this process let it take, for pages are charged to who reads them first.

    File pages that are in memory already count as room: whoever wants to keep some takes them off.
    """
    told = _numbers(proc / "meminfo", ":")
    space = 1024 * (told.get("MemAvailable", 0) - int(_KEPT_FREE * told.get("MemTotal", 0)))
    return max(0, min([space, *_spaces_of_groups(proc, cgroups)]))


def _spaces_of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """The room in each group that has a limit, version 2 or 1 (Documentation/admin-guide/cgroup-*)."""
    lines: list[str] = []
    with suppress(OSError):
        lines = (proc / "self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, files = (
                cgroups,
                "memory.max",
                "memory.current",
                ("active_file", "inactive_file"),
            )
        elif "memory" in controllers.split(","):
            top, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = ("total_active_file", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for at in (group, *group.parents):
            if at == top or top in at.parents:
                with suppress(OSError, ValueError):  # "max", or no such file at the top: no limit
                    most, used = int((at / limit).read_text()), int((at / usage).read_text())
                    stat = _numbers(at / "memory.stat", " ")
                    yield most - used + sum(stat.get(name, 0) for name in files)


def _numbers(path: Path, separator: str) -> dict[str, int]:
    """`name<separator>number` lines; none when the file cannot be read."""
    found: dict[str, int] = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(separator)
            if words := rest.split():
                found[name] = int(words[0])
    return found
