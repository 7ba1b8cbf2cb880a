"""Decides who may use the endpoint: by the address of the client, and perhaps by its token of the Hub."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from cachd.errors import Forbidden, Invalid, NotFound, Unavailable
from cachd.metrics import Metrics
from cachd.model import Ref
from cachd.policy.peers import address_of
from cachd.serve.bounds import PerMinute, Places, Waits

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_ALLOWED_SECONDS, _REFUSED_SECONDS = 300.0, 30.0
_MAX_KEPT = 10_000
_CHECK_SECONDS = 30.0
_MAX_AT_ONCE, _MAX_OF_PEER = 8, 60
_TOKEN = re.compile(r"[!-~]{1,4096}")


class Upstream(Protocol):
    """Asks the Hub whether a token may read a repository."""

    def check_caller(self, ref: Ref, token: str | None, *, seconds: float) -> None:
        """Raises NotFound, Forbidden or Invalid if it may not, Unavailable if the Hub does not answer."""


class Callers:
    """The clients that the endpoint answers: this node itself, and the networks of `hub_allow`.

    `tokens`: checks the token of each caller; without it (None), all these clients may read everything.
    """

    def __init__(self, networks: Iterable[str], tokens: Tokens | None = None) -> None:
        """Raises ValueError for a text that is no network."""
        self._networks: list[Network] = [ipaddress.ip_network(each) for each in networks]
        self._tokens = tokens

    def may_connect(self, client: str, own: str) -> bool:
        """Whether a client with this address may ask at all. `own`: this end of its connection.

        A connection of this node to itself has the same address at both ends. No header counts.
        """
        address = address_of(client)
        if address.is_loopback or any(address in network for network in self._networks):
            return True
        return address == address_of(own)

    def check(self, repo: str, authorization: str | None, peer: str) -> None:
        """Raises NotFound if this caller may not know of a repository, Unavailable if the Hub cannot say."""
        if self._tokens is not None:
            kind, _, token = (authorization or "").partition(" ")
            self._tokens.check(repo, token.strip() if kind.lower() == "bearer" else None, peer)


@dataclass(frozen=True, slots=True)
class _Said:
    """The Hub's answer whether a token may read a repository, which holds `until` then (monotonic)."""

    may_read: bool
    until: float


class Tokens:
    """Asks the Hub about tokens of callers, and remembers its answers for a while. Safe from any thread.

    Callers with the same question share one request, and count among those that wait (`waits`). No token is
    kept, only its hash. The Hub is asked about 8 questions at a time, and 60 a minute of each peer.
    """

    def __init__(
        self,
        upstream: Upstream,
        waits: Waits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        *,
        check_seconds: float = _CHECK_SECONDS,
    ) -> None:
        self._upstream, self._waits, self._metrics = upstream, waits, metrics
        self._clock, self._check_seconds = clock, check_seconds
        self._lock = threading.Lock()
        self._said: dict[tuple[bytes, str], _Said] = {}  # the oldest first
        self._asking: dict[tuple[bytes, str], Future[_Said]] = {}
        self._at_once = Places(_MAX_AT_ONCE, "too many tokens are checked at the Hub")
        self._in_minute = PerMinute(_MAX_OF_PEER, "this client has asked with too many tokens", clock)

    def check(self, repo: str, token: str | None, peer: str) -> None:
        """Raises NotFound if the token may not read the repository, and what prevents the Hub's answer."""
        verdict = "failed"
        try:
            # The Hub need not be asked about what cannot be a token.
            is_one = not token or _TOKEN.fullmatch(token)
            may_read = bool(is_one) and self._may_read(repo, token or None, peer)
            verdict = "accepted" if may_read else "refused"
        finally:
            self._metrics.hub_token_checks.labels(verdict).inc()
        if not may_read:
            raise NotFound(f"{repo} is not found, or the token may not read it", code="repo_not_found")

    def _may_read(self, repo: str, token: str | None, peer: str) -> bool:
        key = hashlib.sha256((token or "").encode()).digest(), repo
        with self._lock:
            said = self._remembered(key)
        if said is None:
            with self._waits.one(peer):
                said = self._awaited(key, token, peer)
        return said.may_read

    def _remembered(self, key: tuple[bytes, str]) -> _Said | None:
        """An answer of the Hub that still holds. The caller has the lock."""
        said = self._said.get(key)
        return said if said is not None and said.until > self._clock() else None

    def _awaited(self, key: tuple[bytes, str], token: str | None, peer: str) -> _Said:
        """The Hub's answer to a question, which another caller may have asked already."""
        with self._lock:
            if (said := self._remembered(key)) is not None:
                return said
            is_first = key not in self._asking
            if is_first:
                self._in_minute.count(peer)
                self._at_once.take(peer)
                self._asking[key] = Future()
            answer = self._asking[key]
        if is_first:
            self._ask(key, token, peer, answer)
        try:
            return answer.result(timeout=2 * self._check_seconds)
        except TimeoutError as error:
            raise Unavailable("the Hub has not answered about a token", retry_after=5.0) from error

    def _ask(self, key: tuple[bytes, str], token: str | None, peer: str, answer: Future[_Said]) -> None:
        """Ask the Hub, and give all who wait its answer or the error."""
        said: _Said | None = None
        try:
            said = self._asked(key[1], token)
            answer.set_result(said)
        except Exception as error:  # noqa: BLE001 - all who wait get it
            answer.set_exception(error)  # for this caller, too
        finally:
            self._at_once.leave(peer)
            with self._lock:
                del self._asking[key]
                if said is not None:
                    self._said.pop(key, None)
                    self._said[key] = said
                while len(self._said) > _MAX_KEPT:
                    del self._said[next(iter(self._said))]

    def _asked(self, repo: str, token: str | None) -> _Said:
        """The Hub's answer. Raises Unavailable, and what else prevents it."""
        try:
            self._upstream.check_caller(Ref.parse(f"hf://{repo}"), token, seconds=self._check_seconds)
        except (NotFound, Forbidden, Invalid):
            return _Said(may_read=False, until=self._clock() + _REFUSED_SECONDS)
        return _Said(may_read=True, until=self._clock() + _ALLOWED_SECONDS)
