"""Chooses the source of each ref by its scheme and by the entries of `sources` that cover it.

The module of a source is imported when it is first needed: huggingface_hub and botocore take longer to import
than the daemon takes to start, and few nodes need both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from cachd.model import SCHEMES, Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.access import Access
from cachd.sources.http import Http
from cachd.sources.source import Source
from cachd.sources.table import Table
from cachd.sources.trust import Authorities


@dataclass(frozen=True, slots=True)
class _Settings:
    """The settings of a ref. Refs of one module with equal settings share one source."""

    module: str
    columns: tuple[tuple[str, Any], ...]
    has_own_endpoint: bool
    may_use_own_credentials: bool


@dataclass(frozen=True, slots=True)
class _InForce:
    """The table in force, its address policy, and the sources made since it came into force."""

    table: Table
    address_policy: AddressPolicy
    made: dict[_Settings, Source]


class Sources:
    """The sources of one daemon.

    `options` are the values of the daemon's own options, by scheme and column; see `Scheme.columns`. An
    endpoint among them may be requested without an entry in `allow`. `http` makes a client for an address
    policy that trusts the keyword `authorities`: those of the scheme, else those of "". Safe from any thread.
    Raises Invalid for a malformed endpoint.
    """

    def __init__(
        self,
        http: Callable[..., Http],
        allow: Iterable[str],
        table: Table,
        *,
        authorities: Mapping[str, Authorities],
        stall_seconds: float,
        options: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._http, self._authorities = http, authorities
        self._stall_seconds, self._options = stall_seconds, options
        self._lock = threading.Lock()
        self.change(allow, table)
        endpoints = (columns.get("endpoint") for columns in options.values())
        self._in_force.address_policy.also(filter(None, endpoints))  # raises Invalid for a malformed one

    @property
    def table(self) -> Table:
        """The entries in force."""
        return self._in_force.table

    @property
    def address_policy(self) -> AddressPolicy:
        """What sources may reach by the table and `allow` in force."""
        return self._in_force.address_policy

    def change(self, allow: Iterable[str], table: Table) -> None:
        """Put another table into force for later requests. Raises Invalid, and then changes nothing."""
        self._in_force = _InForce(table, table.address_policy(allow), {})

    def of(self, ref: Ref) -> Source:
        """The source of a ref. Raises Forbidden when the table refuses it."""
        now = self._in_force
        now.table.check(ref.base)
        settings = self._settings(now.table, ref)
        with self._lock:
            if settings not in now.made:
                now.made[settings] = self._make(ref.scheme, settings, now)
            return now.made[settings]

    def _settings(self, table: Table, ref: Ref) -> _Settings:
        scheme = SCHEMES[ref.scheme]
        held = {column: each.value for column, each in table.held(ref.base).items()}
        own = dict(self._options.get(ref.scheme, {}))
        # The endpoint of an entry never gets the daemon's own credentials.
        may_use_own_credentials = held.keys().isdisjoint(("endpoint", "credentials"))
        if not may_use_own_credentials:
            own.pop("credentials", None)
        values = {**own, **held}
        columns = [(name, values[name]) for name in scheme.columns if values.get(name) is not None]
        return _Settings(scheme.module, tuple(columns), "endpoint" in held, may_use_own_credentials)

    def _make(self, scheme: str, settings: _Settings, now: _InForce) -> Source:
        make: Callable[[Access], Source] = import_module(settings.module).make
        authorities = self._authorities.get(scheme) or self._authorities[""]
        return make(
            Access(
                dict(settings.columns),
                settings.has_own_endpoint,
                settings.may_use_own_credentials,
                now.table,
                now.address_policy,
                self._stall_seconds,
                partial(self._http, authorities=authorities),
            )
        )
