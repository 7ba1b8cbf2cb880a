"""Keeps free more of a shared disk than the kubelet does, so that cachd stops before the kubelet acts.

The kubelet deletes images and evicts pods when too little of a disk is free. Its thresholds are in its
configuration file:
https://kubernetes.io/docs/reference/config-api/kubelet-config.v1beta1/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cachd.errors import Invalid
from cachd.model import Percentage, SizeOrPercent, size_or_percent_of
from cachd.settings.file import read

_DEFAULTS = {"nodefs.available": "10%", "imagefs.available": "15%", "nodefs.inodesFree": "5%"}
_IMAGE_GC = 85
_MARGIN_PERCENT = 5.0
_OF_THE_NODE = (Path("/"), Path("/etc/hosts"))  # in a pod, /etc/hosts lies on the kubelet's own disk


@dataclass(frozen=True, slots=True)
class Reserves:
    """What `auto` keeps free of a disk: `free` of its bytes, `inodes` of its inodes.

    `threshold`: the kubelet acts when less than this percentage of the bytes is free.
    """

    threshold: Percentage
    free: Percentage
    inodes: Percentage


def reserves(root: Path, kubelet_config: Path, total_bytes: int) -> Reserves:
    """What to keep free of the root's disk of `total_bytes`: nothing if the node does not use that disk."""
    if not is_used_by_node(root):
        nothing = Percentage(0)
        return Reserves(threshold=nothing, free=nothing, inodes=nothing)
    free, inodes = thresholds(kubelet_config, total_bytes)
    return Reserves(threshold=free, free=with_margin(free), inodes=with_margin(inodes))


def is_used_by_node(root: Path) -> bool:
    """Whether the node keeps files of its own on the root's file system: images, logs, other pods' files."""
    device = root.stat().st_dev
    return any(place.exists() and place.stat().st_dev == device for place in _OF_THE_NODE)


def with_margin(*thresholds: Percentage) -> Percentage:
    """The largest of the thresholds plus a margin, at most 100 %."""
    return Percentage(min(max(each.percent for each in thresholds) + _MARGIN_PERCENT, 100.0))


def thresholds(path: Path, total_bytes: int) -> tuple[Percentage, Percentage]:
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
