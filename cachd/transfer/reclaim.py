"""Frees disk space: the policy chooses which snapshots to evict, and the store evicts them.

There are four reasons to evict:

pull       A pull needs space. The policy chooses victims; if they do not free enough, the pull is refused.
           They are evicted one by one, each only when bytes that have arrived need its disk blocks.
pressure   More space is taken than the high watermark allows, or bytes that have arrived find no free space.
           Unprotected snapshots are evicted, down to the low watermark.
unused     Nobody used a snapshot for `unused_seconds`.
asked      An operator asked for space.

Except for `unused`, partial downloads of ended pulls are removed before any snapshot is evicted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import structlog

from cachd.errors import CachdError, Forbidden, InUse, NoSpace, NotFound
from cachd.kernel import threads
from cachd.metrics import Metrics
from cachd.model import Digest, Manifest, ModelSpec, Percentage, Snapshot
from cachd.policy.eviction import (
    Candidate,
    Choice,
    Use,
    choose,
    expired,
    refetch_seconds,
)
from cachd.store.space import Capacity, Reservation
from cachd.store.store import Store
from cachd.store.sweep import Leftover, remove
from cachd.store.usage_log import GATED, GONE

log = structlog.get_logger(__name__)

_TICK_SECONDS = 1.0
_CHECK_SECONDS = 60.0  # between two checks which snapshots some process has open
_SOON_SECONDS = 5.0  # the same when the kernel may not report every open and a process may be starting
_STARTING_SECONDS = 600.0  # a process may be starting this long after a model was published or asked for
_WAIT_SECONDS = 600.0  # after an eviction for pressure that freed too little
_MOST_EVICTIONS = 1000  # shown by the API
_MOST_HOLDERS = 5  # named in an error


@dataclass(frozen=True, slots=True)
class Eviction:
    """A snapshot that was evicted at `at` (seconds since the epoch).

    `reason`: pull, pressure, unused or asked. `why`: the policy's explanation. `frees`: bytes of disk that
    the eviction was expected to free. `freed`: bytes that it did free.
    """

    at: float
    manifest: str
    names: tuple[str, ...]
    reason: str
    why: str
    frees: int
    freed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to remove for `short` bytes: first `partials`, then `choices`, each in order.

    `candidates`: every snapshot, with its protection. `at`: when it was planned, in seconds since the epoch.
    """

    short: int
    partials: Sequence[Leftover]
    choices: Sequence[Choice]
    candidates: Sequence[Candidate]
    at: float

    @property
    def frees(self) -> int:
        return sum(found.size for found in self.partials) + sum(choice.frees for choice in self.choices)

    @property
    def is_enough(self) -> bool:
        return self.frees >= self.short


