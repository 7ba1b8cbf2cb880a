"""Refused digests: whatever holds one is withdrawn at once, and deleted when nobody reads it any more.

look      at the start, and whenever what is refused changes: pulls that would bring one end, every name that
          leads, led or will lead to one goes, whoever protects it
again     while pods still hold a snapshot of it, which keeps its bytes until they end
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import structlog

from cachd.errors import CachdError, Forbidden
from cachd.model import Manifest
from cachd.sources.table import Table
from cachd.store.store import Store
from cachd.transfer import threads
from cachd.transfer.pulls import Pulls

log = structlog.get_logger(__name__)

_AGAIN_SECONDS = 2.0


class Refusals:
    """A thread that withdraws what `table` refuses now. `look` may come from any thread."""

    def __init__(self, store: Store, pulls: Pulls, table: Callable[[], Table]) -> None:
        self._store, self._pulls, self._table = store, pulls, table
        self._held: set[str] = set()  # snapshots that pods still hold
        self._has_failed = False
        self._changed, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="refusals", daemon=True)

    def start(self) -> None:
        """Withdraw what is refused before anybody is answered, and keep looking."""
        self._try(among=None)
        threads.start([self._thread])

    def look(self) -> None:
        """Something else is refused now."""
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
            log.warning("refused digests not withdrawn", reason=error.detail)
        except Exception:
            log.exception("refused digests not withdrawn, in a way that should not be")

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
            self._pulls.was_refused(snapshot.spec, refusal)
        for digest in table.refused:  # what a pull brought, and published not yet
            content.drop(digest)
            content.drop_ingest(digest)


def _refusal(table: Table, manifest: Manifest) -> CachdError:
    try:
        table.check_digests(manifest)
    except Forbidden as refusal:
        return refusal
    raise AssertionError("what was withdrawn is refused")
