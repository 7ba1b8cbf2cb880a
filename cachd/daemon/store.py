"""Opens the store, and gives it its limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from cachd.config import Config
from cachd.errors import CachdError, InUse, Leased
from cachd.kernel import durable
from cachd.kernel.file_systems import shared_file_system
from cachd.kubelet import Reserves, Thresholds, reserves
from cachd.report.space import KubeletReport
from cachd.store.disk_store import DiskStore
from cachd.store.layout import Layout
from cachd.store.nodes import Term
from cachd.store.root import check_above, end_leases, own_directory
from cachd.store.space import Space
from cachd.store.store import Store

log = structlog.get_logger(__name__)

T = TypeVar("T")
UntilFree = Callable[[CachdError, Path], None]
_LEASED_SECONDS, _LEASED_AGAIN_SECONDS = 60.0, 0.5  # longer than fs.lease-break-time, by default 45 s


@dataclass(frozen=True, slots=True)
class Sharing:
    """The use of a root on a shared volume.

    `term`: the right to write there; without it, this process uses the root alone. `force`: evict and delete
    models although other nodes may use them.
    """

    term: Term | None = None
    force: bool = False


ALONE = Sharing()


def place_of(config: Config) -> Path:
    """The root that the options name, which exists, and which nobody else may replace. Raises CachdError."""
    if config.own_directory:
        return own_directory(config.root)
    check_above(config.root)
    return config.root


def shared_volume(config: Config, root: Path, *, counts_uncertain: bool) -> str:
    """Why other nodes may use the root, too: the option or the file system; empty if they do not.

    `counts_uncertain`: whether one that is often of one machine alone, as FUSE, counts. Raises CachdError.
    """
    if config.shared is not None:
        return "the option shared" if config.shared else ""
    found = None
    with durable.disk_errors(root), suppress(FileNotFoundError, NotADirectoryError):  # DiskStore refuses it
        found = shared_file_system(root)
    return found.name if found and (found.is_certain or counts_uncertain) else ""


def open_store(config: Config, until_free: UntilFree | None = None, sharing: Sharing = ALONE) -> DiskStore:
    """The store in the root, which is locked until the store's exit. Raises CachdError.

    `until_free` waits while another process holds the lock; without it, that is InUse.
    """
    root = place_of(config)
    volume = shared_volume(config, root, counts_uncertain=sharing.term is not None)
    if volume and not sharing.force:
        _say_shared(volume, is_asked_for=bool(config.shared or sharing.term))
    while True:
        try:
            return unleased(root, lambda: _opened(root, config, sharing, is_shared=bool(volume)))
        except InUse as error:
            if until_free is None or error.code != "root_locked":
                raise
            until_free(error, Layout(root).lock)


def _say_shared(volume: str, *, is_asked_for: bool) -> None:
    event = "shared volume: nothing is evicted or deleted without force"
    if is_asked_for:
        log.info(event, shared_by=volume)
    else:
        log.warning(event, shared_by=volume, hint="set shared: false if no other node uses this root")


def _opened(root: Path, config: Config, sharing: Sharing, *, is_shared: bool) -> DiskStore:
    return DiskStore(
        root,
        disk_at_least=config.disk_at_least,
        keep_previous=config.keep_previous,
        keep_opened_seconds=config.keep_opened_seconds,
        trust_claimed_digests=config.trust_claimed_digests,
        term=sharing.term,
        use_is_unknown=is_shared and not sharing.force,
    )


def unleased(root: Path, read: Callable[[], T], *, clock: Callable[[], float] = time.monotonic) -> T:
    """What `read` returns. It is called again while another process's lease blocks it.

    Raises Leased after a minute.
    """
    deadline = clock() + _LEASED_SECONDS
    while True:
        try:
            return read()
        except Leased as error:
            if clock() > deadline:
                raise
            log.warning("waiting for another process's file lease to end", reason=error.detail)
        end_leases(root)
        time.sleep(_LEASED_AGAIN_SECONDS)


def bound(space: Space, root: Path, config: Config) -> Reserves:
    """Give the space of a root its limit and its reserves. Returns the reserves of `auto`.

    The reserve `auto` is the kubelet's threshold and a margin on a disk shared with the node, else 0.
    """
    reserve_free, reserve_inodes = config.reserve_free, config.reserve_inodes
    auto = reserves(root, config, space.bounded().total)
    space.change(
        limit=config.limit_bytes,
        reserve_free=auto.free if reserve_free == "auto" else reserve_free,
        reserve_inodes=auto.inodes if reserve_inodes == "auto" else reserve_inodes,
    )
    return auto


class Bounds:
    """Gives a store its limit and its reserves, at the start and at each reload."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.kubelet: Thresholds | None = None  # in force; None on a disk that the node does not use

    def set(self, config: Config) -> None:
        """Apply the options. It may ask the kubelet first."""
        auto = bound(self._store.space, self._store.layout.root, config)
        self.kubelet = auto.thresholds
        now = self._store.space.bounded()
        if now.reserve_free < auto.kubelet_bytes(now.total):
            log.warning(
                "reserve_free is below the kubelet's threshold: it will delete images and evict pods",
                reserve_free_bytes=now.reserve_free,
                kubelet_bytes=auto.kubelet_bytes(now.total),
            )
        if self.kubelet and self.kubelet.reason:
            log.warning(
                "the kubelet's thresholds come from elsewhere than was set",
                come_from=self.kubelet.come_from.value,
                reason=self.kubelet.reason,
            )

    def kubelet_ratio(self) -> dict[str, float]:
        """The kubelet's threshold of free bytes, by where it comes from; empty if it does not matter."""
        now = self.kubelet
        return {now.come_from.value: now.available.percent / 100} if now else {}

    def report(self) -> KubeletReport | None:
        """The kubelet's thresholds, for GET /v1/capacity."""
        now = self.kubelet
        if now is None:
            return None
        return KubeletReport(
            available_percent=now.available.percent,
            inodes_percent=now.inodes.percent,
            thresholds_from=now.come_from.value,
            reason=now.reason or None,
        )
