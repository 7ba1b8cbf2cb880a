"""How much of a shared disk the kubelet wants free, from its configuration file."""

from __future__ import annotations

from pathlib import Path

from cachd.errors import Invalid
from cachd.model import Percentage, SizeOrPercent, size_or_percent_of
from cachd.settings.file import read

_DEFAULTS = {"nodefs.available": "10%", "imagefs.available": "15%", "nodefs.inodesFree": "5%"}
_IMAGE_GC = 85


def kubelet_keeps(path: Path, total_bytes: int) -> tuple[Percentage, Percentage]:
    """Below which share of free bytes, and of free inodes, the kubelet deletes images or evicts pods.

    From its configuration file (KubeletConfiguration: evictionHard, evictionSoft and
    imageGCHighThresholdPercent), its documented defaults for what that does not say or cannot be read.
    """
    try:
        told = read(path).keys
    except Invalid:
        told = {}
    signals = [told.get("evictionHard") or _DEFAULTS, told.get("evictionSoft") or {}]
    kept = {"available": Percentage(0), "inodesFree": Percentage(0)}
    for name, value in ((n, v) for each in signals if isinstance(each, dict) for n, v in each.items()):
        _, _, what = str(name).partition(".")
        found = _threshold(value)
        if what in kept and found is not None:
            percent = found.percent if isinstance(found, Percentage) else 100 * found / total_bytes
            kept[what] = Percentage(min(max(kept[what].percent, percent), 100))
    images = str(told.get("imageGCHighThresholdPercent", _IMAGE_GC))
    if images.isascii() and images.isdecimal() and int(images[:4]) <= 100:
        kept["available"] = Percentage(max(kept["available"].percent, 100 - int(images)))
    return kept["available"], kept["inodesFree"]


def _threshold(value: object) -> SizeOrPercent | None:
    try:
        return size_or_percent_of(value)
    except ValueError:
        return None
