"""Room for models: asks the policy what to lose, and the store to lose it.

pull       a pull needs room: what the policy chooses goes, if that is enough; else nothing does
pressure   more is taken than may be, since another process fills the disk or the limit was lowered:
           what may go does, down to the low watermark
unused     nobody used a snapshot for so long
asked      an operator wants room
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import structlog

from cachd.errors import CachdError, Forbidden, InUse, NoSpace, NotFound
from cachd.metrics import Metrics
from cachd.model import Digest, Manifest, Share, Snapshot, Wish
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
from cachd.store.uses import GATED, GONE
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
    """How `short` bytes come free: what goes, in order; and every snapshot there is, with its protection."""

    short: int
    choices: Sequence[Choice]
    candidates: Sequence[Candidate]

    @property
    def frees(self) -> int:
        return sum(choice.frees for choice in self.choices)

    @property
    def is_enough(self) -> bool:
        return self.frees >= self.short


class Reclaim:
    """Frees space of one store. `automatic`: whether pulls and pressure evict; operators always can.

    `high` and `low`: evict above this share of what models may take, down to that.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        high: Share,
        low: Share,
        unused_seconds: float,
        automatic: bool,
    ) -> None:
        self._store, self._metrics = store, metrics
        self._high, self._low = high, low
        self._unused_seconds, self._automatic = unused_seconds, automatic
        self._listed: frozenset[str] = frozenset()
        self._evicting = threading.Lock()
        self._evicted: deque[Eviction] = deque(maxlen=_MOST_TOLD)
        self._told_short = False
        self._wait_until = 0.0
        self._looked_at, self._lost_opens = 0.0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reclaim", daemon=True)

    # --- for pulls ---

    @contextmanager
    def reserve(self, manifest: Manifest) -> Iterator[Reservation]:
        """As Store.reserve; where room is lacking and can be made, it is made first.

        Raises TooBig, or NoSpace, which names what holds the space.
        """
        with self._store.content.claim(manifest), ExitStack() as stack:
            while True:
                try:
                    reservation = stack.enter_context(self._store.reserve(manifest))
                    break
                except NoSpace as error:
                    if not self._make_room(error):
                        raise self._told(error) from error
            yield reservation

    def pulled(self, wish: Wish, outcome: Snapshot | CachdError, *, fetched: int, seconds: float) -> None:
        """Remember what a pull that ended says of its model and of its source."""
        uses, base = self._store.uses, wish.ref.base
        if isinstance(outcome, Snapshot):
            uses.used(wish.name, time.time())
            uses.brought(wish.ref.scheme, fetched, seconds)
            uses.lost(base, None)
        elif isinstance(outcome, NotFound):
            uses.lost(base, GONE)
        elif isinstance(outcome, Forbidden):
            uses.lost(base, GATED)

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
                        mend="unpin, release or stop what holds the rest (cachd capacity tells)",
                        need=need,
                        short=plan.short,
                    )
                )
            return self._evict(plan.choices, "asked")

    # --- the watch ---

    def start(self) -> None:
        threads.start([self._thread])

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()
        self._store.uses.save()

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
        opened = self._store.uses.newly_opened()
        for snapshot in self._store.snapshots.all() if opened else ():
            if snapshot.manifest in opened:
                self._store.uses.seen(snapshot.name, opened[snapshot.manifest])

    def _between_looks(self) -> float:
        watch, uses = self._store.watch, self._store.uses
        self._lost_opens |= watch.lost_opens()
        is_starting = time.time() - uses.asked_at < _STARTING_SECONDS
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
                    self._store.uses.seen(snapshot.name, now)
        self._store.uses.save()
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
            plan = self._plan(over)
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
        """Bytes to free; 0 or less as long as the high watermark is not passed."""
        over = 0
        room = max(now.total - now.reserve_free, 0)
        taken = room - (now.free - now.reserved - now.reserve_free)
        if taken > self._high.of(room):
            over = taken - self._low.of(room)
        if now.limit is not None:
            taken = now.usage.total + now.reserved
            if taken > self._high.of(now.limit):
                over = max(over, taken - self._low.of(now.limit))
        return over

    # --- inside ---

    def candidates(self) -> list[Candidate]:
        """Every snapshot on disk as the policy sees it."""
        self.note_opens()
        claimed = self._store.content.claimed()
        return [
            self._candidate(manifest, named, claimed) for manifest, named in self._store.snapshots.recorded()
        ]

    def _candidate(
        self, manifest: Manifest, named: Sequence[Snapshot], claimed: Collection[Digest]
    ) -> Candidate:
        uses, blobs = self._store.uses, self._store.content.sizes(manifest)
        lost = {uses.why_lost(s.wish.ref.base) for s in named}
        scheme = manifest.base.partition("://")[0]
        return Candidate(
            manifest=manifest.id,
            names=tuple(s.name for s in named),
            blobs=blobs,
            use=self._use(named),
            refetch_seconds=refetch_seconds(
                manifest.size,
                uses.rate(scheme),
                verified=manifest.is_verified,
                gated=GATED in lost,
                gone=GONE in lost,
            ),
            priority=max((uses.priority(s.name) for s in named), default=0),
            protected=self._protection(manifest, named, claimed),
            opened_at=uses.opened_at(manifest.id),
        )

    def _use(self, named: Sequence[Snapshot]) -> Use | None:
        """One use of all its names; None when it has none."""
        found = [self._store.uses.of(s.name) or Use(s.published_at) for s in named]
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

    def _plan(self, short: int) -> Plan:
        candidates = self.candidates()
        chosen = choose(
            candidates, need=max(short, 0), now=time.time(), claimed=self._store.content.claimed()
        )
        return Plan(max(short, 0), chosen, candidates)

    def _make_room(self, error: NoSpace) -> bool:
        """Evict for what a reservation lacked; whether anything went."""
        if not self._automatic:
            return False
        short, inodes = error.facts.get("short", 0), error.facts.get("short_inodes", 0)
        assert isinstance(short, int)
        assert isinstance(inodes, int)
        with self._evicting:
            candidates = self.candidates()
            if inodes:  # the same choice, with every blob weighing one
                candidates = [replace(c, blobs=dict.fromkeys(c.blobs, 1)) for c in candidates]
            need = inodes or short
            chosen = choose(candidates, need=need, now=time.time(), claimed=self._store.content.claimed())
            if sum(choice.frees for choice in chosen) < need:
                return False
            return bool(self._evict(chosen, "pull"))

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
        return NoSpace(detail, code=error.code, mend=error.mend, **error.facts, held_by=held_by)


def _holders(candidates: Collection[Candidate]) -> list[str]:
    """The largest snapshots, with what protects them."""
    largest = sorted(candidates, key=lambda c: (-c.size, c.manifest))
    told = [
        f"{c.names[0] if c.names else 'a replaced snapshot'} ({c.size} bytes, {c.protected or 'evictable'})"
        for c in largest[:_HOLDERS_TOLD]
    ]
    more = len(largest) - len(told)
    return [*told, f"{more} more models"] if more > 0 else told
