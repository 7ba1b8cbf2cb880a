"""Refuses requests that may not start or cancel a pull now."""

from __future__ import annotations

from collections.abc import Callable

from cachd.errors import Busy, InUse, NotFound
from cachd.model import ModelSpec, count_text
from cachd.store.names import no_such_model
from cachd.store.permit import name_taken, pinned
from cachd.store.store import Store
from cachd.transfer.newest import NewestPulls
from cachd.transfer.request import Pull
from cachd.transfer.running import RunningPulls

_RETRY_SECONDS = 60.0


class Admission:
    """The rules of starting and cancelling. At most `at_once` pulls run and `queued` more wait.

    `is_configured`: whether the configuration lists a name. To start a pull, the caller holds
    `running.changing` from the checks on until the pull is added.
    """

    def __init__(
        self,
        store: Store,
        running: RunningPulls,
        newest: NewestPulls,
        *,
        is_configured: Callable[[str], bool],
        at_once: int,
        queued: int,
    ) -> None:
        self._store, self._running, self._newest = store, running, newest
        self._is_configured = is_configured
        self._most, self._queued = at_once + queued, queued

    def check_name(self, spec: ModelSpec, *, refresh: bool, replace: bool) -> None:
        """Raises InUse when the name may not move to the spec (see `Permit`), or its Hub folder is another's.

        `replace`: the name may move from any model.
        """
        if not replace:
            self._check_owner(spec, refresh=refresh)
        self._store.names.check_hub_folder(spec)

    def _check_owner(self, spec: ModelSpec, *, refresh: bool) -> None:
        """A failed pull without a snapshot owns its name only if the name is pinned."""
        name, store = spec.name, self._store
        if (running := self._running.of(name)) is not None:
            raise _name_is_pulled(spec, running)
        owner, newest = store.names.owner(name), self._newest.of(name)
        is_pinned = store.pins.has(name)
        if owner is None and is_pinned and newest is not None:
            owner = newest.spec
        if owner is not None and not owner.is_of_same_model(spec):
            raise name_taken(spec, owner)
        if owner is not None and is_pinned and owner != spec:
            raise name_taken(spec, owner, "is pinned at")
        if is_pinned and refresh and (here := store.names.get(name)):
            raise pinned(spec, here.revision)

    def is_ready(self, spec: ModelSpec) -> bool:
        """Whether the name leads to a snapshot that was published for the spec."""
        ready = self._store.names.get(spec.name)
        return ready is not None and ready.spec == spec

    def may_begin(self, spec: ModelSpec, *, repairs: bool, retried: Pull | None) -> bool:
        """Whether a pull that cachd begins by itself is still wanted; True for any other pull.

        `repairs`: the spec must still wait for its repair. `retried`: this failed pull must still be the
        newest of its name. Nobody may be deleting the name or rolling it back.
        """
        name = spec.name
        if repairs:
            found = self._store.names.quarantine_of(name)
            is_wanted = found is not None and found.snapshot.spec == spec
        elif retried is not None:
            is_wanted = self._newest.of(name) is retried
        else:
            return True
        return is_wanted and self._running.may_repair(name)

    def check_queue(self, waiting: int) -> None:
        """Raises Busy when the daemon is stopping or the queue, of `waiting` pulls, is full."""
        if self._running.is_closed:
            raise Busy("the daemon is stopping", code="stopping", retry_after=_RETRY_SECONDS)
        if len(self._running) >= self._most:
            raise Busy(
                f"{count_text(waiting, 'pull is', 'pulls are')} waiting, and at most {self._queued} may wait",
                code="queue_full",
                hint="ask again later, or raise queued_pulls",
                retry_after=_RETRY_SECONDS,
            )

    def running(self, name: str) -> Pull:
        """The unfinished pull of a name. Raises NotFound for an unknown name, and when there is none."""
        running = self._newest.unfinished(name)
        if running is None:
            self.check_cancel(name, force=True)
            raise NotFound(f"{name} is not being pulled", code="no_pull", hint=f"see cachd show {name}")
        return running

    def check_cancel(self, name: str, *, force: bool) -> None:
        """Raises NotFound for an unknown name.

        Unless `force`, raises InUse when the configuration lists the name, or its model is pinned or in use.
        """
        names = self._store.names
        if self._newest.of(name) is None and not (names.has(name) or names.was_evicted(name)):
            raise no_such_model(name)
        if not force and self._is_configured(name):
            raise InUse(
                f"the configuration lists {name}: it would come back at the next start or change of the file",
                code="configured",
                hint="remove it from the file, or force it (--force, force=true)",
            )
        if not force:
            self._store.protection.check_unused(name)


def _name_is_pulled(spec: ModelSpec, running: Pull) -> InUse:
    if not running.spec.is_of_same_model(spec):
        return name_taken(spec, running.spec, "is being pulled from")
    return InUse(
        f"{spec.name} is being pulled from {running.spec}",
        code="name_busy",
        hint="wait for it, stop it (--replace, replace: true), or use another name",
    )
