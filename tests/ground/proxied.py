"""HTTP by way of a proxy, as sources speak it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import CachdError
from cachd.model import Extent
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.proxy import Proxies
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http, Target
from cachd.sources.secrets import Secret
from cachd.sources.source import Body
from cachd.sources.timeouts import Timeouts
from cachd.sources.trust import Authorities
from tests.conftest import Engine
from tests.ground.node import Node

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 30.0
CREDENTIALS = "node:a password: with/odd+letters"
PUBLIC_BY_NAME = "https://origin.test/x"  # nobody knows the name but the proxy
Nodes = Callable[..., Node]
Engines = Callable[..., Engine]


def over(
    proxy: str | None,
    *allow: str,
    no_proxy: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
    credentials: Path | None = None,
    ca_file: Path | None = None,
    connect_seconds: float = PATIENCE_SECONDS,
    stall_seconds: float = PATIENCE_SECONDS,
) -> Http:
    return Http(
        AddressPolicy(allow),
        authorities=Authorities(str(ca_file) if ca_file else None),
        timeouts=Timeouts(connect_seconds, stall_seconds),
        proxies=Proxies.configured(proxy, no_proxy, environ or {}),
        proxy_credentials=Secret(credentials),
    )


def fetched(http: Http, url: str, size: int) -> bytes:
    with http.open(Target(url, size), Extent(0, size), CancelToken()) as body:
        return drained(body, size)


def drained(body: Body, size: int) -> bytes:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = body.readinto(view[: 256 * KIB])
        assert count, "the end, too early"
        view = view[count:]
    return bytes(content)


def refusal_of(call: Callable[[], object]) -> CachdError:
    with pytest.raises(CachdError) as refusal:
        call()
    return refusal.value
