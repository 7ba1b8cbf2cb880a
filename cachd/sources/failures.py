"""Says which error of cachd a failed HTTP exchange means, and how long to wait after it."""

from __future__ import annotations

import email.utils
import http.client
import re
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from cachd.errors import CachdError, Forbidden, Unavailable
from cachd.policy.backoff import LONGEST_REQUESTED_SECONDS

BUSY = (429, 503)  # what an origin answers when it takes no more requests now
BROKEN = (OSError, http.client.HTTPException)
_TOO_OLD = ("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION")
_DIGITS = re.compile(r"[0-9]{1,300}")  # as many as a float takes
_LONGEST_SHOWN_SECONDS = 1e18
_NOT_YET_VALID = 9  # X509_V_ERR_CERT_NOT_YET_VALID (OpenSSL, x509_vfy.h): mostly the node's clock is not set
# A comma before a quotation mark separates two policies. Other commas separate the pairs of one policy.
_POLICIES = re.compile(r',\s*(?=")')
_NOTHING_LEFT = re.compile(r"\b(?:r|remaining)\s*=\s*0\b")
_RATE_LIMIT_WAIT = re.compile(r"\b(?:t|reset)\s*=\s*([0-9]{1,9})\b")
_RESETS = ("RateLimit-Reset", "X-RateLimit-Reset", "X-Rate-Limit-Reset")
_FIRST_UNIX_SECONDS, _FIRST_MILLISECONDS = 1e9, 1e12  # from here on, a number is Unix time, in s or in ms


def bare(url: str) -> str:
    """The URL without its user and query, because both may contain secrets, such as a signature."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a URL that cannot be parsed"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def protocol_error(url: str, what: str) -> Unavailable:
    """The error for a response that breaks HTTP or contradicts the request; `what` says how."""
    return Unavailable(f"{bare(url)}: {what}", code="origin_protocol")


def broken(url: SplitResult, error: Exception, proxy: str = "") -> CachdError:
    """The error for a failed connection; `proxy` is the proxy that it went through, if any."""
    shown = f"{url.scheme}://{url.netloc}{url.path}"
    if not proxy:
        return _broken(shown, error)
    return _broken(f"{shown} (through the proxy)", error).withhold(proxy=proxy)


def _broken(shown: str, error: Exception, now: Callable[[], float] = time.time) -> CachdError:
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == _NOT_YET_VALID:
        return Unavailable(
            f"{shown}: {error.verify_message}; this node's clock says {said(now())}",
            code="clock_skewed",
            hint="set the node's clock (chronyc tracking); cachd retries meanwhile",
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return Forbidden(
            f"{shown}: {error.verify_message}",
            code="tls_untrusted",
            hint="set ca_file if the origin, or a proxy that decrypts TLS, has its own certificate authority;"
            " check the node's clock",
        )
    if isinstance(error, ssl.SSLError) and error.reason in _TOO_OLD:
        return Forbidden(
            f"{shown}: it speaks no version of TLS that cachd accepts ({error.reason})",
            code="tls_too_old",
            hint="the origin must speak TLS 1.2 or later",
        )
    if isinstance(error, TimeoutError):
        return Unavailable(f"{shown}: no byte arrived for too long", code="stalled")
    return Unavailable(f"{shown}: {type(error).__name__}: {error}", code="connection_failed")


def said(now: float) -> str:
    """A Unix time as a text for people, such as `2026-01-31 09:05 UTC`."""
    return f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC"


class Headers(Protocol):
    """The headers of a request or a response, of any HTTP client."""

    def get(self, name: str, /) -> str | None:
        """The value of a header; None without the header."""
        ...


def retry_after(headers: Headers, clock: Callable[[], float] = time.time) -> float | None:
    """Seconds to wait before the next request: those of `requested_wait`, but at most ten minutes."""
    wait = requested_wait(headers, clock)
    return None if wait is None else min(wait, LONGEST_REQUESTED_SECONDS)


def requested_wait(headers: Headers, clock: Callable[[], float] = time.time) -> float | None:
    """Seconds that the origin asks to wait; None when it does not ask. `clock` gives the Unix time.

    Read from the first of these headers that states it:

        Retry-After          seconds or a date (RFC 9110, 10.2.3)
        RateLimit            `"api";r=0;t=40`: `t` of the policies with nothing left (`r=0`). The Hub sends it
                             (draft-ietf-httpapi-ratelimit-headers-09); earlier `remaining=0, reset=40`
        RateLimit-Reset, X-RateLimit-Reset, X-Rate-Limit-Reset
                             seconds, Unix seconds or a date, unless the header with Remaining says that some
                             requests are left

    Any other value, such as a negative number, is ignored.
    """
    stated = (headers.get("Retry-After") or "").strip()
    if _DIGITS.fullmatch(stated):
        return min(float(stated), _LONGEST_SHOWN_SECONDS)
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(stated).timestamp() - clock())
    waits = [
        float(seconds[1]) + 1
        for policy in _POLICIES.split(headers.get("RateLimit") or "")
        if _NOTHING_LEFT.search(policy) and (seconds := _RATE_LIMIT_WAIT.search(policy))
    ]
    if waits:
        return max(waits)
    for name in _RESETS:
        left = headers.get(name.replace("Reset", "Remaining")) or "0"
        if (reset := headers.get(name)) and left.strip() == "0":
            return _until(reset.strip(), clock())
    return None


def _until(reset: str, now: float) -> float | None:
    """Seconds until a reset that is stated in seconds, as Unix time, in milliseconds of it, or as a date."""
    number = re.fullmatch(r"([0-9]{1,16})(?:\.[0-9]{1,9})?", reset)
    if number:
        seconds = float(reset)
        seconds = seconds / 1000 if seconds > _FIRST_MILLISECONDS else seconds
        return max(0.0, seconds - now) if seconds > _FIRST_UNIX_SECONDS else seconds
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(reset).timestamp() - now)
    return None
