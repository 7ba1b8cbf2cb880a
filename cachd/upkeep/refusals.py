"""Withdraws models with refused digests at once, and deletes their bytes when nobody reads them any more.

This runs at the start and whenever the refused digests change. Running pulls of such models fail. Ready and
quarantined names of such models are withdrawn, even if they are pinned or leased, and no name can be rolled
back to one. While pods still hold a snapshot, its bytes stay; the deletion is tried again every 2 seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import structlog

from cachd.errors import CachdError, Forbidden
from cachd.kernel import threads
from cachd.model import Manifest
from cachd.sources.table import Table
from cachd.store.store import Store
from cachd.transfer.pulls import Pulls

log = structlog.get_logger(__name__)

_AGAIN_SECONDS = 2.0


class Refusals:
    """A thread that withdraws the models that `table` refuses. `look` is safe from any thread."""

    def __init__(self, store: Store, pulls: Pulls, table: Callable[[], Table]) -> None:
        self._store, self._pulls, self._table = store, pulls, table
        self._held: set[str] = set()  # ids of refused manifests that pods still hold
        self._has_failed = False
        self._changed, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="refusals", daemon=True)

    def start(self) -> None:
        """Withdraw refused models before the daemon answers any request; then start the thread."""
        self._try(among=None)
        threads.start([self._thread])

    def look(self) -> None:
        """Have the thread check again, because the refused digests changed."""
        self._changed.set()

    def close(self) -> None:
        self._stopped = True
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            is_over = not (self._held or self._has_failed)
            has_changed = self._changed.wait(None if is_over else _AGAIN_SECONDS)
            if self._stopped:
                return
            self._changed.clear()
            self._try(among=None if has_changed or self._has_failed else self._held)

    def _try(self, *, among: Collection[str] | None) -> None:
        self._has_failed = True
        try:
            self._withdraw(among=among)
            self._has_failed = False
        except CachdError as error:
            log.warning("refused models not withdrawn", reason=error.detail)
        except Exception:
            log.exception("withdrawing refused models failed in a way it should not")

    def _withdraw(self, *, among: Collection[str] | None) -> None:
        table, content = self._table(), self._store.content
        if not table.refused:
            self._held = set()
            return
        self._pulls.end_refused(table.check_digests)
        withdrawn, self._held = self._store.snapshots.withdraw_refused(
            lambda manifest: table.refused_in(manifest) is not None, among=among
        )
        for snapshot, manifest in withdrawn:
            refusal = _refusal(table, manifest)
            log.warning("model refused", name=snapshot.name, manifest=manifest.id, reason=refusal.detail)
            self._pulls.show_as_failed(snapshot.spec, refusal)
        for digest in table.refused:  # blobs that a pull has fetched but not published yet
            content.drop(digest)
            content.drop_ingest(digest)


def _refusal(table: Table, manifest: Manifest) -> CachdError:
    try:
        table.check_digests(manifest)
    except Forbidden as refusal:
        return refusal
    raise AssertionError("only refused models are withdrawn")
