"""Decides which caller may make which API call.

`RULES` holds the role that each call needs. A write to a path that is not in it needs an admin token without
namespaces.
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

from cachd.api.requests import Asked
from cachd.errors import Unauthorized
from cachd.model import ModelSpec
from cachd.policy.roles import Grant, Role

READS = ("GET", "HEAD", "OPTIONS")
PROBES = re.compile(r"/livez|/readyz|/v1/models/[^/]+/ready")  # the paths of probes
_EVERYBODY = Grant("anonymous", Role.admin)


class Concerns(Enum):
    """What a call changes, or shows only to those who may change it. A token's namespaces must cover it."""

    nothing = "nothing"
    name = "the model in the path"
    body = "the model in the request body"
    node = "the whole node"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a caller needs for one call.

    `role` is None when the call is always open to everybody. `fields` are the fields of the body that need a
    higher role when they are set.
    """

    role: Role | None
    concerns: Concerns = Concerns.nothing
    fields: Mapping[str, Role] = field(default_factory=dict)


_PROBE = Rule(None)
_PAGE = Rule(None)  # it holds nothing of the node, and a browser sends no token when it loads it
_READ = Rule(Role.read)
# Rules by route name. `Access` tries the routes in this order, so the most frequent calls come first.
RULES: Mapping[str, Rule] = {
    "ready": _PROBE,
    "livez": _PROBE,
    "readyz": _PROBE,
    "metrics": _READ,
    "list_models": _READ,
    "show": _READ,
    "list_files": _READ,
    "capacity": _READ,
    "evictions": _READ,
    "events": _READ,
    "limits": _READ,
    "scrubs": _READ,
    "options": Rule(Role.admin, Concerns.node),  # the answer names paths, networks and proxies
    "sources": Rule(Role.admin, Concerns.node),  # so does this answer
    "take_lease": Rule(Role.lease, Concerns.name),
    "renew_lease": Rule(Role.lease, Concerns.name),
    "release_lease": Rule(Role.lease, Concerns.name),
    "pull": Rule(Role.pull, Concerns.body, {"pin": Role.admin, "replace": Role.admin, "hub_id": Role.admin}),
    "resolve": Rule(Role.pull, Concerns.body),
    "preflight_ref": Rule(Role.pull, Concerns.body),
    "warm": Rule(Role.pull, Concerns.name),
    "verify": Rule(Role.pull, Concerns.name),
    "preflight": Rule(Role.pull, Concerns.name),  # the answer quotes configurations, and takes time to make
    "cancel": Rule(Role.admin, Concerns.name),  # as `replace`, the other way to end a pull of somebody else
    "pin": Rule(Role.admin, Concerns.name),
    "unpin": Rule(Role.admin, Concerns.name),
    "rollback": Rule(Role.admin, Concerns.name),
    "delete": Rule(Role.admin, Concerns.name),
    "set_limits": Rule(Role.admin, Concerns.node),
    "evict": Rule(Role.admin, Concerns.node),
    "sweep": Rule(Role.admin, Concerns.node),
    "openapi": _READ,
    "page": _PAGE,
    "docs": _PAGE,
    "asset": _PAGE,
}
_UNLISTED = Rule(Role.admin, Concerns.node)


class Tokens(Protocol):
    """Looks up tokens."""

    def grant_of(self, token: bytes) -> Grant | None:
        """None for an unknown token. Blocks. Raises Unauthorized when the tokens cannot be read."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request: what their token grants, and the address they call from."""

    grant: Grant
    peer: str


# `Access` remembers the routes of the last calls with short paths, because probes repeat the same calls.
_KNOWN_CALLS, _SHORT_PATH = 1024, 256


class Call(NamedTuple):
    """A request as the rules see it: the route's name, its rule, and the model in the path (or empty)."""

    action: str
    rule: Rule
    model: str = ""


