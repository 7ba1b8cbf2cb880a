"""Keeps in memory which snapshot each name leads to.

    free         no snapshot is known under the name
    ready        ready/NAME.json exists
    quarantined  damage was found; the name waits for its repair

    free         --declared--> ready
    ready        --declared--> ready                  another snapshot, or the same one again
    ready        --record_quarantine, undeclared--> quarantined
    quarantined  --declared, end_quarantine--> ready  a repair, or another snapshot
    ready        --undeclared--> free                 withdrawn; `note_eviction` remembers the reason
    quarantined  --end_quarantine--> free

The disk is the truth: a method that changes memory is called right after the corresponding file has changed.
"""

from __future__ import annotations

import heapq
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cachd.errors import InUse, NotFound
from cachd.kernel import durable
from cachd.model import ModelSpec, Snapshot
from cachd.store import catalog
from cachd.store.catalog import Quarantine
from cachd.store.changes import Changes
from cachd.store.layout import Layout
from cachd.store.ready_names import ReadyNames

_MAX_EVICTED = 1000  # evicted names to remember; the oldest is forgotten first


class Names:
    """The names of one root. Any thread may read; whoever changes one holds `changing`.

    `check`: raises InUse if this process may no longer write to the root.
    """

    def __init__(
        self, layout: Layout, changes: Changes, *, check: Callable[[], object] = lambda: None
    ) -> None:
        self._layout, self._changes, self.check = layout, changes, check
        self._lock = threading.Lock()
        ready = catalog.read_snapshots(layout)
        self._ready = ReadyNames(ready.values())
        self._quarantined = catalog.read_quarantined(layout, ready)
        self._evicted: dict[str, None] = {}  # in the order of eviction

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let one publish, withdrawal or quarantine happen at a time. Readers never wait for it.

        Inside, errors of the disk become NoSpace, DiskFailed or Unavailable. Raises InUse if this process may
        no longer write to the root.
        """
        with self._lock, durable.disk_errors(self._layout.root):
            self.check()
            yield

    # --- reading ---

    def get(self, name: str) -> Snapshot | None:
        """The snapshot of a ready name; None if the name is not ready."""
        return self._ready.get(name)

    def all(self) -> list[Snapshot]:
        """The snapshots of all ready names, sorted by name."""
        return self._ready.all()

    def newest(self, count: int) -> list[Snapshot]:
        """The snapshots of the `count` ready names that were published last."""
        return heapq.nlargest(count, self._ready.all(), key=lambda snapshot: snapshot.published_at)

    def after(self, name: str, count: int) -> list[str]:
        """The first `count` ready names that sort after `name`."""
        return self._ready.after(name, count)

    def of(self, manifest: str) -> list[Snapshot]:
        """The ready names of one snapshot, each as a Snapshot, sorted by name."""
        return self._ready.of(manifest)

    def in_hub_folder(self, folder: str) -> list[Snapshot]:
        """The ready snapshots of one folder of the Hub view."""
        return self._ready.in_hub_folder(folder)

    def ready(self, name: str) -> Snapshot:
        """The snapshot that a name leads to. Raises NotFound if the name is not ready."""
        found = self.get(name)
        if found is None:
            raise NotFound(
                f"no model named {name!r:.120} is ready",
                code="no_such_model",
                hint="cachd ls lists the models (GET /v1/models)",
            )
        return found

    def has(self, name: str) -> bool:
        """Whether the name is ready or quarantined."""
        return self._ready.get(name) is not None or name in self._quarantined

    def known(self, name: str) -> Snapshot | None:
        """The snapshot of a ready or quarantined name; None if the name is free."""
        quarantined = self._quarantined.get(name)
        return self._ready.get(name) or (quarantined.snapshot if quarantined else None)

    def owner(self, name: str) -> ModelSpec | None:
        """The spec of the ready or quarantined snapshot of a name; None if the name is free."""
        known = self.known(name)
        return known.spec if known else None

    def all_known(self) -> list[Snapshot]:
        """The snapshots of all names, ready or quarantined."""
        return [*(each.snapshot for each in list(self._quarantined.values())), *self._ready.all()]

    def manifests(self) -> set[str]:
        """The manifest ids of all names, ready or quarantined."""
        return {snapshot.manifest for snapshot in self.all_known()}

    def has_others(self, named: Sequence[Snapshot]) -> bool:
        """Whether the snapshot of these names has other names, ready or quarantined."""
        names = {snapshot.name for snapshot in named}
        return any(s.manifest == named[0].manifest and s.name not in names for s in self.all_known())

    def quarantine_of(self, name: str) -> Quarantine | None:
        """Why a name waits for its repair; None if it is not quarantined."""
        return self._quarantined.get(name)

    def quarantined(self) -> list[Quarantine]:
        """All quarantines, sorted by name."""
        return sorted(self._quarantined.values(), key=lambda each: each.snapshot.name)

    def was_evicted(self, name: str) -> bool:
        """Whether the name is absent because it was evicted for space since the daemon started."""
        return name in self._evicted and not self.has(name)

    def check_hub_folder(self, spec: ModelSpec) -> None:
        """Raises InUse if pods could not find the spec's model by its folder and branch of the Hub view.

        This is the case if the folder shows a model of another source, or has a branch that cannot exist
        beside the spec's own: `main` is a file, and `main/x` needs a directory of that name.
        """
        damaged = [each.snapshot for each in list(self._quarantined.values())]
        for other in [*damaged, *self._ready.in_hub_folder(spec.hub_folder)]:
            if other.name == spec.name or other.hub_folder != spec.hub_folder:
                continue
            if other.spec.ref.base != spec.ref.base:
                raise InUse(
                    f"hub/{spec.hub_folder} already shows {other.name}, which is {other.spec.ref.base}",
                    code="hub_id_taken",
                    hint="choose another hub_id" if spec.hub_id else f"choose another name than {spec.name}",
                )
            if exclude_each_other(spec.hub_revision, other.hub_revision):
                raise InUse(
                    f"hub/{spec.hub_folder} has the branch {other.hub_revision} for {other.name}, and cannot"
                    f" have the branch {spec.hub_revision}, too: one is a file where the other is a folder",
                    code="branch_taken",
                    hint=f"delete {other.name} first, or pull a commit: @ and its 40 hex digits",
                )

    # --- changing; the caller holds `changing` ---

    def declared(self, snapshot: Snapshot) -> None:
        """Let the name lead to this snapshot, because its ready file is in place."""
        self._ready.put(snapshot)
        self._evicted.pop(snapshot.name, None)
        self._changes.mark(snapshot.name)

    def undeclared(self, name: str) -> None:
        """Make the name not ready, because its ready file is gone."""
        self._ready.remove(name)
        self._changes.mark(name)

    def record_quarantine(self, quarantine: Quarantine) -> None:
        """Write down that a name waits for its repair. Raises OSError, but not for a full disk.

        On a full disk the name stops being ready all the same, but a restart forgets the quarantine.
        """
        name = quarantine.snapshot.name
        document = json.dumps(quarantine.as_document(), indent=1)
        try:
            durable.write_file(self._layout.quarantine_file(name), document.encode())
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
        self._quarantined[name] = quarantine

    def end_quarantine(self, name: str) -> None:
        """The name was published again or removed, so it waits for no repair. Raises OSError."""
        if self._quarantined.pop(name, None) is not None:
            durable.remove(self._layout.quarantine_file(name))

    # --- evictions ---

    def note_eviction(self, name: str) -> None:
        """Remember that a name is absent because it was evicted."""
        self._evicted[name] = None
        while len(self._evicted) > _MAX_EVICTED:
            oldest = next(iter(self._evicted))
            del self._evicted[oldest]
            self._changes.mark(oldest)

    def forget_eviction(self, name: str) -> None:
        """Stop reporting that a name was evicted for space."""
        if self._evicted.pop(name, "") is None:
            self._changes.mark(name)


def no_such_model(name: str) -> NotFound:
    """The error for a name that is neither ready, nor quarantined, nor being pulled."""
    hint = "cachd ls lists the models (GET /v1/models)"
    return NotFound(f"no model is named {name!r}", code="no_such_model", hint=hint)


def exclude_each_other(branch: str | None, other: str | None) -> bool:
    """Whether one branch needs a directory where the other is a file, such as `main/x` and `main`."""
    if not branch or not other:
        return False
    return branch.startswith(f"{other}/") or other.startswith(f"{branch}/")
