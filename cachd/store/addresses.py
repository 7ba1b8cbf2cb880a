"""Keeps the immutable addresses of snapshots: links `models/NAME@REVISION`, each to one snapshot.

A name may lead to another snapshot later, while a pod still reads the old one; an address never does. No name
contains an '@'.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

import structlog

from cachd.kernel import durable
from cachd.model import Snapshot
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)

MARK = "@"


class Addresses:
    """The addresses of one root. Whoever changes one holds `Names.changing`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def chosen(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot, with the first of its possible addresses that no other snapshot has."""
        free = (a for a in snapshot.addresses if self._target(a) in (None, snapshot.manifest))
        return replace(snapshot, address=next(free, snapshot.addresses[-1]))

    def make(self, snapshot: Snapshot) -> None:
        """Link the snapshot's address to it. The caller syncs the directory. Raises OSError."""
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
        """Remove every address of a snapshot. With `revision`, reads only the links that contain it."""
        for address, target in self._all(revision):
            if target == manifest:
                durable.unlink(str(self._layout.address(address)))

    def settle(self, snapshots: Iterable[Snapshot], recorded: Collection[str]) -> None:
        """At start, give each snapshot its address, and remove the addresses of manifests not in `recorded`.

        On a full disk, some snapshots may lack their address.
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
            log.warning("disk full: addresses not made", root=str(self._layout.root))

    def _all(self, revision: str = "") -> Iterator[tuple[str, str]]:
        """Every address, or only those of a revision, with the manifest id that it leads to."""
        for entry in os.listdir(self._layout.models):
            if f"{MARK}{revision}" in entry and (target := self._target(entry)):
                yield entry, target

    def _target(self, address: str) -> str | None:
        """The manifest id that an address leads to. None if nothing is there; empty if it is no link."""
        try:
            return os.readlink(self._layout.address(address)).removeprefix(".trees/")
        except FileNotFoundError:
            return None
        except OSError:  # not made by cachd, and left alone
            return ""
