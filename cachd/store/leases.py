"""Keeps the leases: names that clients protect from removal for a limited time."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import structlog

from cachd import files
from cachd.errors import Busy, NotFound
from cachd.kernel import durable
from cachd.model import check_name
from cachd.store import catalog
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)

MAX_LEASES = 10_000


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease keeps a name until `expires_at`, seconds since the epoch. `holder` is text for people."""

    id: str
    name: str
    holder: str
    expires_at: float


class Leases:
    """Leases keep names for clients that are about to use them: one file per lease. Safe from any thread.

    A lease survives a restart of the daemon. If its holder dies, it ends when it expires.
    """

    def __init__(self, layout: Layout, *, new_id: Callable[[], str] = lambda: secrets.token_hex(8)) -> None:
        self._layout, self._new_id = layout, new_id
        self._lock = threading.Lock()
        self._leases = {lease.id: lease for lease in self._read()}

    def take(self, name: str, holder: str, *, until: float) -> Lease:
        """Add a lease on a name.

        Raises Busy when too many leases are held, NoSpace or DiskFailed when it cannot be written.
        """
        lease = Lease(self._new_id(), name, holder, until)
        with self._lock:
            if len(self._leases) >= MAX_LEASES:
                raise Busy(
                    f"{len(self._leases)} leases are held, and no more are allowed",
                    code="too_many_leases",
                    retry_after=60.0,
                )
            self._write(lease)
        return lease

    def renew(self, name: str, lease: str, *, until: float, now: float) -> Lease:
        """Extend a lease. Raises NotFound when it has expired or was released: its model may be gone."""
        with self._lock:
            found = self._leases.get(lease)
            if found is None or found.name != name or found.expires_at <= now:
                raise NotFound(
                    f"{name} has no lease {lease!r:.40}: it was released or has expired",
                    code="no_such_lease",
                    hint="take a new lease, and check whether the model is still ready",
                )
            renewed = Lease(found.id, found.name, found.holder, until)
            self._write(renewed)
        return renewed

    def release(self, name: str, lease: str) -> None:
        """End a lease. One that has ended already is fine."""
        with self._lock:
            found = self._leases.get(lease)
            if found is not None and found.name == name:
                self._remove(found)

    def release_all(self, name: str) -> None:
        """End all leases on a name."""
        with self._lock:
            for lease in [found for found in self._leases.values() if found.name == name]:
                self._remove(lease)

    def of(self, name: str, now: float) -> list[Lease]:
        """The leases on a name that have not expired; the one that expires last stands last."""
        held = [
            found for found in list(self._leases.values()) if found.name == name and found.expires_at > now
        ]
        return sorted(held, key=lambda found: found.expires_at)

    def by_name(self, now: float) -> dict[str, list[Lease]]:
        """The leases that have not expired, as `of` returns them, for each name that has any."""
        found: dict[str, list[Lease]] = {}
        for lease in sorted(self._leases.copy().values(), key=lambda lease: lease.expires_at):
            if lease.expires_at > now:
                found.setdefault(lease.name, []).append(lease)
        return found

    def expire(self, now: float) -> list[Lease]:
        """Remove the leases that have expired, and return them."""
        with self._lock:
            expired = [found for found in self._leases.values() if found.expires_at <= now]
            for lease in expired:
                self._remove(lease)
                log.info("lease expired", lease=lease.id, name=lease.name, holder=lease.holder)
        return expired

    def count(self, now: float) -> int:
        """How many leases have not expired."""
        return sum(found.expires_at > now for found in list(self._leases.values()))

    def _read(self) -> Iterable[Lease]:
        for path in self._layout.leases.glob("[!.]*.json"):
            try:
                document = durable.read_document(path)
                lease = Lease(
                    path.stem,
                    check_name(document["name"]),
                    str(document["holder"]),
                    float(document["expires_at"]),
                )
                catalog.iso(lease.expires_at)  # refuses what is no date
            except files.UNREADABLE as error:
                catalog.check_passing(error, path)
                log.warning("unreadable lease deleted", file=path.name, reason=repr(error))
                path.unlink(missing_ok=True)
                continue
            yield lease

    def _write(self, lease: Lease) -> None:
        path = self._layout.lease(lease.id)
        with durable.disk_errors(path):
            durable.write_file(path, json.dumps(asdict(lease)).encode())
        self._leases[lease.id] = lease

    def _remove(self, lease: Lease) -> None:
        path = self._layout.lease(lease.id)
        with durable.disk_errors(path):
            durable.remove(path)
        del self._leases[lease.id]
