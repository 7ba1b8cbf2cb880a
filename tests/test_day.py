"""A simulated day on a small disk, against the real daemon, in seconds."""

from __future__ import annotations

from tests.ground.day import simulated
from tests.ground.needs import needs
from tests.ground.shelf import MIB


@needs("root", "mount", "mkfs.ext4")
def test_a_day_on_a_small_disk_ends_with_nothing_that_must_not_happen() -> None:
    """Promised: Free space never falls below the reserve, and no model in use, leased or pinned is ever
    evicted.

    Each eviction freed what it was chosen for, too, and every figure is what the file system says.
    """
    day = simulated(128 * MIB, 100, seed=2)
    assert day["failures"] == []
    assert day["least_above_reserve_bytes"] >= 0
    counts = day["counts"]
    assert sum(count for name, count in counts.items() if name.startswith("evicted")) >= 3
    assert all(counts.get(name) for name in ("pull", "open", "lease", "fill"))
