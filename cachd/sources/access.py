"""What the module of a source makes it from: settings, and the means to send requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cachd.policy.address_policy import AddressPolicy
from cachd.sources.http import Http
from cachd.sources.table import Table


@dataclass(frozen=True, slots=True)
class Access:
    """The access of one source, to what the table and the options allow.

    `columns`: the settings of its refs, by column of the option `sources`; absent if neither an entry nor an
    option sets the column. `has_own_endpoint`: an entry sets the endpoint. `may_use_own_credentials`: whether
    the source may sign in as the daemon does by default, such as with HF_TOKEN. False for an entry with its
    own endpoint or credentials.
    """

    columns: Mapping[str, Any]
    has_own_endpoint: bool
    may_use_own_credentials: bool
    table: Table
    address_policy: AddressPolicy
    stall_seconds: float
    client: Callable[[AddressPolicy], Http]

    def http(self) -> Http:
        """A client for all that the address policy allows, and for the endpoint of the settings."""
        endpoint = self.columns.get("endpoint")
        return self.client(self.address_policy.also([endpoint] if endpoint else []))

    def http_for(self, url: str) -> Http:
        """The same for a URL that the settings imply, such as a bucket's own host below the endpoint."""
        return self.client(self.address_policy.also([url]))
