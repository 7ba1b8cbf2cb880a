"""Keeps free more of a shared disk than the kubelet does, so that cachd stops before the kubelet acts.

The kubelet deletes images and evicts pods when too little of a disk is free. Its thresholds are in its
configuration (https://kubernetes.io/docs/reference/config-api/kubelet-config.v1beta1/). A pod cannot read
that file. So they come from the first of these that is set and works:

    option      the option kubelet_thresholds
    kubelet     the kubelet itself, at kubelet_url (configz.py)
    file        the file kubelet_config
    defaults    the kubelet's documented defaults
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from cachd.errors import CachdError, Invalid
from cachd.model import Percentage, SizeOrPercent, size_or_percent_of
from cachd.settings.file import read

_DEFAULTS = {"nodefs.available": "10%", "imagefs.available": "15%", "nodefs.inodesFree": "5%"}
_IMAGE_GC = 85
_MARGIN_PERCENT = 5.0
_OF_THE_NODE = (Path("/"), Path("/etc/hosts"))  # in a pod, /etc/hosts lies on the kubelet's own disk


class ThresholdsFrom(StrEnum):
    """Where the thresholds in force come from."""

    option = "option"
    kubelet = "kubelet"
    file = "file"
    defaults = "defaults"


class KubeletOptions(Protocol):
    """The options that say where the thresholds may come from."""

    @property
    def kubelet_thresholds(self) -> Mapping[Any, SizeOrPercent]:
        """Thresholds by signal; empty: ask elsewhere."""

    @property
    def kubelet_url(self) -> str | None:
        """Where the kubelet answers."""

    @property
    def kubelet_token_file(self) -> Path:
        """The token for it."""

    @property
    def kubelet_ca_file(self) -> Path:
        """The authorities of its certificate."""

    @property
    def kubelet_config(self) -> Path:
        """Its configuration file."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The kubelet acts below these percentages of free bytes and free inodes.

    `reason`: why they do not come from a place that is set; empty if they do.
    """

    available: Percentage
    inodes: Percentage
    come_from: ThresholdsFrom
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Reserves:
    """What `auto` keeps free of a disk: `free` of its bytes, `inodes` of its inodes.

    `thresholds`: those of the kubelet; None on a disk that the node does not use.
    """

    free: Percentage
    inodes: Percentage
    thresholds: Thresholds | None = None

    def kubelet_bytes(self, total_bytes: int) -> int:
        """The kubelet acts when fewer bytes of the disk are free."""
        return self.thresholds.available.of(total_bytes) if self.thresholds else 0


def reserves(root: Path, config: KubeletOptions, total_bytes: int) -> Reserves:
    """What to keep free of the root's disk of `total_bytes`: nothing if the node does not use that disk.

    It may ask the kubelet, which takes at most three seconds.
    """
    if not is_used_by_node(root):
        return Reserves(free=Percentage(0), inodes=Percentage(0))
    found = thresholds(config, total_bytes)
    return Reserves(with_margin(found.available), with_margin(found.inodes), found)


def is_used_by_node(root: Path) -> bool:
    """Whether the node keeps files of its own on the root's file system: images, logs, other pods' files."""
    device = root.stat().st_dev
    return any(place.exists() and place.stat().st_dev == device for place in _OF_THE_NODE)


def with_margin(*thresholds: Percentage) -> Percentage:
    """The largest of the thresholds plus a margin, at most 100 %."""
    return Percentage(min(max(each.percent for each in thresholds) + _MARGIN_PERCENT, 100.0))


def thresholds(config: KubeletOptions, total_bytes: int) -> Thresholds:
    """The thresholds in force. `total_bytes`: the size of the disk, for thresholds given in bytes."""
    if config.kubelet_thresholds:
        stated = _largest(config.kubelet_thresholds.items(), total_bytes)
        return Thresholds(stated["available"], stated["inodesFree"], ThresholdsFrom.option)
    reasons = []
    if config.kubelet_url:
        try:
            return _of(_asked(config), total_bytes, ThresholdsFrom.kubelet)
        except CachdError as error:
            reasons.append(error.detail)
    try:
        keys, come_from = read(config.kubelet_config).keys, ThresholdsFrom.file
    except Invalid as error:
        keys, come_from = {}, ThresholdsFrom.defaults
        if config.kubelet_config.exists():
            reasons.append(error.detail)
    return _of(keys, total_bytes, come_from, reason="; ".join(reasons))


def _asked(config: KubeletOptions) -> Mapping[str, Any]:
    from cachd.configz import configuration  # a start without kubelet_url needs no HTTP client
    from cachd.sources.kubernetes_place import Place

    assert config.kubelet_url is not None
    return configuration(Place(config.kubelet_url, config.kubelet_token_file, config.kubelet_ca_file))


def _of(
    kubelet: Mapping[str, Any], total_bytes: int, come_from: ThresholdsFrom, reason: str = ""
) -> Thresholds:
    """The thresholds of a KubeletConfiguration: evictionHard, evictionSoft, imageGCHighThresholdPercent.

    For keys that are missing, the kubelet's documented defaults apply.
    """
    kept = _largest(_signals(kubelet), total_bytes)
    images = str(kubelet.get("imageGCHighThresholdPercent", _IMAGE_GC))
    if images.isascii() and images.isdecimal() and int(images[:4]) <= 100:
        kept["available"] = Percentage(max(kept["available"].percent, 100 - int(images)))
    return Thresholds(kept["available"], kept["inodesFree"], come_from, reason)


def _signals(kubelet: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    for each in (kubelet.get("evictionHard") or _DEFAULTS, kubelet.get("evictionSoft") or {}):
        if isinstance(each, Mapping):
            yield from each.items()


def _largest(signals: Iterable[tuple[object, object]], total_bytes: int) -> dict[str, Percentage]:
    """The largest threshold of free bytes (`available`) and of free inodes (`inodesFree`)."""
    kept = {"available": Percentage(0), "inodesFree": Percentage(0)}
    for name, value in signals:
        _, _, what = str(name).partition(".")
        found = _threshold(value)
        if what in kept and found is not None:
            percent = found.percent if isinstance(found, Percentage) else 100 * found / total_bytes
            kept[what] = Percentage(min(max(kept[what].percent, percent), 100))
    return kept


def _threshold(value: object) -> SizeOrPercent | None:
    if isinstance(value, int | Percentage):
        return value
    try:
        return size_or_percent_of(value)
    except ValueError:
        return None