class Access:
    """Decides who may call what. Without `tokens` (None), every caller may do everything."""

    def __init__(self, routes: Iterable[Any], tokens: Tokens | None, *, anonymous_reads: bool) -> None:
        order = list(RULES)
        named = sorted(routes, key=lambda route: order.index(route.name))
        self._routes: list[tuple[Any, re.Pattern[str], str]] = [
            (route.methods, route.path_regex, route.name) for route in named
        ]
        self._tokens, self._anonymous_reads = tokens, anonymous_reads
        self._known = lru_cache(_KNOWN_CALLS)(self._found)

    def call(self, scope: Scope) -> Call:
        """The route and rule of a request. An unknown path counts as a read, or as a write to the node."""
        method, path = scope["method"], scope["path"]
        return (self._known if len(path) <= _SHORT_PATH else self._found)(method, path)

    def _found(self, method: str, path: str) -> Call:
        for methods, pattern, name in self._routes:
            if method in methods and (found := pattern.match(path)):
                return Call(name, RULES.get(name, _UNLISTED), found.groupdict().get("name", ""))
        return Call("none", _READ if method in READS else _UNLISTED)

    async def admit(self, scope: Scope, call: Call) -> None:
        """Return when the caller may make this call. Raises Unauthorized or Forbidden.

        Sets `request.state.caller`, unless the call is open to everybody.
        """
        rule = call.rule
        is_open_read = rule.role is Role.read and self._anonymous_reads and scope["method"] in READS
        if rule.role is None or is_open_read:
            return
        grant = await self._grant(scope, rule.role)
        # Set before the checks, because the audit log also names the callers that are refused.
        scope.setdefault("state", {})["caller"] = Caller(grant, peer_of(scope))
        grant.check_role(rule.role)
        if rule.concerns is Concerns.name:
            grant.check_name(call.model)
        elif rule.concerns is Concerns.node:
            grant.check_everywhere()

    async def _grant(self, scope: Scope, needed: Role) -> Grant:
        """The grant of the caller's token.

        Raises Unauthorized unless exactly one Authorization header holds a known bearer token. Tokens in the
        query or in cookies are ignored: queries end up in logs, and browsers attach cookies by themselves.
        """
        if self._tokens is None:
            return _EVERYBODY
        headers = Headers(scope=scope).getlist("authorization")
        scheme, _, token = (headers[0] if len(headers) == 1 else "").partition(" ")
        token = token.strip(" \t")  # only these: any other blank is part of the token
        if scheme.lower() == "bearer" and token:
            grant = await asyncio.to_thread(self._tokens.grant_of, token.encode("latin-1"))
            if grant is not None:
                return grant
        raise Unauthorized(
            f"this call needs a bearer token with the role {needed.name}, and "
            + ("the token of the request is unknown" if headers else "the request has none"),
            code="unauthorized",
            hint="send one Authorization: Bearer header with a token from the daemon's token_file"
            " (cachd: --token-file, CACHD_TOKEN_FILE or CACHD_TOKEN)",
        )


def peer_of(scope: Scope) -> str:
    """The address that a request comes from; `local` when it comes through a unix socket."""
    client = scope.get("client")
    return str(client[0]) if client else "local"


def check_pull(request: Request, asked: Asked, spec: ModelSpec) -> None:
    """Raises Forbidden unless the caller may pull `spec`, made from the body `asked`, under its name."""
    grant: Grant = request.state.caller.grant
    for name, role in RULES["pull"].fields.items():
        if getattr(asked, name):
            grant.check_role(role)
    check_spec(request, spec)


def check_spec(request: Request, spec: ModelSpec) -> None:
    """Raises Forbidden unless the caller's namespaces cover the spec's name and its folder."""
    grant: Grant = request.state.caller.grant
    request.state.model, request.state.ref = spec.name, str(spec.ref)
    grant.check_name(spec.name)
    check_folders(request, spec)


def check_folders(request: Request, *specs: ModelSpec | None) -> None:
    """Raises Forbidden unless the caller may change the folders of the Hub view that show these specs."""
    grant: Grant = request.state.caller.grant
    for spec in specs:
        if spec is not None and (spec.ref.scheme == "hf" or spec.hub_id):
            grant.check_repository(spec.repo)


def check_complete(routes: Iterable[Any]) -> None:
    """Raises RuntimeError unless every route has a rule and every rule a route."""
    if different := {route.name for route in routes} ^ RULES.keys():
        raise RuntimeError(f"routes without a rule in access.py, or rules without a route: {different}")