class _Victims:
    """What is to be removed for one pull: `choices` and `partials` for its bytes, `for_inodes` for inodes.

    Changed only with `Reclaim._evicting` held.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.partials: list[Leftover] = []
        self.choices: list[Choice] = []
        self.for_inodes: list[Choice] = []
        self.at = 0.0  # when they were chosen

    @property
    def manifests(self) -> set[str]:
        return {choice.candidate.manifest for choice in (*self.choices, *self.for_inodes)}

    @property
    def frees(self) -> int:
        return sum(found.size for found in self.partials) + sum(choice.frees for choice in self.choices)

    def take_over(self, plan: Plan) -> None:
        self.partials, self.choices, self.at = list(plan.partials), list(plan.choices), plan.at


class Reclaim:
    """Frees the disk space of one store. `automatic`: whether to evict when no operator asked for it.

    When more than `high` of the space for models is taken, it evicts until no more than `low` is.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        high: Percentage,
        low: Percentage,
        unused_seconds: float,
        automatic: bool,
    ) -> None:
        self._store, self._metrics = store, metrics
        self._high, self._low = high, low
        self._unused_seconds, self._automatic = unused_seconds, automatic
        self._listed: frozenset[str] = frozenset()
        self._evicting = threading.Lock()
        self._victims: list[_Victims] = []  # of the pulls that run
        self._evicted: deque[Eviction] = deque(maxlen=_MOST_EVICTIONS)
        self._warned_short = False
        self._wait_until = 0.0
        self._checked_at, self._lost_opens = 0.0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reclaim", daemon=True)

    # --- for pulls ---

    @contextmanager
    def reserve(self, manifest: Manifest, name: str) -> Iterator[Reservation]:
        """Like Store.reserve, but chooses victims when free space is lacking.

        They are evicted later, as grants of the reservation need their blocks. Raises TooBig, or NoSpace with
        the models that hold the space.
        """
        victims = _Victims(name)
        with self._store.content.claim(manifest, name), ExitStack() as stack:
            stack.callback(self._release, victims)
            reservation = self._admit(stack, manifest, victims)
            reservation.make_space = partial(self._make_space, reservation, victims)
            yield reservation

    def settle(self, reservation: Reservation) -> None:
        """When all bytes of a pull have arrived, free what it is still owed, for its views and manifest.

        If that is impossible, does nothing and raises nothing.
        """
        reservation.has_arrived()
        with suppress(NoSpace):
            while self._store.space.take_unclaimed(reservation) and reservation.make_space(1):
                pass

    def pulled(
        self, spec: ModelSpec, outcome: Snapshot | CachdError, *, fetched: int, seconds: float
    ) -> None:
        """Record in the usage log what an ended pull shows: a use, the source's rate, or that it is gone."""
        usage_log, base = self._store.usage_log, spec.ref.base
        if isinstance(outcome, Snapshot):
            usage_log.used(spec.name, time.time())
            usage_log.brought(spec.ref.scheme, fetched, seconds)
            usage_log.lost(base, None)
        elif isinstance(outcome, NotFound):
            usage_log.lost(base, GONE)
        elif isinstance(outcome, Forbidden):
            usage_log.lost(base, GATED)

    # --- for operators ---

    def keep(self, names: Collection[str]) -> None:
        """Never evict these names: the configuration lists them, so they would be pulled again at once."""
        self._listed = frozenset(names)

    def keeps(self, name: str) -> bool:
        """Whether the configuration lists the name."""
        return name in self._listed

    def evicted(self) -> list[Eviction]:
        """The last evictions, newest first."""
        return list(reversed(self._evicted))

    def plan(self, need: int) -> Plan:
        """What would be removed to make `need` bytes available."""
        return self._plan(need - self._store.space.bounded().available)

    def make_available(self, need: int) -> list[Eviction]:
        """Evict until `need` bytes are available. If that cannot be, raises NoSpace and evicts nothing."""
        with self._evicting:
            plan = self.plan(need)
            if not plan.is_enough:
                raise self._with_holders(
                    NoSpace(
                        f"{plan.short} more bytes are needed and only {plan.frees} can be freed",
                        hint="unpin or release models, or stop the pods that use them (see cachd capacity)",
                        need=need,
                        short=plan.short,
                    )
                )
            self._drop_partials(plan.partials)
            return self._evict(plan.choices, "asked")

    # --- the thread ---

    def start(self) -> None:
        threads.start([self._thread])

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()
        self._store.usage_log.save()

    def _run(self) -> None:
        self._checked_at = time.monotonic()  # the first check waits until the daemon has started
        while True:
            try:
                self._store.snapshots.leases.expire(time.time())
                self._store.content.empty_trash()
                self.note_opens()
                if time.monotonic() >= self._checked_at + self._between_looks():
                    self.look()
                self.relieve()
            except (CachdError, OSError) as error:
                log.warning("reclaim failed", reason=str(error))
            except Exception:
                log.exception("reclaim failed in a way it should not")
            if self._stop.wait(_TICK_SECONDS):
                return

    def note_opens(self) -> None:
        """Record a use of every snapshot that some process opened since the last call."""
        self._store.watch.note_opens(time.time())
        opened = self._store.usage_log.newly_opened()
        for snapshot in self._store.snapshots.all() if opened else ():
            if snapshot.manifest in opened:
                self._store.usage_log.seen(snapshot.name, opened[snapshot.manifest])

    def _between_looks(self) -> float:
        watch, usage_log = self._store.watch, self._store.usage_log
        self._lost_opens |= watch.lost_opens()
        is_starting = time.time() - usage_log.asked_at < _STARTING_SECONDS
        if self._lost_opens or (is_starting and not watch.tells_opens()):
            return _SOON_SECONDS
        return _CHECK_SECONDS

    def look(self) -> None:
        """Record a use of every snapshot that is open now; then evict what is unused for `unused_seconds`."""
        self._checked_at, self._lost_opens = time.monotonic(), False
        now = time.time()
        for manifest, named in self._store.snapshots.recorded():
            if named and self._store.snapshots.is_open(manifest):
                for snapshot in named:
                    self._store.usage_log.seen(snapshot.name, now)
        self._store.usage_log.save()
        if self._unused_seconds and self._automatic:
            with self._evicting:
                old = expired(
                    self.candidates(),
                    unused_seconds=self._unused_seconds,
                    now=now,
                    claimed=self._store.content.claimed(),
                )
                self._evict(old, "unused")

    def relieve(self) -> None:
        """Under pressure, evict what is not protected, down to the low watermark."""
        over = self._over(self._store.space.bounded())
        if over <= 0:
            self._warned_short = False
            return
        if not self._automatic or time.monotonic() < self._wait_until:
            return
        with self._evicting:
            before = self._store.space.bounded().free
            plan = self._plan(over, at_any_rate=True)
            self._drop_partials(plan.partials)
            self._evict(plan.choices, "pressure")
            after = self._store.space.bounded()
        if not plan.is_enough and not self._warned_short:
            log.warning(
                "too little space can be freed: the other models are protected",
                short_bytes=plan.short - plan.frees,
                held_by=_holders([c for c in plan.candidates if c.protected]),
            )
            self._warned_short = True
        if not self._store.tells_use and after.free - before < plan.frees / 2:
            log.warning("eviction freed too little: a process has the files open", bytes=plan.frees)
            self._wait_until = time.monotonic() + _WAIT_SECONDS

    def _over(self, now: Capacity) -> int:
        """Bytes to free; 0 or less below the high watermark while no received bytes wait for space.

        Bytes that have not arrived do not count: a source may claim any size.
        """
        over = self._store.space.waited_for()
        space = max(now.total - now.reserve_free, 0)
        taken = space - (now.free - now.reserve_free)
        if taken > self._high.of(space):
            over = max(over, taken - self._low.of(space))
        if now.limit is not None:
            taken = now.usage.total
            if taken > self._high.of(now.limit):
                over = max(over, taken - self._low.of(now.limit))
        return over

    # --- inside ---

    def candidates(self) -> list[Candidate]:
        """Every snapshot on disk as the policy sees it."""
        return self._candidates({manifest: v.name for v in list(self._victims) for manifest in v.manifests})

    def _candidates(self, chosen: Mapping[str, str]) -> list[Candidate]:
        """`chosen`: the manifests of other pulls' victims, each with the name of its pull."""
        self.note_opens()
        claimed = self._store.content.claimed()
        return [
            self._candidate(manifest, named, claimed, chosen.get(manifest.id))
            for manifest, named in self._store.snapshots.recorded()
        ]

    def _candidate(
        self,
        manifest: Manifest,
        named: Sequence[Snapshot],
        claimed: Collection[Digest],
        chosen_for: str | None,
    ) -> Candidate:
        usage_log, blobs = self._store.usage_log, self._store.content.sizes(manifest)
        lost = {usage_log.why_lost(s.spec.ref.base) for s in named}
        scheme = manifest.base.partition("://")[0]
        protected = self._protection(manifest, named, claimed)
        if not protected and chosen_for is not None:
            protected = f"will be evicted for the pull of {chosen_for} as its bytes arrive"
        return Candidate(
            manifest=manifest.id,
            names=tuple(s.name for s in named),
            blobs=blobs,
            use=self._use(named),
            refetch_seconds=refetch_seconds(
                manifest.size,
                usage_log.rate(scheme),
                verified=manifest.is_verified,
                gated=GATED in lost,
                gone=GONE in lost,
            ),
            priority=max((usage_log.priority(s.name) for s in named), default=0),
            protected=protected,
            opened_at=usage_log.opened_at(manifest.id),
        )

    def _use(self, named: Sequence[Snapshot]) -> Use | None:
        """The uses under all names of a snapshot, combined; None when it has no name."""
        found = [self._store.usage_log.of(s.name) or Use(s.published_at) for s in named]
        if not found:
            return None
        last = max(use.last for use in found)
        return Use(last, sum(use.popularity(last) for use in found))

    def _protection(self, manifest: Manifest, named: Sequence[Snapshot], claimed: Collection[Digest]) -> str:
        """Why a snapshot may not be evicted; empty when it may."""
        snapshots, now = self._store.snapshots, time.time()
        if pinned := [s.name for s in named if snapshots.is_pinned(s.name)]:
            return f"pinned as {pinned[0]}"
        for snapshot in named:
            if held := snapshots.leases.of(snapshot.name, now):
                seconds = held[-1].expires_at - now
                return f"leased by {held[-1].holder or 'somebody'} for {seconds:.0f} s more"
        if listed := [s.name for s in named if s.name in self._listed]:
            return f"listed in the configuration as {listed[0]}"
        if all(f.blob in claimed for f in manifest.files):
            return "a running pull needs its files"
        if by := snapshots.in_use_by(manifest):
            return str(by)
        return snapshots.opened_lately(manifest.id)

    def _plan(
        self, short: int, *, for_pull: _Victims | None = None, at_any_rate: bool = False, inodes: int = 0
    ) -> Plan:
        """What to remove for `short` bytes, or for `inodes` if that is not 0.

        Victims of pulls other than `for_pull` are protected, unless `at_any_rate`.
        """
        now, short = time.time(), max(short, 0)
        others = [v for v in self._victims if v is not for_pull and not at_any_rate]
        partials = [] if inodes else self._partials(short, others)
        candidates = self._candidates({manifest: v.name for v in others for manifest in v.manifests})
        if inodes:  # the same policy, counting each blob as one inode instead of its bytes
            candidates = [replace(c, blobs=dict.fromkeys(c.blobs, 1)) for c in candidates]
        need = inodes or short - sum(found.size for found in partials)
        claimed = self._store.content.claimed()
        return Plan(
            inodes or short,
            partials,
            choose(candidates, need=need, now=now, claimed=claimed),
            candidates,
            now,
        )

    def _partials(self, short: int, others: Collection[_Victims]) -> list[Leftover]:
        """Partial downloads of ended pulls that free `short` bytes, or all of them; the oldest first."""
        taken = {found.name for victims in others for found in victims.partials}
        found, freed = list[Leftover](), 0
        for each in self._store.sweep.partial_downloads() if short > 0 else ():
            if freed >= short:
                break
            if each.name not in taken and each.size:
                found.append(each)
                freed += each.size
        return found

    # --- for one pull; `_choose`, `_free_inodes` and `_choose_again` are called with `_evicting` held ---

    def _admit(self, stack: ExitStack, manifest: Manifest, victims: _Victims) -> Reservation:
        """Reserve the space of a pull, and choose its victims if needed. Raises TooBig or NoSpace."""
        with suppress(NoSpace):
            return stack.enter_context(self._store.reserve(manifest))
        owed = owed_inodes = 0
        with self._evicting:
            while True:
                try:
                    reservation = stack.enter_context(
                        self._store.reserve(manifest, owed=owed, owed_inodes=owed_inodes)
                    )
                except NoSpace as error:
                    short, inodes = error.short, error.short_inodes
                    if not self._choose(victims, short, inodes):
                        raise self._with_holders(error) from error
                    owed, owed_inodes = max(owed, short), max(owed_inodes, inodes)
                    continue
                self._victims.append(victims)
                return reservation

    def _choose(self, victims: _Victims, short: int, inodes: int) -> bool:
        """Choose the victims of a pull. Returns whether they free enough."""
        if not self._automatic:
            return False
        plan = self._plan(short, for_pull=victims, inodes=inodes)
        if inodes:
            victims.for_inodes = list(plan.choices)
        else:
            victims.take_over(plan)
        return plan.is_enough

    def _release(self, victims: _Victims) -> None:
        """The pull has ended: its remaining victims stay, and may be chosen for other pulls."""
        with suppress(ValueError):
            self._victims.remove(victims)

    def _make_space(self, reservation: Reservation, victims: _Victims, least: int) -> bool:
        """Evict the next victim of the pull. Returns and raises as Reservation.make_space does."""
        space = self._store.space
        with self._evicting:
            if reservation.has_ended:
                return False
            if reservation.owed_inodes and space.lacks_inodes():
                self._free_inodes(reservation, victims)
                return True
            if space.most_of(reservation, least) >= least:  # an eviction or a deletion freed enough meanwhile
                return True
            if not reservation.owed:  # another process has taken the reserved space
                return False
            self._choose_again(reservation, victims)
            expected = victims.partials[0].size if victims.partials else victims.choices[0].frees
            with space.freeing(reservation, expected) as report:
                if victims.partials:
                    report(self._drop_partials([victims.partials.pop(0)]))
                else:
                    report(sum(gone.freed for gone in self._evict([victims.choices.pop(0)], "pull")))
            return True

    def _free_inodes(self, reservation: Reservation, victims: _Victims) -> None:
        if not victims.for_inodes:
            reservation.owed_inodes = 0  # no victim is left: from here on, the file system decides
            return
        choice = victims.for_inodes.pop(0)
        if self._evict([choice], "pull"):
            reservation.owed_inodes = max(reservation.owed_inodes - choice.frees, 0)

    def _choose_again(self, reservation: Reservation, victims: _Victims) -> None:
        """Choose new victims if the chosen ones are gone, were used or became protected. Raises NoSpace."""
        owed = reservation.owed
        if victims.frees >= owed and self._are_as_chosen(victims):
            return
        plan = self._plan(owed, for_pull=victims)
        if not plan.is_enough:
            raise self._with_holders(
                NoSpace(
                    f"{victims.name} still needs {owed} bytes to be freed, and only {plan.frees} can be",
                    hint="models chosen for eviction are now in use or protected; retry, or delete a model",
                    short=owed - plan.frees,
                )
            )
        log.info("other models chosen for eviction", name=victims.name, owed_bytes=owed)
        victims.take_over(plan)

    def _are_as_chosen(self, victims: _Victims) -> bool:
        """Whether the victims have the same use, blobs and lack of protection as when they were chosen."""
        others = {manifest: v.name for v in self._victims if v is not victims for manifest in v.manifests}
        now = {c.manifest: c for c in self._candidates(others)}
        for choice in victims.choices:
            before, found = choice.candidate, now.get(choice.candidate.manifest)
            if found is None or found.protected or found.use != before.use or found.blobs != before.blobs:
                return False
        return True

    def _drop_partials(self, partials: Iterable[Leftover]) -> int:
        """Remove partial downloads of ended pulls. Returns the bytes freed."""
        freed = 0
        for found in partials:
            size = remove(found)
            self._metrics.swept_bytes.labels(found.kind).inc(size)
            freed += size
        return freed

    def _evict(self, choices: Sequence[Choice], reason: str) -> list[Eviction]:
        """Evict snapshots, skipping those that were removed or came into use since they were chosen."""
        done = []
        for choice in choices:
            candidate = choice.candidate
            try:
                freed = self._store.snapshots.evict(candidate.manifest)
            except (InUse, NotFound) as error:
                log.info("eviction skipped", manifest=candidate.manifest, reason=error.detail)
                continue
            eviction = Eviction(
                time.time(), candidate.manifest, candidate.names, reason, choice.why, choice.frees, freed
            )
            log.info(
                "evicted",
                names=list(candidate.names),
                manifest=candidate.manifest,
                reason=reason,
                why=choice.why,
                freed_bytes=freed,
            )
            self._metrics.evictions.labels(reason).inc()
            self._metrics.evicted_bytes.inc(freed)
            self._evicted.append(eviction)
            done.append(eviction)
        return done

    def _with_holders(self, error: NoSpace) -> NoSpace:
        """A copy of the error that also names what holds the space."""
        held_by = _holders(self.candidates())
        now = self._store.space.capacity()
        if now.usage.held:
            held_by.append(f"deleted models that are still open ({now.usage.held} bytes)")
        if others := max(now.total - now.free - now.usage.total, 0):
            held_by.append(f"other files of this disk ({others} bytes)")
        detail = f"{error.detail}; held by {', '.join(held_by)}"
        return replace(error, detail=detail, held_by=held_by)


def _holders(candidates: Collection[Candidate]) -> list[str]:
    """The largest snapshots in words, each with its size and protection."""
    largest = sorted(candidates, key=lambda c: (-c.size, c.manifest))
    named = [
        f"{c.names[0] if c.names else 'a replaced snapshot'} ({c.size} bytes, {c.protected or 'evictable'})"
        for c in largest[:_MOST_HOLDERS]
    ]
    more = len(largest) - len(named)
    return [*named, f"{more} more models"] if more > 0 else named
