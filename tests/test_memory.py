"""How many bytes of files memory can still take: what the kernel and every control group leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachd.kernel.memory import space_for_pages

GIB = 1 << 30
MEMINFO = f"MemTotal: {40 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {20 * GIB >> 10} kB\n"


def lay(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "room"),
    [
        ("0::/pod", {}, 18 * GIB),
        ("0::/pod", {"pod/memory.max": "max", "pod/memory.current": 5}, 18 * GIB),
        ("0::/pod", {"pod/memory.max": 4 * GIB, "pod/memory.current": GIB}, 3 * GIB),
        (
            "0::/pod/cachd",
            {
                "pod/memory.max": 4 * GIB,
                "pod/memory.current": 3 * GIB,
                "pod/memory.stat": f"anon 5\nactive_file {GIB >> 1}\ninactive_file {GIB >> 1}",
                "pod/cachd/memory.max": "max",
            },
            2 * GIB,
        ),
        (
            "5:cpu:/x\n4:memory:/pod\n0::/",
            {
                "memory/pod/memory.limit_in_bytes": 2 * GIB,
                "memory/pod/memory.usage_in_bytes": GIB,
                "memory/pod/memory.stat": f"total_active_file {GIB >> 2}\ntotal_inactive_file 0",
            },
            GIB + (GIB >> 2),
        ),
        ("0::/", {"memory.max": 10, "memory.current": 20}, 0),
    ],
    ids=["no group", "no limit", "a limit", "a limit above, full of files", "version 1", "over it"],
)
def test_the_room_is_what_the_kernel_and_every_group_leave(
    tmp_path: Path, cgroup: str, files: dict[str, object], room: int
) -> None:
    proc = lay(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": cgroup})
    assert space_for_pages(proc, lay(tmp_path / "cgroup", files)) == room


ODD: dict[str, tuple[dict[str, object], dict[str, object], int]] = {
    "no memory known": ({"self/cgroup": "0::/"}, {}, 0),
    "no group known": ({"meminfo": MEMINFO}, {"memory.max": 5}, 18 * GIB),
    "little memory": ({"meminfo": "MemTotal: 1000 kB\nMemAvailable: 49 kB\n"}, {}, 0),
    "just enough": ({"meminfo": "MemTotal: 1000 kB\nMemAvailable: 51 kB\n"}, {}, 1024),
    "a line without a number": ({"meminfo": f"Odd:\n\n{MEMINFO}"}, {}, 18 * GIB),
    "no usage": ({"meminfo": MEMINFO, "self/cgroup": "0::/pod"}, {"pod/memory.max": 5}, 18 * GIB),
    "the least of several": (
        {"meminfo": MEMINFO, "self/cgroup": "0::/a/b"},
        {
            "memory.max": 3 * GIB,
            "memory.current": 0,
            "a/memory.max": GIB,
            "a/memory.current": 0,
            "a/b/memory.max": 2 * GIB,
            "a/b/memory.current": 0,
        },
        GIB,
    ),
    "one of another controller": (
        {"meminfo": MEMINFO, "self/cgroup": "3:cpu,memory:/pod\n2:memoryless:/other"},
        {
            "memory/pod/memory.limit_in_bytes": 2 * GIB,
            "memory/pod/memory.usage_in_bytes": GIB,
            "memory/other/memory.limit_in_bytes": 5,
            "memory/other/memory.usage_in_bytes": 0,
        },
        GIB,
    ),
}


@pytest.mark.parametrize(("proc", "groups", "room"), ODD.values(), ids=ODD)
def test_what_is_not_known_limits_nothing_and_no_room_is_zero(
    tmp_path: Path, proc: dict[str, object], groups: dict[str, object], room: int
) -> None:
    (tmp_path / "proc").mkdir()
    assert space_for_pages(lay(tmp_path / "proc", proc), lay(tmp_path / "cgroup", groups)) == room


def test_groups_above_the_mount_are_not_asked(tmp_path: Path) -> None:
    proc = lay(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": "0::/pod"})
    lay(tmp_path, {"memory.max": 5, "memory.current": 0})
    assert space_for_pages(proc, lay(tmp_path / "cgroup", {"pod/x": ""})) == 18 * GIB
