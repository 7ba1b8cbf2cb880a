"""How many bytes of files the page cache can still take without displacing anything from memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_KEPT_FREE = 0.05  # of all memory, for what processes allocate meanwhile


def space_for_pages(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the page cache can still take: MemAvailable (man 5 proc) minus 5 % of all memory.

    The control groups of this process limit it, too, because the kernel charges a page to the group that
    reads it first. File pages in memory count as free: a caller that wants to keep some must subtract these.
    """
    meminfo = _numbers(proc / "meminfo", ":")
    space = 1024 * (meminfo.get("MemAvailable", 0) - int(_KEPT_FREE * meminfo.get("MemTotal", 0)))
    return max(0, min([space, *_spaces_of_groups(proc, cgroups)]))


def _spaces_of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """The bytes left in each control group with a memory limit, of version 2 or 1.

    Source: the kernel's Documentation/admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    lines: list[str] = []
    with suppress(OSError):
        lines = (proc / "self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage = cgroups, "memory.max", "memory.current"
            files = ("active_file", "inactive_file")
        elif "memory" in controllers.split(","):
            top, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = ("total_active_file", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for at in (group, *group.parents):
            if at == top or top in at.parents:
                with suppress(OSError, ValueError):  # no limit: "max", or no such file in the top group
                    most, used = int((at / limit).read_text()), int((at / usage).read_text())
                    stat = _numbers(at / "memory.stat", " ")
                    yield most - used + sum(stat.get(name, 0) for name in files)


def _numbers(path: Path, separator: str) -> dict[str, int]:
    """The `name<separator>number` lines of a file; empty when it cannot be read."""
    found: dict[str, int] = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(separator)
            if words := rest.split():
                found[name] = int(words[0])
    return found
