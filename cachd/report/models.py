"""Reports the models of this node: those that are ready, being pulled, failed or damaged."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from cachd.errors import CachdError, NotFound
from cachd.metrics import MAX_MODELS
from cachd.model import ALL, Manifest, ModelSpec, Snapshot, check_name
from cachd.model.finding import worst
from cachd.report.file_use import FileUse, FileUseCache
from cachd.report.outcomes import outcome_of
from cachd.report.values import (
    DamageReport,
    HeldLease,
    LeftOutReport,
    ModelPage,
    ModelReport,
    ModelState,
    PreviousReport,
    PullBytes,
    PullFiles,
    PullReport,
    ReadyReport,
    VerificationReport,
    WaitReport,
    WarmingReport,
    error_report,
    from_document,
)
from cachd.store.catalog import Quarantine, iso, ready_document
from cachd.store.layout import Layout
from cachd.store.leases import Lease
from cachd.store.pins import Pins
from cachd.store.protection import InUseBy
from cachd.store.store import Store
from cachd.transfer.progress import State as PullState
from cachd.transfer.pulls import Pulls
from cachd.transfer.request import Pull
from cachd.transfer.waits import Waits
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.warms import Warms

MAX_ON_A_PAGE = 500


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of one name: at least one of the three."""

    snapshot: Snapshot | None
    pull: Pull | None
    damage: Quarantine | None

    @property
    def spec(self) -> ModelSpec:
        """The spec of what the name leads to, or will lead to, or led to."""
        if self.snapshot:
            return self.snapshot.spec
        if self.pull:
            return self.pull.spec
        assert self.damage
        return self.damage.snapshot.spec


