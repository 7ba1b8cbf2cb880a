"""Room for models: asks the policy what to lose, and the store to lose it.

pull       a pull needs room: the policy chooses what is to go, if that is enough; else the pull is refused.
           What was chosen goes in that order, and only when bytes that have arrived need the blocks
pressure   more is taken than may be, since another process fills the disk or the limit was lowered:
           what may go does, down to the low watermark
unused     nobody used a snapshot for so long
asked      an operator wants room

For all but `unused`, what ended pulls left unfinished goes before any model.
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
from cachd.transfer import threads

log = structlog.get_logger(__name__)

_TURN_SECONDS = 1.0
_LOOK_SECONDS = 60.0  # between two looks at what is open in some process
_SOON_SECONDS = 5.0  # the same where the kernel does not tell of every open, while a process may be starting
_STARTING_SECONDS = 600.0  # after a model was published or asked for
_WAIT_SECONDS = 600.0  # after an eviction that freed nothing
_MOST_TOLD = 1000
_HOLDERS_TOLD = 5


@dataclass(frozen=True, slots=True)
class Eviction:
    """A snapshot that was evicted at `at`, seconds since the epoch: why, the bytes of disk that were to come
    free when it was chosen, and those that did."""

    at: float
    manifest: str
    names: tuple[str, ...]
    reason: str
    why: str
    frees: int
    freed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How `short` bytes come free: which partial downloads of ended pulls go, then which snapshots, each in
    order; and every snapshot there is, with its protection. Made at `at`, seconds since the epoch."""

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
    """What is to go for one pull. Read and changed while an eviction may run, and by nobody else."""

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
    """Frees space of one store. `automatic`: whether pulls and pressure evict; operators always can.

    `high` and `low`: evict above this share of what models may take, down to that.
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
        self._evicted: deque[Eviction] = deque(maxlen=_MOST_TOLD)
        self._told_short = False
        self._wait_until = 0.0
        self._looked_at, self._lost_opens = 0.0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reclaim", daemon=True)

    # --- for pulls ---

    @contextmanager
    def reserve(self, manifest: Manifest, name: str) -> Iterator[Reservation]:
        """As Store.reserve; where room is lacking and can be made, it is chosen here what is to go for it.

        That goes as grants of the reservation need it. Raises TooBig, or NoSpace, which names what holds the
        space.
        """
        victims = _Victims(name)
        with self._store.content.claim(manifest, name), ExitStack() as stack:
            stack.callback(self._let_stay, victims)
            reservation = self._admit(stack, manifest, victims)
            reservation.make_space = partial(self._make_space, reservation, victims)
            yield reservation

    def settle(self, reservation: Reservation) -> None:
        """Free what is still owed to a pull whose every byte has arrived: views and manifest take some, too.
        Raises nothing when that cannot be."""
        reservation.has_arrived()
        with suppress(NoSpace):
            while self._store.space.take_unclaimed(reservation) and reservation.make_space(1):
                pass

    def pulled(
        self, spec: ModelSpec, outcome: Snapshot | CachdError, *, fetched: int, seconds: float
    ) -> None:
        """Remember what a pull that ended says of its model and of its source."""
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
        """Evict none of these: the configuration lists them, and they would be pulled again at once."""
        self._listed = frozenset(names)

    def keeps(self, name: str) -> bool:
        """Whether the configuration lists it."""
        return name in self._listed

    def evicted(self) -> list[Eviction]:
        """The last evictions, the newest first."""
        return list(reversed(self._evicted))

    def plan(self, need: int) -> Plan:
        """What would go so that `need` bytes are available."""
        return self._plan(need - self._store.space.bounded().available)

    def make_available(self, need: int) -> list[Eviction]:
        """Evict so that `need` bytes are available. Raises NoSpace, and evicts nothing, when it cannot be."""
        with self._evicting:
            plan = self.plan(need)
            if not plan.is_enough:
                raise self._told(
                    NoSpace(
                        f"{plan.short} bytes more are wanted and {plan.frees} can be freed",
                        hint="unpin, release or stop what holds the rest (cachd capacity tells)",
                        need=need,
                        short=plan.short,
                    )
                )
            self._drop_partials(plan.partials)
            return self._evict(plan.choices, "asked")

    # --- the watch ---

    def start(self) -> None:
        threads.start([self._thread])

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()
        self._store.usage_log.save()

    def _run(self) -> None:
        self._looked_at = time.monotonic()  # not while the daemon is starting
        while True:
            try:
                self._store.snapshots.leases.expire(time.time())
                self._store.content.empty_trash()
                self.note_opens()
                if time.monotonic() >= self._looked_at + self._between_looks():
                    self.look()
                self.relieve()
            except (CachdError, OSError) as error:
                log.warning("reclaim turn failed", reason=str(error))
            except Exception:
                log.exception("a reclaim turn failed in a way it should not")
            if self._stop.wait(_TURN_SECONDS):
                return

    def note_opens(self) -> None:
        """Count what somebody opened since the last time as used then."""
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
        return _LOOK_SECONDS

    def look(self) -> None:
        """Take note of what is used now, and let go what was not for long."""
        self._looked_at, self._lost_opens = time.monotonic(), False
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
        """Free what may go while more is taken than may be."""
        over = self._over(self._store.space.bounded())
        if over <= 0:
            self._told_short = False
            return
        if not self._automatic or time.monotonic() < self._wait_until:
            return
        with self._evicting:
            before = self._store.space.bounded().free
            plan = self._plan(over, at_any_rate=True)
            self._drop_partials(plan.partials)
            self._evict(plan.choices, "pressure")
            after = self._store.space.bounded()
        if not plan.is_enough and not self._told_short:
            log.warning(
                "more is taken than may be, and the rest is protected",
                short_bytes=plan.short - plan.frees,
                held_by=_holders([c for c in plan.candidates if c.protected]),
            )
            self._told_short = True
        if not self._store.tells_use and after.free - before < plan.frees / 2:
            log.warning("evicted and still not free: a process has the files open", bytes=plan.frees)
            self._wait_until = time.monotonic() + _WAIT_SECONDS

    def _over(self, now: Capacity) -> int:
        """Bytes to free; 0 or less as long as the high watermark is not passed, and no bytes that have
        arrived wait for room. What has not arrived counts for nothing: sources claim what they like.
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
        """`chosen`: the snapshots that are to go for a pull already, with its name."""
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
            protected = f"to go for the pull of {chosen_for} as its bytes arrive"
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
        """One use of all its names; None when it has none."""
        found = [self._store.usage_log.of(s.name) or Use(s.published_at) for s in named]
        if not found:
            return None
        last = max(use.last for use in found)
        return Use(last, sum(use.popularity(last) for use in found))

    def _protection(self, manifest: Manifest, named: Sequence[Snapshot], claimed: Collection[Digest]) -> str:
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
        """What goes for `short` bytes, or for so many inodes. What is to go for another pull than `for_pull`
        stays, unless it is taken `at_any_rate`."""
        now, short = time.time(), max(short, 0)
        others = [v for v in self._victims if v is not for_pull and not at_any_rate]
        partials = [] if inodes else self._partials(short, others)
        candidates = self._candidates({manifest: v.name for v in others for manifest in v.manifests})
        if inodes:  # the same choice, with every blob weighing one
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
        """Partial downloads of ended pulls for so many bytes, the oldest first."""
        taken = {found.name for victims in others for found in victims.partials}
        found, freed = list[Leftover](), 0
        for each in self._store.sweep.partial_downloads() if short > 0 else ():
            if freed >= short:
                break
            if each.name not in taken and each.size:
                found.append(each)
                freed += each.size
        return found

    # --- for one pull; all but the first while no other eviction runs ---

    def _admit(self, stack: ExitStack, manifest: Manifest, victims: _Victims) -> Reservation:
        """Promise the space of a pull, having chosen what is to go for it. Raises TooBig or NoSpace."""
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
                    short, inodes = error.facts.get("short", 0), error.facts.get("short_inodes", 0)
                    assert isinstance(short, int)
                    assert isinstance(inodes, int)
                    if not self._choose(victims, short, inodes):
                        raise self._told(error) from error
                    owed, owed_inodes = max(owed, short), max(owed_inodes, inodes)
                    continue
                self._victims.append(victims)
                return reservation

    def _choose(self, victims: _Victims, short: int, inodes: int) -> bool:
        """Choose what is to go for a pull; whether that is enough."""
        if not self._automatic:
            return False
        plan = self._plan(short, for_pull=victims, inodes=inodes)
        if inodes:
            victims.for_inodes = list(plan.choices)
        else:
            victims.take_over(plan)
        return plan.is_enough

    def _let_stay(self, victims: _Victims) -> None:
        """What was to go for a pull, and did not, is anybody's again."""
        with suppress(ValueError):
            self._victims.remove(victims)

    def _make_space(self, reservation: Reservation, victims: _Victims, least: int) -> bool:
        """As Reservation.make_space: let the next go that was chosen for the pull."""
        space = self._store.space
        with self._evicting:
            if reservation.has_ended:
                return False
            if reservation.owed_inodes and space.lacks_inodes():
                self._free_inodes(reservation, victims)
                return True
            if (
                space.most_of(reservation, least) >= least
            ):  # another eviction, or a deletion, freed it meanwhile
                return True
            if not reservation.owed:  # another process has what was promised
                return False
            self._choose_again(reservation, victims)
            expected = victims.partials[0].size if victims.partials else victims.choices[0].frees
            with space.freeing(reservation, expected) as tell:
                if victims.partials:
                    tell(self._drop_partials([victims.partials.pop(0)]))
                else:
                    tell(sum(gone.freed for gone in self._evict([victims.choices.pop(0)], "pull")))
            return True

    def _free_inodes(self, reservation: Reservation, victims: _Victims) -> None:
        if not victims.for_inodes:
            reservation.owed_inodes = 0  # nothing more can go: the file system has the last word
            return
        choice = victims.for_inodes.pop(0)
        if self._evict([choice], "pull"):
            reservation.owed_inodes = max(reservation.owed_inodes - choice.frees, 0)

    def _choose_again(self, reservation: Reservation, victims: _Victims) -> None:
        """Choose others when what was chosen is gone, used or protected by now. Raises NoSpace."""
        owed = reservation.owed
        if victims.frees >= owed and self._are_as_chosen(victims):
            return
        plan = self._plan(owed, for_pull=victims)
        if not plan.is_enough:
            raise self._told(
                NoSpace(
                    f"{owed} bytes that {victims.name} needs were to come free, and {plan.frees} still can",
                    hint="what was to go is used or protected by now; ask again, or delete a model",
                    short=owed - plan.frees,
                )
            )
        log.info("others are to go", name=victims.name, owed_bytes=owed)
        victims.take_over(plan)

    def _are_as_chosen(self, victims: _Victims) -> bool:
        others = {manifest: v.name for v in self._victims if v is not victims for manifest in v.manifests}
        now = {c.manifest: c for c in self._candidates(others)}
        for choice in victims.choices:
            before, found = choice.candidate, now.get(choice.candidate.manifest)
            if found is None or found.protected or found.use != before.use or found.blobs != before.blobs:
                return False
        return True

    def _drop_partials(self, partials: Iterable[Leftover]) -> int:
        """Remove partial downloads of ended pulls; bytes freed."""
        freed = 0
        for found in partials:
            size = remove(found)
            self._metrics.swept_bytes.labels(found.kind).inc(size)
            freed += size
        return freed

    def _evict(self, choices: Sequence[Choice], reason: str) -> list[Eviction]:
        """Let the snapshots go that are still as unprotected as they were when they were chosen."""
        done = []
        for choice in choices:
            candidate = choice.candidate
            try:
                freed = self._store.snapshots.evict(candidate.manifest)
            except (InUse, NotFound) as error:
                log.info("not evicted after all", manifest=candidate.manifest, reason=error.detail)
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

    def _told(self, error: NoSpace) -> NoSpace:
        """The same refusal, naming what holds the space."""
        held_by = _holders(self.candidates())
        now = self._store.space.capacity()
        if now.usage.held:
            held_by.append(f"deleted models that are still open ({now.usage.held} bytes)")
        if others := max(now.total - now.free - now.usage.total, 0):
            held_by.append(f"other files of this disk ({others} bytes)")
        detail = f"{error.detail}; held by {', '.join(held_by)}"
        return NoSpace(detail, code=error.code, hint=error.hint, **error.facts, held_by=held_by)


def _holders(candidates: Collection[Candidate]) -> list[str]:
    """The largest snapshots, with what protects them."""
    largest = sorted(candidates, key=lambda c: (-c.size, c.manifest))
    told = [
        f"{c.names[0] if c.names else 'a replaced snapshot'} ({c.size} bytes, {c.protected or 'evictable'})"
        for c in largest[:_HOLDERS_TOLD]
    ]
    more = len(largest) - len(told)
    return [*told, f"{more} more models"] if more > 0 else told
