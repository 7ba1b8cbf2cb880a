"""The figures of the cache's file system: what counts as used, and when it is counted again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import CachdError
from cachd.model import Percentage
from cachd.store.capacity import Capacity, Usage
from cachd.store.layout import Layout
from cachd.store.meter import Meter
from cachd.store.root import make_directories
from tests.ground.models import noise
from tests.ground.stored import KIB, MIB


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def layout(small_disk: Callable[..., Path]) -> Layout:
    root = small_disk(16 * MIB, inodes=1000)
    make_directories(root)
    return Layout(root)


def meter_of(layout: Layout, clock: Clock, *copies: str, limit: int | None = None) -> Meter:
    meter = Meter(layout, clock, lambda: copies)
    meter.change(reserve_free=0, limit=limit, reserve_inodes=0)
    return meter


def put(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(noise(size))
    return path


def test_blocks_of_blobs_partial_downloads_and_deleted_files_are_counted_apart(
    layout: Layout, clock: Clock
) -> None:
    blob = put(layout.blobs / "sha256/a", 8 * KIB)
    os.link(blob, layout.models / "linked")  # what views link to counts once
    copied = put(layout.models / "copy", 12 * KIB)
    put(layout.ingests / "sha256-a-9/data", 16 * KIB)
    put(layout.damaged_blobs / "sha256-b", 4 * KIB)
    put(layout.staging / "deep/er/file", 4 * KIB)
    put(layout.trash / "gone", 20 * KIB)
    (layout.ingests / "link").symlink_to(layout.models)
    put(layout.root / "foreign", 100 * KIB)
    copies = str(copied), str(layout.models / "linked"), str(layout.models / "absent"), f"{copied}/below"
    found = meter_of(layout, clock, *copies).capacity(0, 0).usage
    assert found == Usage(blobs=20 * KIB, ingests=24 * KIB, held=20 * KIB)
    assert found.total == 64 * KIB


def test_figures_are_those_of_the_file_system_and_of_the_options(layout: Layout, clock: Clock) -> None:
    meter = meter_of(layout, clock)
    meter.change(reserve_free=Percentage(25), limit=Percentage(50), reserve_inodes=Percentage(10))
    status, found = os.statvfs(layout.root), meter.capacity(5, 3)
    assert (found.total, found.reserve_free, found.limit) == (16 * MIB, 4 * MIB, 8 * MIB)
    assert found.free == status.f_bavail * status.f_frsize
    assert (found.inodes, found.free_inodes, found.reserve_inodes) == (1000, status.f_favail, 100)
    assert (found.reserved, found.backed) == (5, 3)
    meter.change(reserve_free=7, limit=None, reserve_inodes=8)
    found = meter.capacity(0, 0)
    assert (found.reserve_free, found.limit, found.reserve_inodes) == (7, None, 8)


def test_used_space_is_counted_for_decisions_only_if_it_is_limited(layout: Layout, clock: Clock) -> None:
    put(layout.blobs / "sha256/a", 8 * KIB)
    for limit, used in ((None, 0), (MIB, 8 * KIB)):
        meter = meter_of(layout, clock, limit=limit)
        assert meter.bounded(0, 0).usage.total == meter.roughly(0, 0).usage.total == used
        assert meter.capacity(0, 0).usage.total == 8 * KIB


def test_a_count_is_repeated_only_when_blocks_or_inodes_changed(layout: Layout, clock: Clock) -> None:
    meter = meter_of(layout, clock)
    assert meter.capacity(0, 0).usage.total == 0
    put(layout.blobs / "sha256/a", 8 * KIB)
    assert meter.capacity(0, 0).usage.total == 8 * KIB
    (layout.blobs / "sha256/a").unlink()
    put(layout.ingests / "a", 8 * KIB)  # as many blocks and inodes as before
    assert meter.capacity(0, 0).usage == Usage(8 * KIB, 0, 0)
    put(layout.trash / "b", 1)
    assert meter.capacity(0, 0).usage == Usage(0, 8 * KIB, 4 * KIB)


def test_a_rough_figure_counts_once_a_second_and_adds_what_was_granted(layout: Layout, clock: Clock) -> None:
    meter = meter_of(layout, clock, limit=MIB)
    put(layout.blobs / "sha256/a", 8 * KIB)
    assert meter.roughly(0, 0).usage == Usage(8 * KIB, 0, 0)
    meter.granted += 4 * KIB
    put(layout.blobs / "sha256/b", 8 * KIB)
    clock.now += 1.0
    assert meter.roughly(0, 0).usage == Usage(8 * KIB, 4 * KIB, 0)
    clock.now += 0.1
    meter.allocating = KIB
    assert meter.roughly(0, 0).usage == Usage(16 * KIB, 0, 0)
    assert meter.granted == KIB, "what has no blocks yet is not counted"
    assert meter.roughly(0, 0).usage == Usage(16 * KIB, KIB, 0)


def test_nothing_bounds_what_may_be_taken_until_told(layout: Layout, clock: Clock) -> None:
    found = Meter(layout, clock, lambda: ()).capacity(0, 0)
    assert (found.reserve_free, found.limit, found.reserve_inodes) == (0, None, 0)


def test_a_root_that_is_gone_has_no_figures(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(CachdError):
        meter_of(Layout(tmp_path / "absent"), clock).capacity(0, 0)


# --- what follows from the figures ---


def capacity(**figures: int | Usage | None) -> Capacity:
    plain: dict[str, object] = {
        "total": 100,
        "free": 50,
        "reserved": 0,
        "backed": 0,
        "reserve_free": 10,
        "limit": None,
        "usage": Usage(10, 5, 5),
        "inodes": 100,
        "free_inodes": 50,
        "reserve_inodes": 10,
    }
    return Capacity(**{**plain, **figures})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("figures", "usable", "available", "is_limited"),
    [
        ({}, 90, 40, False),
        ({"backed": 15}, 90, 25, False),
        ({"backed": 45}, 90, -5, False),
        ({"reserve_free": 110}, 0, -60, False),
        ({"limit": 70}, 70, 40, False),
        ({"limit": 60}, 60, 40, False),
        ({"limit": 59}, 59, 39, True),
        ({"limit": 95}, 90, 40, False),
        ({"limit": 15, "backed": 1}, 15, -6, True),
    ],
)
def test_what_may_be_taken_follows_from_the_figures(
    figures: dict[str, int], usable: int, available: int, is_limited: bool
) -> None:
    now = capacity(**figures)
    assert (now.usable, now.available, now.is_limited) == (usable, available, is_limited)
    assert now.allocatable == available + figures.get("backed", 0)
    for size in (available - 1, available, available + 1):
        assert now.short_of(size) == max(size - available, 0)


@pytest.mark.parametrize(("inodes", "available"), [(100, 40), (0, None)])
def test_a_file_system_that_makes_inodes_as_needed_is_never_short_of_them(
    inodes: int, available: int | None
) -> None:
    now = capacity(inodes=inodes)
    assert now.available_inodes == available
    assert [now.short_of_inodes(count) for count in (39, 40, 41, 43)] == ([0, 0, 1, 3] if inodes else [0] * 4)
