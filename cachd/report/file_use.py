"""Says which snapshots are open or in memory, and remembers the answers for listings.

The kernel answers file by file, with several system calls for each, so asking about all files of all models
would make a listing slow. A listing recalls an answer as long as it probably holds:

    hold file    asked each time: one file for each model
    not open     until somebody opens a file of the snapshot (store/watch.py reports it), but at most a
                 minute, or 30 ms for each remembered snapshot if that is longer. So the CPU time of
                 listings does not grow with the number of models. Two seconds where the kernel does not
                 report every open
    open         two seconds

The choice of what to evict never uses these answers: it asks the kernel about every file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cachd.errors import Leased, NotFound
from cachd.kernel.leases import is_open
from cachd.model import Snapshot
from cachd.store.protection import InUseBy
from cachd.store.store import Store
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.warms import Warms

_SOON_SECONDS = 2.0
_MAX_REMEMBERED = 20_000  # answers; the oldest are forgotten first


@dataclass(frozen=True, slots=True)
class FileUse:
    """Who uses a snapshot, its bytes in memory, and its oldest verification (Unix time)."""

    by: InUseBy | None
    resident_bytes: int
    verified_at: float | None

    NONE: ClassVar[FileUse]

    @property
    def is_open(self) -> bool:
        """Whether files of the snapshot are open."""
        return self.by is not None


FileUse.NONE = FileUse(by=None, resident_bytes=0, verified_at=None)


class FileUseCache:
    """The file use of each snapshot, and the last answer for each. Safe from any thread.

    Every method takes `now`, in seconds since the epoch. The answer `not open` holds for `quiet_seconds`, or
    for `quiet_seconds_each` of each remembered snapshot, whichever is longer.
    """

    def __init__(
        self,
        store: Store,
        scrubs: Scrubs,
        warms: Warms,
        *,
        quiet_seconds: float = 60.0,
        quiet_seconds_each: float = 0.03,  # a question about a snapshot of 13 files takes 1 ms of a core
    ) -> None:
        self._store, self._scrubs, self._warms = store, scrubs, warms
        self._quiet_seconds, self._quiet_seconds_each = quiet_seconds, quiet_seconds_each
        self._answers: dict[str, tuple[float, FileUse]] = {}  # by manifest; the oldest answer comes first

    def ask(self, snapshot: Snapshot, now: float) -> FileUse:
        """The use of a snapshot's files now. Blocks: it asks the kernel about each file."""
        try:
            manifest = self._store.manifests.of(snapshot)
        except (NotFound, Leased):  # removed, or another process holds a kernel lease on its manifest
            return FileUse(by=InUseBy.PROCESS, resident_bytes=0, verified_at=None)
        found = FileUse(
            by=self._store.protection.in_use_by(manifest),
            resident_bytes=self._warms.resident_of(manifest),
            verified_at=self._scrubs.verified_at(snapshot, manifest),
        )
        self._answers.pop(manifest.id, None)
        self._answers[manifest.id] = now, found
        if len(self._answers) > _MAX_REMEMBERED:
            self._answers.pop(next(iter(self._answers)), None)
        return found

    def recall(self, snapshot: Snapshot, now: float) -> FileUse:
        """The last answer about a snapshot if it probably still holds, else a new one.

        The caller has called `Watch.note_opens` before.
        """
        known = self._answers.get(snapshot.manifest)
        if known is None or not self._still_holds(snapshot.manifest, *known, now):
            return self.ask(snapshot, now)
        if not known[1].is_open and is_open([self._store.layout.hold_at(snapshot.manifest)]):
            return replace(known[1], by=InUseBy.POD)
        return known[1]

    def _still_holds(self, manifest: str, asked_at: float, answer: FileUse, now: float) -> bool:
        age = abs(now - asked_at)  # abs: a clock that was set back
        if answer.is_open or not self._store.watch.sees_all_opens():
            return age < _SOON_SECONDS
        opened_at = self._store.usage_log.opened_at(manifest)
        quiet = max(self._quiet_seconds, self._quiet_seconds_each * len(self._answers))
        return age < quiet and (opened_at is None or opened_at < asked_at)
