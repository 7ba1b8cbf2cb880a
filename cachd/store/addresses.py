"""Addresses that never move: `models/NAME@REVISION` leads to one snapshot for as long as it is here.

A name may lead elsewhere between a pod's first read and its last; an address may not. '@' is in no name.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

import structlog

from cachd.model import Snapshot
from cachd.store import durable
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)

MARK = "@"


class Addresses:
    """The addresses of one root. Changed under the lock of Snapshots."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def chosen(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with an address that leads to no other."""
        free = (a for a in snapshot.addresses if self._target(a) in (None, snapshot.manifest))
        return replace(snapshot, address=next(free, snapshot.addresses[-1]))

    def make(self, snapshot: Snapshot) -> None:
        """Let its address lead to a snapshot; the caller makes the name durable. Raises OSError."""
        if self._target(snapshot.address) == snapshot.manifest:
            return
        staged = self._layout.staging / f"{snapshot.address}.link"
        durable.make_link(staged, f".trees/{snapshot.manifest}")
        try:
            durable.move(staged, self._layout.address(snapshot.address))
        except BaseException:
            durable.unlink(str(staged))
            raise

    def remove(self, manifest: str, revision: str = "") -> None:
        """Take away every address of a snapshot. With its revision, the links of others are not read."""
        for address, target in self._all(revision):
            if target == manifest:
                durable.unlink(str(self._layout.address(address)))

    def settle(self, snapshots: Iterable[Snapshot], recorded: Collection[str]) -> None:
        """Let each of these have its address, and none lead to a snapshot that is not recorded.

        A full disk is no reason not to start.
        """
        found = dict(self._all())
        for address, target in found.items():
            if target not in recorded:
                durable.unlink(str(self._layout.address(address)))
        try:
            lacking = [s for s in snapshots if found.get(s.address) != s.manifest]
            for snapshot in lacking:
                self.make(snapshot)
            if lacking:
                durable.sync_directory(self._layout.models)
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("no room for an address", root=str(self._layout.root))

    def _all(self, revision: str = "") -> Iterator[tuple[str, str]]:
        """Every address, or those of a revision, with the snapshot that it leads to."""
        for entry in os.listdir(self._layout.models):
            if f"{MARK}{revision}" in entry and (target := self._target(entry)):
                yield entry, target

    def _target(self, address: str) -> str | None:
        """The snapshot that an address leads to; None when nothing is there, empty when that is no link."""
        try:
            return os.readlink(self._layout.address(address)).removeprefix(".trees/")
        except FileNotFoundError:
            return None
        except OSError:  # not ours, and left alone
            return ""
