"""Remembers which origins asked for a pause (429), so that no pull of this node asks them meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult

from cachd.errors import CachdError, Unavailable
from cachd.sources.connection import origin_of
from cachd.sources.failures import Headers, bare, retry_after

RATE_LIMITED = 429
_MAX_PAUSES = 1000
_SIGNED = ("X-Amz-Credential=", "X-Amz-Signature=")


class Pauses:
    """The pauses of all origins. Thread-safe.

    An origin is a scheme, a host and a port. For a signed request to S3, the first name of the path counts,
    too: it is mostly the bucket, and each bucket has limits of its own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._until: dict[tuple[object, str], float] = {}

    def check(self, url: SplitResult, headers: Headers) -> None:
        """Raises Unavailable while the origin of this request wants a pause; see `is_pause`."""
        if not self._until:
            return
        left = self._until.get(_key(url, headers), 0.0) - self._clock()
        if left > 0:
            raise Unavailable(
                f"{bare(url.geturl())}: not asked, because its origin wants a pause of another {left:.0f} s",
                code="rate_limited",
                retry_after=left,
            )

    def note(self, url: SplitResult, headers: Headers, answered: Headers) -> None:
        """Note that a request was answered with 429."""
        wait = retry_after(answered)
        if not wait:
            return
        with self._lock:
            now = self._clock()
            if len(self._until) >= _MAX_PAUSES:
                self._until = {key: until for key, until in self._until.items() if until > now}
            if len(self._until) < _MAX_PAUSES:
                self._until[_key(url, headers)] = now + wait


def is_pause(error: CachdError) -> bool:
    """Whether the origin was not even asked, because it wants a pause."""
    return error.code == "rate_limited" and error.origin_status is None


def _key(url: SplitResult, headers: Headers) -> tuple[object, str]:
    is_signed = (headers.get("Authorization") or "").startswith("AWS4-")
    if is_signed or any(mark in url.query for mark in _SIGNED):
        return origin_of(url), url.path.split("/", 2)[1] if "/" in url.path else ""
    return origin_of(url), ""
