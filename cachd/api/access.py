"""Which role each call needs, and on which models; who a request comes from.

What no row names, nobody but an admin of everything may write.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope

from cachd.api.documents import Asked
from cachd.errors import Unauthorized
from cachd.model import ModelSpec
from cachd.policy.roles import Grant, Role

READS = ("GET", "HEAD", "OPTIONS")
_EVERYBODY = Grant("anonymous", Role.admin)


class Concerns(Enum):
    """What of the node a call changes, or tells to those alone who may change it."""

    nothing = "nothing"
    name = "the model of its path"
    body = "the model that its body asks for"
    node = "the whole node"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a call needs. `role` is None where it is open to everybody, always. `fields` of the body that are
    set need a role of their own."""

    role: Role | None
    concerns: Concerns = Concerns.nothing
    fields: Mapping[str, Role] = field(default_factory=dict)


_PROBE = Rule(None)
_READ = Rule(Role.read)
# Each route by its name. The rows that are asked for most come first.
RULES: Mapping[str, Rule] = {
    "ready": _PROBE,
    "livez": _PROBE,
    "readyz": _PROBE,
    "metrics": _READ,
    "list_models": _READ,
    "show": _READ,
    "capacity": _READ,
    "evictions": _READ,
    "limits": _READ,
    "scrubs": _READ,
    "options": Rule(Role.admin, Concerns.node),  # they name paths, networks and proxies
    "sources": Rule(Role.admin, Concerns.node),  # so does this table
    "take_lease": Rule(Role.lease, Concerns.name),
    "renew_lease": Rule(Role.lease, Concerns.name),
    "release_lease": Rule(Role.lease, Concerns.name),
    "pull": Rule(Role.pull, Concerns.body, {"pin": Role.admin, "replace": Role.admin, "hub_id": Role.admin}),
    "warm": Rule(Role.pull, Concerns.name),
    "verify": Rule(Role.pull, Concerns.name),
    "pin": Rule(Role.admin, Concerns.name),
    "unpin": Rule(Role.admin, Concerns.name),
    "rollback": Rule(Role.admin, Concerns.name),
    "delete": Rule(Role.admin, Concerns.name),
    "set_limits": Rule(Role.admin, Concerns.node),
    "evict": Rule(Role.admin, Concerns.node),
    "sweep": Rule(Role.admin, Concerns.node),
    "openapi": _READ,
    "docs": _READ,
}
_UNLISTED = Rule(Role.admin, Concerns.node)


class Tokens(Protocol):
    """Where tokens are looked up. Blocks. Raises Unauthorized when they cannot be read."""

    def grant_of(self, token: bytes) -> Grant | None: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from: what they may do, and the address that they ask from."""

    grant: Grant
    peer: str


_KNOWN_CALLS, _SHORT_PATH = 1024, 256  # whose route is remembered: probes ask the same again and again


class Call(NamedTuple):
    """A request as the rules see it: the name of its route, the rule, and the model that its path names."""

    action: str
    rule: Rule
    model: str = ""


class Access:
    """Decides who may call what. `tokens` None: everybody may do everything."""

    def __init__(self, routes: Iterable[Any], tokens: Tokens | None, *, anonymous_reads: bool) -> None:
        order = list(RULES)
        named = sorted(routes, key=lambda route: order.index(route.name) if route.name in RULES else -1)
        self._routes: list[tuple[Any, re.Pattern[str], str]] = [
            (route.methods, route.path_regex, route.name) for route in named
        ]
        self._tokens, self._anonymous_reads = tokens, anonymous_reads
        self._known = lru_cache(_KNOWN_CALLS)(self._found)

    def call(self, scope: Scope) -> Call:
        """What a request asks for. What is no route of this daemon is a read, or a write of everything."""
        method, path = scope["method"], scope["path"]
        return (self._known if len(path) <= _SHORT_PATH else self._found)(method, path)

    def _found(self, method: str, path: str) -> Call:
        for methods, pattern, name in self._routes:
            if method in methods and (found := pattern.match(path)):
                return Call(name, RULES.get(name, _UNLISTED), found.groupdict().get("name", ""))
        return Call("none", _READ if method in READS else _UNLISTED)

    async def admit(self, scope: Scope, call: Call) -> None:
        """Let a request pass whose caller may make it. Raises Unauthorized or Forbidden.

        `request.state.caller` is who asks, unless the call is open.
        """
        rule = call.rule
        is_open_read = rule.role is Role.read and self._anonymous_reads and scope["method"] in READS
        if rule.role is None or is_open_read:
            return
        grant = await self._grant(scope, rule.role)
        scope.setdefault("state", {})["caller"] = Caller(grant, peer_of(scope))  # on record though refused
        grant.check_role(rule.role)
        if rule.concerns is Concerns.name:
            grant.check_name(call.model)
        elif rule.concerns is Concerns.node:
            grant.check_everywhere()

    async def _grant(self, scope: Scope, needed: Role) -> Grant:
        """Raises Unauthorized unless there is one Authorization header, with a bearer token that is known.

        A token in the query or in a cookie is none: these end up in logs and in foreign pages.
        """
        if self._tokens is None:
            return _EVERYBODY
        given = Headers(scope=scope).getlist("authorization")
        scheme, _, token = (given[0] if len(given) == 1 else "").partition(" ")
        token = token.strip(" \t")  # and no other blank: it is a part of the token
        if scheme.lower() == "bearer" and token:
            grant = await asyncio.to_thread(self._tokens.grant_of, token.encode("latin-1"))
            if grant is not None:
                return grant
        raise Unauthorized(
            f"this needs a bearer token with the role {needed.name}, and "
            + ("this one is not known" if given else "there is none"),
            code="unauthorized",
            hint="send one Authorization: Bearer header with a token of the daemon's token_file"
            " (cachd: --token-file, CACHD_TOKEN_FILE or CACHD_TOKEN)",
        )


def peer_of(scope: Scope) -> str:
    """The address that a request comes from; `local` where it comes through a socket of this node."""
    client = scope.get("client")
    return str(client[0]) if client else "local"


def check_pull(request: Request, asked: Asked, spec: ModelSpec) -> None:
    """Raises Forbidden unless the caller may pull `spec`, as the body `asked` says it, under its name."""
    grant: Grant = request.state.caller.grant
    request.state.model, request.state.ref = spec.name, str(spec.ref)
    for name, role in RULES["pull"].fields.items():
        if getattr(asked, name):
            grant.check_role(role)
    grant.check_name(spec.name)
    check_folders(request, spec)


def check_folders(request: Request, *pending: ModelSpec | None) -> None:
    """Raises Forbidden unless the caller may change the folders of the Hub view that show these pending."""
    grant: Grant = request.state.caller.grant
    for spec in pending:
        if spec is not None and (spec.ref.scheme == "hf" or spec.hub_id):
            grant.check_repository(spec.repo)


def check_complete(routes: Iterable[Any]) -> None:
    """Raises RuntimeError unless every route has a rule and every rule a route."""
    if different := {route.name for route in routes} ^ RULES.keys():
        raise RuntimeError(f"routes without a rule in access.py, or rules without a route: {different}")
