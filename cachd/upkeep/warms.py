"""Loads models into the page cache before a pod reads them, if they fit into free memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import structlog

from cachd.errors import CachdError, Cancelled, NoSpace
from cachd.kernel import threads
from cachd.kernel.memory import space_for_pages
from cachd.metrics import MAX_MODELS, Metrics
from cachd.model import Extent, Manifest, Snapshot
from cachd.policy.parts import split
from cachd.store.residency import STEP_BYTES, load, resident
from cachd.store.store import Store
from cachd.transfer.streams import NICENESS
from cachd.upkeep.jobs import Job, Jobs, JobState

log = structlog.get_logger(__name__)

_READERS = 4


class Warming(Job):
    """The warming of one model. Its final state is warm. `loaded`: bytes read from the disk."""

    unexpected = "a model could not be warmed in a way it should not"

    def __init__(self, name: str, total: int) -> None:
        super().__init__(name, total)
        self.loaded = 0

    def took(self, count: int, loaded: int) -> None:
        """Count bytes that are in memory now; `loaded` of them were read from disk."""
        with self._lock:
            self.done += count
            self.loaded += loaded

    def as_document(self) -> dict[str, object]:
        """The warming as the API shows it."""
        counts = {"total": self.total, "done": self.done, "loaded": self.loaded}
        return super().as_document() | {"bytes": counts}


class Warms:
    """Warms one model at a time, with several reading threads.

    `space` returns how many bytes of files memory can hold, counting those that it holds already.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        space: Callable[[], int] = space_for_pages,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._metrics, self._space, self._clock = store, metrics, space, clock
        self._warmings = Jobs[Warming](threads.pool(1, "warm"))
        self._readers = threads.pool(_READERS, "warm", lambda: os.nice(NICENESS))
        self._stop = threading.Event()

    def close(self) -> None:
        """Cancel the running job and join all threads."""
        self._stop.set()
        self._warmings.close()
        self._readers.shutdown(cancel_futures=True)

    def warm(self, name: str) -> Warming:
        """Start or join the warming of a ready model. Raises NotFound.

        The job fails with NoSpace when the missing bytes do not fit into memory beside the processes and the
        cached pages of other models.
        """
        snapshot = self._store.names.ready(name)
        return self._warmings.start(Warming(name, snapshot.size), partial(self._warm, snapshot))

    def warming(self, name: str) -> Warming | None:
        """The last warming of a name since the daemon started."""
        return self._warmings.last(name)

    def resident(self) -> Mapping[str, int]:
        """Bytes in memory of each ready model, by name; of at most MAX_MODELS models, the newest."""
        counted: dict[str, int] = {}
        found = {}
        for snapshot in self._store.names.newest(MAX_MODELS):
            with suppress(CachdError):  # withdrawn meanwhile, or unreadable
                manifest = self._store.manifests.of(snapshot)
                found[snapshot.name] = self.resident_of(manifest, counted)
        return found

    def resident_of(self, manifest: Manifest, counted: dict[str, int] | None = None) -> int:
        """Bytes in memory of one model. `counted`: bytes of files counted before; new ones are added."""
        counted = {} if counted is None else counted
        paths = self._store.copies.read_by_pods(manifest).keys()
        for path in paths - counted.keys():
            opening = partial(self._store.copies.opening, path)
            counted[path] = resident(path, self._store.content.reads, opening)
        return sum(counted[path] for path in paths)

    def _warm(self, snapshot: Snapshot, running: Warming) -> None:
        began = self._clock()
        running.run(lambda: self._load_if_it_fits(snapshot, running))
        log.info(
            "warmed",
            name=running.name,
            state=running.state,
            loaded_bytes=running.loaded,
            seconds=round(self._clock() - began, 3),
            detail=running.error.detail if running.error else "",
        )

    def _load_if_it_fits(self, snapshot: Snapshot, running: Warming) -> JobState:
        self._check_space(snapshot)
        self._load(snapshot, running)
        return JobState.warm

    def _check_space(self, snapshot: Snapshot) -> None:
        """Raises NoSpace when the missing bytes of the model do not fit into memory."""
        counted: dict[str, int] = {}
        here = self.resident_of(self._store.manifests.of(snapshot), counted)
        missing = snapshot.size - here
        if not missing:
            return
        for other in self._store.names.all():
            with suppress(CachdError):  # withdrawn meanwhile, or unreadable
                self.resident_of(self._store.manifests.of(other), counted)
        others = sum(counted.values()) - here
        space = self._space() - others - here
        if missing > space:
            raise NoSpace(
                f"{snapshot.name}: {missing} bytes are not in memory, and only {max(space, 0)} fit"
                f" beside the {others} bytes of other models",
                code="no_memory",
                hint="stop pods, or delete a model that is in memory and not needed",
                need=missing,
                free=max(space, 0),
            )

    def _load(self, snapshot: Snapshot, running: Warming) -> None:
        files = self._store.copies.read_by_pods(self._store.manifests.of(snapshot))
        steps = [(path, step) for path, size in files.items() for step in split(Extent(0, size), STEP_BYTES)]

        def take(step: tuple[str, Extent]) -> None:
            if self._stop.is_set():
                raise Cancelled("the daemon stops")
            path, extent = step
            opening = partial(self._store.copies.opening, path)
            loaded = load(path, extent, self._store.content.reads, opening)
            running.took(extent.size, loaded)
            self._metrics.warmed_bytes.inc(loaded)

        list(self._readers.map(take, steps))