class Models:
    """All models of one store and its pulls. `clock`: seconds since the epoch."""

    def __init__(
        self,
        store: Store,
        pulls: Pulls,
        scrubs: Scrubs,
        warms: Warms,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.pulls = store, pulls
        self.scrubs, self.warms = scrubs, warms
        self._clock = clock
        self._file_use = FileUseCache(store, scrubs, warms)

    def names(self) -> list[str]:
        """The names of all models, sorted."""
        return sorted(self._names())

    def state(self, name: str) -> ModelState | None:
        """The state of a model; None when the name is unknown. Damaged: until its repair is published."""
        pull = self.pulls.get(name)
        if self.store.names.get(name):
            return ModelState.ready
        if self.store.names.quarantine_of(name):
            return ModelState.damaged
        if pull and pull.error and pull.error.code == "refused_digest":
            return ModelState.refused
        return ModelState(pull.progress.state) if pull else None

    def failure(self, name: str) -> CachdError | None:
        """The error of the newest pull of a name; None when the model is ready or that pull still runs."""
        pull = self.pulls.get(name)
        return None if pull is None or self.store.names.get(name) else pull.error

    def is_final(self, name: str) -> bool:
        """Whether waiting is pointless: the pull of this name failed and would fail again."""
        failure = self.failure(name)
        return failure is not None and outcome_of(failure).is_final

    def counted(self) -> Mapping[str, int]:
        """The number of models in each state."""
        return Counter(state for name in self._names() if (state := self.state(name)))

    def counted_by_finding(self) -> Mapping[str, int]:
        """The number of ready models at each level of the worst finding of their preflight."""
        return Counter(worst(snapshot.findings).value for snapshot in self.store.names.all())

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each ready model, by name; of at most MAX_MODELS models, the newest."""
        return {s.name: s.size for s in self.store.names.newest(MAX_MODELS)}

    def underway(self) -> Mapping[str, tuple[float, float | None]]:
        """The ratio of bytes that are here, and the seconds that are left or None, of each resolved pull.

        Of at most MAX_MODELS pulls, those with a slot first.
        """
        found = {}
        for pull in list(dict.fromkeys([*self.pulls.at_work(), *self.pulls.running()]))[:MAX_MODELS]:
            progress, now = pull.progress, pull.progress.now
            if progress.total:
                found[pull.spec.name] = now.done / progress.total, progress.eta_seconds(now)
        return found

    def leases(self) -> int:
        """The number of leases that have not expired."""
        return self.store.leases.count(self._clock())

    def describe(self, name: str) -> ModelReport:
        """The report of one model. Raises NotFound. Blocks: it asks the kernel which files are open."""
        known, now = self._known(name), self._clock()
        use = self._file_use.ask(known.snapshot, now) if known.snapshot else FileUse.NONE
        return self._report(name, known, use, self.store.leases.of(name, now))

    def page(self, *, after: str, limit: int) -> ModelPage:
        """The reports of the first `limit` models whose names sort after `after`. Blocks.

        `next` is set when more models follow. What a report says of open files, memory and verification may
        be a minute old, or older among thousands of models (FileUseCache).
        """
        others = {name for name in self._not_ready() if name > after}
        names = sorted({*self.store.names.after(after, limit + 1), *others})
        now = self._clock()
        leases = self.store.leases.by_name(now)
        self.store.watch.note_opens(now)
        reports = []
        for name in names[:limit]:
            with suppress(NotFound):  # deleted since `names` was read
                known = self._known(name)
                use = self._file_use.recall(known.snapshot, now) if known.snapshot else FileUse.NONE
                reports.append(self._report(name, known, use, leases.get(name, ())))
        return ModelPage(models=reports, next=names[limit - 1] if len(names) > limit else None)

    # --- what clients do with a model ---

    def note_use(self, name: str) -> None:
        """Record that a client asked for a ready model."""
        self.store.usage_log.used(name, self._clock())

    def lease(self, name: str, holder: str, seconds: float) -> Lease:
        """Add a lease on a name, which counts as a use. Raises as `Leases.take` does."""
        now = self._clock()
        lease = self.store.leases.take(name, holder, until=now + seconds)
        self.store.usage_log.used(name, now)
        return lease

    def renew_lease(self, name: str, lease: str, seconds: float) -> Lease:
        """Let a lease expire `seconds` from now, which counts as a use. Raises as `Leases.renew` does."""
        now = self._clock()
        renewed = self.store.leases.renew(name, lease, until=now + seconds, now=now)
        self.store.usage_log.used(name, now)
        return renewed

    def check_known(self, name: str) -> None:
        """Raises Invalid when the name is malformed, NotFound when this node has no model of that name."""
        if self.state(check_name(name)) is None:
            raise unknown_model(name)

    # --- inside ---

    def _names(self) -> set[str]:
        return {s.name for s in self.store.names.all()} | self._not_ready()

    def _not_ready(self) -> set[str]:
        """The names that are damaged or pulled; some of the latter may be ready."""
        damaged = {each.snapshot.name for each in self.store.names.quarantined()}
        return damaged | {pull.spec.name for pull in self.pulls.known()}

    def _known(self, name: str) -> _Known:
        """What is known of a name. Raises NotFound."""
        known = _Known(self.store.names.get(name), self.pulls.get(name), self.store.names.quarantine_of(name))
        if not (known.snapshot or known.pull or known.damage):
            raise unknown_model(name)
        return known

    def _report(self, name: str, known: _Known, file_use: FileUse, leases: Iterable[Lease]) -> ModelReport:
        # One value of 23 fields: splitting it would only move fields away from their names.
        snapshot, pull, layout = known.snapshot, known.pull, self.store.layout
        state = self.state(name)
        if state is None:  # it was removed a moment ago
            raise unknown_model(name)
        use = self.store.usage_log.of(name)
        opened_at = self.store.usage_log.opened_at(snapshot.manifest) if snapshot else None
        verification, warming = self.scrubs.verification(name), self.warms.warming(name)
        return ModelReport(
            name=name,
            state=state,
            final=self.is_final(name),
            ref=str(known.spec.ref),
            path=str(layout.model(name)),
            file=str(layout.model(name) / snapshot.file) if snapshot and snapshot.file else None,
            immutable_path=str(layout.address(snapshot.address)) if snapshot else None,
            verified=snapshot.verified if snapshot else None,
            verified_by=dict(snapshot.verified_by) if snapshot else None,
            pinned=bool(pinned_by := self.store.pins.by(name)),
            pinned_by=pinned_by,
            leases=[held_lease(lease) for lease in leases],
            in_use=file_use.is_open,
            in_use_by=file_use.by,
            last_used=iso(use.last) if use else None,
            last_opened=iso(opened_at) if opened_at else None,
            ready=ready_report(snapshot) if snapshot else None,
            pull=pull_report(pull) if pull else None,
            previous=[_previous(each) for each in self.store.history.of(name)],
            damage=_damage(known.damage),
            verified_at=iso(file_use.verified_at) if file_use.verified_at else None,
            verification=from_document(VerificationReport, verification.as_document())
            if verification
            else None,
            resident_bytes=file_use.resident_bytes,
            warming=from_document(WarmingReport, warming.as_document()) if warming else None,
        )


def report_without_store(layout: Layout, snapshot: Snapshot) -> ModelReport:
    """The report of a ready model for a process that does not hold the root. It reads only the pins.

    On a shared volume nobody can tell whether the model is in use, so it says that it is.
    """
    pinned_by = Pins(layout).by(snapshot.name)
    return ModelReport(
        name=snapshot.name,
        state=ModelState.ready,
        final=False,
        ref=str(snapshot.spec.ref),
        path=str(layout.model(snapshot.name)),
        file=str(layout.model(snapshot.name) / snapshot.file) if snapshot.file else None,
        immutable_path=str(layout.address(snapshot.address)),
        verified=snapshot.verified,
        verified_by=dict(snapshot.verified_by),
        pinned=bool(pinned_by),
        pinned_by=pinned_by,
        leases=[],
        in_use=True,
        in_use_by=InUseBy.ANYBODY,
        last_used=None,
        last_opened=None,
        ready=ready_report(snapshot),
        pull=None,
        previous=[],
        damage=None,
        verified_at=None,
        verification=None,
        resident_bytes=0,
        warming=None,
    )


def unknown_model(name: str) -> NotFound:
    """The error for a name that this node does not know."""
    return NotFound(
        f"no model is named {name!r:.120}",
        code="no_such_model",
        hint="cachd ls lists the models (GET /v1/models); cachd pull REF pulls one (POST /v1/models)",
    )


def ready_report(snapshot: Snapshot) -> ReadyReport:
    """What the ready file of a snapshot says."""
    return from_document(ReadyReport, ready_document(snapshot))


def pull_report(pull: Pull) -> PullReport:
    """The progress of a pull, and its error if it failed."""
    spec, progress, now = pull.spec, pull.progress, pull.progress.now
    manifest = progress.manifest
    return PullReport(
        ref=str(spec.ref),
        name=spec.name,
        include=spec.include,
        exclude=spec.exclude,
        hub_id=spec.hub_id or None,
        weights=spec.weights if spec.weights != ALL else None,
        formats=spec.formats,
        copy=spec.copy,
        layout=spec.layout,
        state=PullState(progress.state),
        paused=now.is_paused,
        waits=_waits(progress.waits(now)),
        priority=pull.quota.priority,
        began_at=iso(pull.began_at) if pull.began_at else None,
        ended_at=iso(pull.ended_at) if pull.ended_at else None,
        revision=manifest.revision if manifest else None,
        bytes=PullBytes(
            total=progress.total, done=now.done, fetched=now.fetched, resumed=now.resumed, hedged=now.hedged
        ),
        files=PullFiles(total=len(manifest.files) if manifest else 0, done=now.files_done),
        rate_bytes_per_second=round(progress.rate),
        eta_seconds=progress.eta_seconds(now),
        verified=_verified(pull),
        verified_by=_verified_by(pull),
        left_out=left_out_report(manifest) if manifest else None,
        error=error_report(pull.error),
        retry_at=iso(pull.retry_at) if pull.retry_at else None,
    )


def held_lease(lease: Lease) -> HeldLease:
    """A lease as every reader sees it."""
    return HeldLease(holder=lease.holder, expires_at=iso(lease.expires_at))


def _waits(waits: Waits | None) -> WaitReport | None:
    if waits is None:
        return None
    until = iso(waits.until) if waits.until else None
    return WaitReport(reason=waits.reason, until=until, detail=waits.detail or None)


def _previous(snapshot: Snapshot) -> PreviousReport:
    ready = ready_report(snapshot)
    return PreviousReport(
        ref=ready.ref,
        revision=ready.revision,
        manifest=ready.manifest,
        immutable_path=ready.immutable_path,
        bytes=ready.bytes,
        published_at=ready.published_at,
    )


def _damage(damage: Quarantine | None) -> DamageReport | None:
    return DamageReport(since=iso(damage.since), reason=damage.reason) if damage else None


def left_out_report(manifest: Manifest) -> LeftOutReport | None:
    """What the spec leaves out; None when it leaves out nothing."""
    left_out = manifest.left_out
    return from_document(LeftOutReport, left_out.as_document()) if left_out else None


def _verified(pull: Pull) -> bool | None:
    """Whether every file was verified by a digest of its source; None until that is known.

    A pull without a digest of every file is known to be unverified as soon as its ref is resolved.
    """
    manifest = pull.progress.manifest
    if manifest is None or not manifest.has_all_digests:
        return None if manifest is None else False
    return True if pull.progress.state == PullState.ready else None


def _verified_by(pull: Pull) -> dict[str, int] | None:
    """The number of files that each digest algorithm verifies, weakest algorithm first; None until the ref is
    resolved."""
    return dict(pull.progress.manifest.verified_by) if pull.progress.manifest else None
