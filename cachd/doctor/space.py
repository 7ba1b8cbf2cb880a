"""Checks disk space and inodes: against the options, and against what the kubelet does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.filesize import decimal

from cachd.config import Config
from cachd.daemon.store import bound
from cachd.doctor.codes import Code
from cachd.doctor.finding import Finding, State, ok
from cachd.doctor.root import place_of
from cachd.kubelet import ThresholdsFrom, is_used_by_node, reserves
from cachd.store.space import Space

_KNOWN = {
    ThresholdsFrom.option: "kubelet_thresholds",
    ThresholdsFrom.kubelet: "it said so",
    ThresholdsFrom.file: "its configuration",
    ThresholdsFrom.defaults: "its defaults",
}
_LITTLE_FREE = 0.05  # of the disk
_FREE_SPACE = "free space: cachd evict, cachd sweep --everything, or a larger disk"


def check_space(config: Config) -> Iterator[Finding]:
    """The figures of the disk, for when no daemon reports them."""
    space = Space(place_of(config))
    bound(space, place_of(config), config)
    now = space.capacity()
    figures = {
        "free_bytes": now.free,
        "reserved_bytes": 0,
        "total_bytes": now.total,
        "over_bytes": max(0, -now.allocatable),
        "free_inodes": now.free_inodes,
        "reserve_inodes": now.reserve_inodes,
        "inodes": now.inodes,
    }
    yield from space_findings(figures, over=State.warning)


def space_findings(figures: Mapping[str, Any], *, over: State) -> Iterator[Finding]:
    """The findings of figures as `GET /v1/capacity` has them. `over`: how bad it is to exceed a bound."""
    free, total = figures["free_bytes"] - figures["reserved_bytes"], figures["total_bytes"]
    shown = f"{decimal(max(free, 0))} of {decimal(total)} free"
    if figures["over_bytes"]:
        what = f"{shown}, {decimal(figures['over_bytes'])} over limit_bytes or reserve_free"
        yield Finding(Code.space, over, what, _FREE_SPACE)
    elif free <= _LITTLE_FREE * total:
        yield Finding(Code.space, State.warning, shown, _FREE_SPACE)
    else:
        yield ok(Code.space, shown)
    yield _inodes(figures)


def _inodes(figures: Mapping[str, Any]) -> Finding:
    free, reserve = figures["free_inodes"], figures["reserve_inodes"]
    if not figures.get("inodes", free):
        return ok(Code.inodes, "the file system makes inodes as needed")
    what = f"{free} inodes free, {reserve} of them reserved"
    hint = "delete small files, or make the file system again with more inodes (mkfs -N)"
    if free <= 0:
        return Finding(Code.inodes, State.wrong, what, hint)
    return Finding(Code.inodes, State.warning, what, hint) if free < reserve else ok(Code.inodes, what)


def check_kubelet(config: Config) -> Iterator[Finding]:
    """Whether cachd stops before the kubelet deletes images and evicts pods for lack of space."""
    place, total = place_of(config), Space(place_of(config)).bounded().total
    if not is_used_by_node(place):
        yield ok(Code.kubelet, "the disk is cachd's own: the kubelet's thresholds do not matter")
        return
    auto = reserves(place, config, total)
    known = auto.thresholds
    if known is None:
        return
    kept = auto.free if config.reserve_free == "auto" else config.reserve_free
    reserve = kept if isinstance(kept, int) else kept.of(total)
    what = (
        f"the kubelet acts below {known.available} ({_KNOWN[known.come_from]}),"
        f" reserve_free keeps {decimal(reserve)} free"
    )
    if reserve < auto.kubelet_bytes(total):
        hint = "set reserve_free: auto: below its threshold, the kubelet deletes images and evicts pods"
        yield Finding(Code.kubelet, State.warning, what, hint)
    elif known.reason:
        hint = "set kubelet_thresholds to the kubelet's evictionHard, or correct what fails"
        yield Finding(Code.kubelet, State.warning, f"{what}; {known.reason}", hint)
    else:
        yield ok(Code.kubelet, what)
