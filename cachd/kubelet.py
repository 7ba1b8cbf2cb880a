"""Reads from the kubelet's configuration file how much of a shared disk must stay free."""

from __future__ import annotations

from pathlib import Path

from cachd.errors import Invalid
from cachd.model import Percentage, SizeOrPercent, size_or_percent_of
from cachd.settings.file import read

# https://kubernetes.io/docs/reference/config-api/kubelet-config.v1beta1/
_DEFAULTS = {"nodefs.available": "10%", "imagefs.available": "15%", "nodefs.inodesFree": "5%"}
_IMAGE_GC = 85


def kubelet_keeps(path: Path, total_bytes: int) -> tuple[Percentage, Percentage]:
    """The percentages of free bytes and of free inodes below which the kubelet deletes images or evicts pods.

    They come from KubeletConfiguration: evictionHard, evictionSoft and imageGCHighThresholdPercent. For keys
    that are missing, and for a file that cannot be read, the kubelet's documented defaults apply.
    `total_bytes`: the size of the disk, for thresholds given in bytes.
    """
    try:
        kubelet = read(path).keys
    except Invalid:
        kubelet = {}
    signals = [kubelet.get("evictionHard") or _DEFAULTS, kubelet.get("evictionSoft") or {}]
    kept = {"available": Percentage(0), "inodesFree": Percentage(0)}
    for name, value in ((n, v) for each in signals if isinstance(each, dict) for n, v in each.items()):
        _, _, what = str(name).partition(".")
        found = _threshold(value)
        if what in kept and found is not None:
            percent = found.percent if isinstance(found, Percentage) else 100 * found / total_bytes
            kept[what] = Percentage(min(max(kept[what].percent, percent), 100))
    images = str(kubelet.get("imageGCHighThresholdPercent", _IMAGE_GC))
    if images.isascii() and images.isdecimal() and int(images[:4]) <= 100:
        kept["available"] = Percentage(max(kept["available"].percent, 100 - int(images)))
    return kept["available"], kept["inodesFree"]


def _threshold(value: object) -> SizeOrPercent | None:
    try:
        return size_or_percent_of(value)
    except ValueError:
        return None
