"""Records in the usage log how models are used."""

from __future__ import annotations

from cachd.errors import CachdError, Forbidden, NotFound
from cachd.model import ModelSpec, Snapshot
from cachd.store.store import Store
from cachd.store.usage_log import GATED, GONE, UsageLog


def record_pull(
    usage_log: UsageLog,
    spec: ModelSpec,
    outcome: Snapshot | CachdError,
    *,
    fetched: int,
    seconds: float,
    now: float,
) -> None:
    """Record what an ended pull shows: a use, the source's rate, or that the source lost the model."""
    base = spec.ref.base
    if isinstance(outcome, Snapshot):
        usage_log.used(spec.name, now)
        usage_log.brought(spec.ref.scheme, fetched, seconds)
        usage_log.lost(base, None)
    elif isinstance(outcome, NotFound):
        usage_log.lost(base, GONE)
    elif isinstance(outcome, Forbidden):
        usage_log.lost(base, GATED)


def record_opens(store: Store, now: float) -> None:
    """Record a use of every snapshot that some process opened since the last call."""
    store.watch.note_opens(now)
    opened = store.usage_log.newly_opened()
    for snapshot in store.names.all() if opened else ():
        if snapshot.manifest in opened:
            store.usage_log.seen(snapshot.name, opened[snapshot.manifest])


def record_open_now(store: Store, now: float) -> None:
    """Record a use of every snapshot that some process has open now."""
    for manifest, named in store.manifests.with_names():
        if named and store.protection.is_in_use(manifest):
            for snapshot in named:
                store.usage_log.seen(snapshot.name, now)
