"""Whose disk it is, and what a kubelet keeps free of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachd.kubelet import is_used_by_node, thresholds, with_margin
from cachd.model import Percentage
from tests.ground.small import MIB, Disks, Engines


def test_a_disk_that_the_node_uses_is_told_from_one_of_its_own(disk: Disks) -> None:
    assert is_used_by_node(Path("/etc"))
    assert not is_used_by_node(disk(MIB))


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("", (15, 5)),
        ("not: [yaml", (15, 5)),
        ("imageGCHighThresholdPercent: 70", (30, 5)),
        ("evictionHard: {nodefs.available: 25%, nodefs.inodesFree: 8%}", (25, 8)),
        ("evictionHard: {imagefs.available: 300Gi}", (30, 0)),
        ("evictionSoft: {nodefs.available: 40%}", (40, 5)),
        ("evictionHard: {nodefs.available: 25%, imagefs.available: 20%}", (25, 0)),
        ("evictionHard: {imagefs.available: 20%, nodefs.available: 25%}", (25, 0)),
        ("evictionHard: {nodefs.available: 40%}\nevictionSoft: {nodefs.available: 30%}", (40, 0)),
        ("evictionSoft: {nodefs.available: 30%, imagefs.available: 40%}", (40, 5)),
        ("imageGCHighThresholdPercent: 70\nevictionHard: {nodefs.available: 20%}", (30, 0)),
        ("imageGCHighThresholdPercent: 95", (15, 5)),
        ("imageGCHighThresholdPercent: 100\nevictionHard: {nodefs.available: 7%}", (7, 0)),
        ("imageGCHighThresholdPercent: 101", (15, 5)),
    ],
)
def test_the_kubelets_thresholds_are_read_from_its_file(
    tmp_path: Path, told: str, kept: tuple[float, float]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(told)
    found = thresholds(file, 1000 << 30)
    assert tuple(share.percent for share in found) == kept
    assert with_margin(found[0]).percent == kept[0] + 5, "cachd stops before the kubelet begins"


@pytest.mark.parametrize("order", [(10, 30), (30, 10)], ids=str)
def test_of_two_thresholds_cachd_keeps_to_the_larger(order: tuple[int, int]) -> None:
    assert with_margin(*map(Percentage, order)) == Percentage(35)
    assert with_margin(Percentage(98)) == Percentage(100)


def test_without_the_kubelets_file_a_fifth_of_a_shared_disk_stays_free(tmp_path: Path) -> None:
    free, _ = thresholds(tmp_path / "absent", 1 << 40)
    assert with_margin(free) == Percentage(20)


def test_the_reserve_of_a_shared_disk_is_the_nodes_and_of_another_nothing(
    disk: Disks, engine: Engines, root: Path
) -> None:
    own = engine(root=disk(8 * MIB), reserve_free="auto").store.space.capacity()
    assert (own.reserve_free, own.reserve_inodes) == (0, 0)
    if not is_used_by_node(root):
        pytest.skip("the test's directory is on a disk of its own")
    shared = engine(root=root, reserve_free="auto").store.space.capacity()
    assert shared.reserve_free == shared.total // 5
