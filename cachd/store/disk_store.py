"""Opens one root as a store, and puts the parts of the store together."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from cachd.kernel import durable
from cachd.kernel.leases import reports_open_files
from cachd.model import Digest, File, Manifest
from cachd.policy.eviction import OPENED_SECONDS
from cachd.store.changes import Changes
from cachd.store.content import ContentStore
from cachd.store.copies import Copies
from cachd.store.history import Histories
from cachd.store.holds import Holds
from cachd.store.index import Index
from cachd.store.layout import Layout
from cachd.store.leases import Leases
from cachd.store.manifests import Manifests
from cachd.store.names import Names
from cachd.store.nodes import Term, end_dead_writer
from cachd.store.opening import check_disk, check_format, prepare
from cachd.store.overhead import beside_file
from cachd.store.pending import PendingPulls
from cachd.store.pins import Pins
from cachd.store.pod_views import PodViews
from cachd.store.protection import Protection, UseRules
from cachd.store.publish import Publisher
from cachd.store.quarantines import Quarantines
from cachd.store.rollbacks import Rollbacks
from cachd.store.root import check_root, make_directories
from cachd.store.root_lock import take_lock, take_shared_lock
from cachd.store.space import Reservation, Space, bytes_beside
from cachd.store.sweep import Sweep
from cachd.store.usage_log import UsageLog
from cachd.store.watch import Watch
from cachd.store.withdrawals import Withdrawals


class DiskStore:
    """The store (store.py) of one root. It holds the root's lock until `close`.

    `term`: the right to write to a shared volume; without it, this process uses the root alone.
    `use_is_unknown`: other nodes may use the models, so all of them count as in use.

    Opening it cleans up after a crash. Its space has no bounds until `Space.change`. Raises Invalid,
    Forbidden, InUse, NoSpace, Leased, Unavailable or DiskFailed if the root cannot be used.
    """

    def __init__(
        self,
        root: Path,
        *,
        disk_at_least: int = 0,
        keep_previous: int = 0,
        keep_opened_seconds: float = OPENED_SECONDS,
        trust_claimed_digests: bool = False,
        term: Term | None = None,
        use_is_unknown: bool = False,
    ) -> None:
        self.layout, self._term = Layout(root, term.work) if term else Layout(root), term
        check_root(root)
        check_disk(root, at_least=disk_at_least)
        with durable.disk_errors(root):
            check_format(self.layout)
        make_directories(root)
        self._lock = (take_shared_lock if term else take_lock)(self.layout.lock)
        try:
            if term is None:
                end_dead_writer(root)
            prepare(self.layout)
            self.content = ContentStore(
                self.layout,
                trusts_claims=trust_claimed_digests,
                check=term.check_if_late if term else lambda: None,
            )
            with durable.disk_errors(root):
                self.content.trash.empty_all()
                self._read(keep_previous, UseRules(keep_opened_seconds, is_unknown=use_is_unknown))
                self._settle()
            self.space = Space(root, self.layout.work, copies=self.copies.places)
            self.reports_open_files = reports_open_files(self.layout.staging / "lease")
        except BaseException:
            os.close(self._lock)
            raise

    def _read(self, keep_previous: int, rules: UseRules) -> None:
        """Read what is on the disk, and construct the parts. Most verbs of the store are their methods."""
        layout, content = self.layout, self.content
        self.pending, self.usage_log = PendingPulls(layout), UsageLog(layout)
        self.watch = watch = Watch(layout, self.usage_log)
        self.copies = copies = Copies(layout, content, watch.own_opens)
        self.changes = Changes()
        check = self._term.check if self._term else lambda: None
        self.names = names = Names(layout, self.changes, check=check)
        self.manifests = manifests = Manifests(layout, content, names)
        self.history = history = Histories(layout, keep_previous)
        self.pins, self.leases, holds = Pins(layout), Leases(layout), Holds(layout)
        index = Index(layout, content, names, manifests, history, copies)
        self.protection = protection = Protection(
            index,
            pins=self.pins,
            leases=self.leases,
            holds=holds,
            watch=watch,
            rules=rules,
        )
        self._views = views = PodViews(index, holds)
        publisher = Publisher(index, views, watch=watch, pins=self.pins)
        self._rollbacks = Rollbacks(index, publisher)
        self._quarantines = Quarantines(index, views)
        withdrawals = Withdrawals(index, views, protection=protection, watch=watch)
        self.sweep = Sweep(index, withdrawals)
        self.publish, self.rollback = publisher.publish, self._rollbacks.rollback
        self.withdraw, self.withdraw_refused = withdrawals.withdraw, withdrawals.withdraw_refused
        self.evict, self.drop = withdrawals.evict, withdrawals.drop
        self.sweep_snapshots = withdrawals.sweep_snapshots
        self.check, self.quarantine = self._quarantines.check, self._quarantines.quarantine
        self.quarantine_copy = self._quarantines.quarantine_copy
        self.to_repair = self._quarantines.to_repair

    def _settle(self) -> None:
        """End what a crash interrupted."""
        self._quarantines.settle()
        self._views.settle(self.history.all())
        self._rollbacks.resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching, and release the root's lock."""
        self.watch.close()
        if self._term is None:
            with suppress(OSError):
                durable.overwrite(self._lock, b"")
        os.close(self._lock)

    @contextmanager
    def reserve(self, manifest: Manifest, *, owed: int = 0, owed_inodes: int = 0) -> Iterator[Reservation]:
        """Reserve space for the missing blobs and copies of a manifest; nobody removes its blobs meanwhile.

        `owed`, `owed_inodes`: bytes and inodes that need not be free yet, because evictions will free them.
        Raises TooBig or NoSpace.
        """
        with self.content.claim(manifest):
            missing = self.content.missing(manifest)
            with self.space.reserve(
                self._lacking(missing) + self.copies.lacking(manifest),
                total=manifest.size + self.copies.all_of(manifest),
                files=self._beside(missing),
                owed=owed,
                owed_inodes=owed_inodes,
            ) as reservation:
                yield reservation

    def need(self, manifest: Manifest) -> int:
        """Bytes that must be available before a pull of the manifest can begin."""
        missing = self.content.missing(manifest)
        content = self._lacking(missing) + self.copies.lacking(manifest)
        return content + bytes_beside(self._beside(missing))

    def watch_all(self) -> dict[Digest, File]:
        """Watch the views of every recorded snapshot and no other. Returns one file for each of its blobs."""
        self.watch.start()
        files: dict[Digest, File] = {}
        for each, manifest in self.manifests.readable():
            self.watch.cover(manifest, self.manifests.shown_in(each))
            files |= {f.blob: f for f in manifest.files}
            for file in manifest.files:
                self.content.hashes.read(file)
        self.watch.keep_only(set(self.manifests.ids()))
        return files

    def _lacking(self, missing: Collection[File]) -> int:
        begun = self.content.begun(missing)
        return sum(max(f.size - (self.content.allocated(f) if f.blob in begun else 0), 0) for f in missing)

    def _beside(self, missing: Collection[File]) -> dict[Digest, int]:
        begun = self.content.begun(missing)
        return {f.blob: beside_file(f, by_ingest=f.blob in begun) for f in missing}
