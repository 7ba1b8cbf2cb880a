"""Withdraws models with refused digests at once.

This runs at the start and whenever the refused digests change. Running pulls of such models fail. Ready and
quarantined names of such models are withdrawn, even if they are pinned or leased, and no name can be rolled
back to one. The bytes are deleted when nobody reads them any more: while pods hold a snapshot, the deletion
is tried again every 2 seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import structlog

from cachd.errors import CachdError, Forbidden
from cachd.kernel.periodic import Periodic
from cachd.model import Manifest
from cachd.sources.table import Table
from cachd.store.store import Store
from cachd.transfer.pulls import Pulls

log = structlog.get_logger(__name__)

_AGAIN_SECONDS = 2.0


class Refusals:
    """A thread that withdraws the models that `table` refuses."""

    def __init__(self, store: Store, pulls: Pulls, table: Callable[[], Table]) -> None:
        self._store, self._pulls, self._table = store, pulls, table
        self._held: set[str] = set()  # ids of refused manifests that pods still hold
        self._must_check_all = threading.Event()
        self._thread = Periodic("refusals", self._check)

    def start(self) -> None:
        """Withdraw refused models before the daemon answers any request; then start the thread."""
        self._must_check_all.set()
        self._thread.start(after=self._check())

    def check_soon(self) -> None:
        """Have the thread check all models, because the refused digests changed. Safe from any thread."""
        self._must_check_all.set()
        self._thread.wake()

    def close(self) -> None:
        """Join the thread."""
        self._thread.close()

    def _check(self) -> float | None:
        """Withdraw what is refused. Returns when to try again; None when nothing is left to do."""
        is_of_all = self._must_check_all.is_set()
        self._must_check_all.clear()
        try:
            self._withdraw(among=None if is_of_all else self._held)
        except CachdError as error:
            log.warning("refused models not withdrawn", reason=error.detail)
            self._must_check_all.set()
        except Exception:
            log.exception("withdrawing refused models failed in a way it should not")
            self._must_check_all.set()
        return _AGAIN_SECONDS if self._held or self._must_check_all.is_set() else None

    def _withdraw(self, *, among: Collection[str] | None) -> None:
        table, content = self._table(), self._store.content
        if not table.refused:
            self._held = set()
            return
        self._pulls.end_refused(table.check_digests)
        withdrawn, self._held = self._store.withdraw_refused(
            lambda manifest: table.refused_in(manifest) is not None, among=among
        )
        for snapshot, manifest in withdrawn:
            refusal = _refusal(table, manifest)
            log.warning("model refused", name=snapshot.name, manifest=manifest.id, reason=refusal.detail)
            self._pulls.show_as_failed(snapshot.spec, refusal)
        for digest in table.refused:  # blobs that a pull has fetched but not published yet
            content.removal.drop(digest)
            content.removal.drop_ingest(digest)


def _refusal(table: Table, manifest: Manifest) -> CachdError:
    try:
        table.check_digests(manifest)
    except Forbidden as refusal:
        return refusal
    raise AssertionError("only refused models are withdrawn")
