"""Defines what the function `make` of a source's module gets: settings, and clients for requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cachd.policy.address_policy import AddressPolicy
from cachd.sources.http import Http
from cachd.sources.table import Table


@dataclass(frozen=True, slots=True)
class Access:
    """The settings of one source, and the addresses that it may reach.

    `columns`: the settings, by column of the option `sources`; a column that neither an entry nor an option
    sets is absent. `has_own_endpoint`: whether an entry sets the endpoint. `may_use_own_credentials`: whether
    the source may use the daemon's default credentials, such as HF_TOKEN. It may not if an entry sets an
    endpoint or credentials.
    """

    columns: Mapping[str, Any]
    has_own_endpoint: bool
    may_use_own_credentials: bool
    table: Table
    address_policy: AddressPolicy
    stall_seconds: float
    client: Callable[[AddressPolicy], Http]

    def http(self) -> Http:
        """A client that may reach what the address policy allows, and the endpoint of the settings."""
        endpoint = self.columns.get("endpoint")
        return self.client(self.address_policy.also([endpoint] if endpoint else []))

    def http_for(self, url: str) -> Http:
        """A client that may also reach `url`, such as a bucket's own host below the endpoint."""
        return self.client(self.address_policy.also([url]))
