"""Chooses the source of each ref by its scheme and by the entries of `sources` that cover it.

A source is made when it is first needed: huggingface_hub and botocore take longer to import than the daemon
takes to start, and few nodes need both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachd.model import Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.http import Http
from cachd.sources.secrets import Secret
from cachd.sources.shared_volume import SharedVolumeSource
from cachd.sources.source import Source
from cachd.sources.table import Table
from cachd.sources.trust import Authorities
from cachd.sources.web import WebSource


@dataclass(frozen=True, slots=True)
class _Access:
    """The settings of a source. Refs with equal settings share one source.

    `is_own`: an entry sets the endpoint, so the credentials of the daemon's own options are not sent there.
    """

    scheme: str
    endpoint: str | None = None
    is_own: bool = False
    region: str | None = None
    credentials: Path | None = None
    profile: str | None = None
    instance_role: bool = False


@dataclass(frozen=True, slots=True)
class _InForce:
    """The table in force, its address policy, and the sources made since it came into force."""

    table: Table
    address_policy: AddressPolicy
    made: dict[_Access, Source]


class Sources:
    """The sources of one daemon. A configured endpoint may be requested without an entry in `allow`.

    `http` makes a client for an address policy; with the keyword `authorities` it trusts these instead of its
    own. Safe from any thread. Raises Invalid for a malformed endpoint.
    """

    def __init__(
        self,
        http: Callable[..., Http],
        allow: Iterable[str],
        table: Table,
        *,
        s3_authorities: Authorities,
        stall_seconds: float,
        hf_endpoint: str,
        hf_token: Secret,
        s3_endpoint_url: str | None,
        s3_region: str | None,
    ) -> None:
        self._http = http
        self._s3_authorities, self._stall_seconds = s3_authorities, stall_seconds
        self._hf_endpoint, self._hf_token = hf_endpoint, hf_token
        self._s3_endpoint_url, self._s3_region = s3_endpoint_url, s3_region
        self._lock = threading.Lock()
        self.change(allow, table)
        self._in_force.address_policy.also(filter(None, (hf_endpoint, s3_endpoint_url)))

    @property
    def table(self) -> Table:
        """The entries in force."""
        return self._in_force.table

    def change(self, allow: Iterable[str], table: Table) -> None:
        """Put another table into force for later requests. Raises Invalid, and then changes nothing."""
        self._in_force = _InForce(table, table.address_policy(allow), {})

    def of(self, ref: Ref) -> Source:
        """The source of a ref. Raises Forbidden when the table refuses it."""
        now = self._in_force
        now.table.check(ref.base)
        access = self._access(now.table, ref)
        with self._lock:
            if access not in now.made:
                now.made[access] = self._make(access, now)
            return now.made[access]

    def _access(self, table: Table, ref: Ref) -> _Access:
        if ref.scheme not in ("hf", "s3"):
            return _Access("file" if ref.scheme == "file" else "web")
        held = {column: each.value for column, each in table.held(ref.base).items()}
        options: dict[str, dict[str, str | None]] = {
            "hf": {"endpoint": self._hf_endpoint},
            "s3": {"endpoint": self._s3_endpoint_url, "region": self._s3_region},
        }
        asked: dict[str, Any] = {**options[ref.scheme], **held}
        asked = {name: asked[name] for name in _Access.__dataclass_fields__ if name in asked}
        return _Access(ref.scheme, **asked, is_own="endpoint" in held)

    def _make(self, access: _Access, now: _InForce) -> Source:
        if access.scheme == "hf":
            return self._hub(access, now)
        if access.scheme == "s3":
            return self._bucket(access, now.address_policy)
        if access.scheme == "file":
            return SharedVolumeSource(now.address_policy, stall_seconds=self._stall_seconds)
        return WebSource(self._http(now.address_policy), now.table.headers)

    def _hub(self, access: _Access, now: _InForce) -> Source:
        from cachd.sources.huggingface import HubSource  # it imports huggingface_hub

        endpoint = access.endpoint or self._hf_endpoint
        is_named = access.is_own or access.credentials is not None
        token = Secret(access.credentials) if is_named else self._hf_token
        http = self._http(now.address_policy.also([endpoint]))
        return HubSource(http, endpoint=endpoint, token=token, check=now.table.check)

    def _bucket(self, access: _Access, address_policy: AddressPolicy) -> Source:
        from cachd.sources.s3 import BucketSource, Keys  # it imports botocore

        named = access.credentials or access.profile or access.instance_role
        return BucketSource(
            self._http(
                address_policy.also([access.endpoint] if access.endpoint else []),
                authorities=self._s3_authorities,
            ),
            endpoint_url=access.endpoint,
            region=access.region,
            keys=Keys(
                access.credentials,
                access.profile,
                instance_role=access.instance_role,
                are_none=access.is_own and not named,
            ),
        )
