"""Decides whether an HTTP answer is the one that was asked for, and which error it means if not."""

from __future__ import annotations

import email.utils
import http.client
import re
import ssl
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol
from urllib.parse import SplitResult, urlsplit

from cachd.errors import CachdError, Changed, Forbidden, NotFound, Unavailable
from cachd.model import Extent
from cachd.policy.backoff import LONGEST_TOLD_SECONDS
from cachd.sources.source import NoRanges

if TYPE_CHECKING:
    from cachd.sources.exchange import Answer

BROKEN = (OSError, http.client.HTTPException)
_TOO_OLD = ("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION")
_NUMBER = re.compile(r"[0-9]{1,18}")
_DIGITS = re.compile(r"[0-9]{1,300}")  # as many as a float takes
_LONGEST_SHOWN_SECONDS = 1e18
_NOT_YET_VALID = 9  # X509_V_ERR_CERT_NOT_YET_VALID (OpenSSL, x509_vfy.h): mostly the node's clock is not set
_RATE_LIMIT_WAIT = re.compile(r"\bt=([0-9]{1,9})\b")


def bare(url: str) -> str:
    """The URL without user and query, either of which may hold a secret such as a signature."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a URL that cannot be parsed"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def number(text: str | None) -> int | None:
    """The decimal number in a header; None for anything else."""
    return int(text) if text and _NUMBER.fullmatch(text) else None


def validator_of(response: Answer) -> str | None:
    """The strong ETag of an answer, else its Last-Modified date, else None (RFC 9110, 8.8)."""
    tag = response.getheader("ETag") or ""
    if tag.startswith('"'):  # a weak one (W/"...") does not promise equal bytes (RFC 9110, 8.8.1)
        return tag
    return response.getheader("Last-Modified")


def check_status(response: Answer, url: str) -> None:
    """Raises Forbidden, NotFound, Changed or Unavailable for a status other than 200 and 206."""
    status = response.status
    if status in (200, 206):
        return
    shown = bare(url)
    hub_error = response.getheader("X-Error-Code")  # the Hub sends it where the status alone is ambiguous
    reason = f"{shown}: {status} {response.reason}".rstrip()
    if status == 401:
        raise Forbidden(
            reason,
            code="source_unauthorized",
            hint="check the token",
            origin_status=status,
            hub_error=hub_error,
        )
    if status in (403, 451):
        raise Forbidden(
            reason,
            code="source_forbidden",
            hint="check that the token may read it; some origins answer this for a file that does not exist",
            origin_status=status,
            hub_error=hub_error,
        )
    if status in (404, 410):
        raise NotFound(reason, code="file_not_found", hint="check the name", origin_status=status)
    if status in (412, 416):
        raise Changed(f"{shown}: the file has changed ({status})", origin_status=status)
    wait = told_wait(response.headers)
    raise Unavailable(
        f"{reason}; the origin asks for a pause of {wait:.0f} s" if wait else reason,
        code="rate_limited" if status == 429 else "origin_failed",
        retry_after=retry_after(response.headers),
        origin_status=status,
    )


class Headers(Protocol):
    """The headers of an answer, of any HTTP client."""

    def get(self, name: str, /) -> str | None: ...


def retry_after(headers: Headers) -> float | None:
    """Seconds to wait before the next request: as `told_wait`, but ten minutes at most."""
    wait = told_wait(headers)
    return None if wait is None else min(wait, LONGEST_TOLD_SECONDS)


def told_wait(headers: Headers) -> float | None:
    """Seconds that the origin asks to wait; None when it does not ask.

    Read from Retry-After, seconds or a date (RFC 9110, 10.2.3), else from `t` of RateLimit, which the Hub
    sends (draft-ietf-httpapi-ratelimit-headers-09). Any other value, such as a negative number, is ignored.
    """
    stated = (headers.get("Retry-After") or "").strip()
    if _DIGITS.fullmatch(stated):
        return min(float(stated), _LONGEST_SHOWN_SECONDS)
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(stated).timestamp() - time.time())
    limit = _RATE_LIMIT_WAIT.search(headers.get("RateLimit") or "")
    return float(limit[1]) + 1 if limit else None


def check_encoding(response: Answer, url: str) -> None:
    """Raises Unavailable for an encoded body (RFC 9110, 8.4): a digest is of the file's own bytes."""
    encoding = response.getheader("Content-Encoding") or "identity"
    if encoding != "identity":
        raise protocol_error(
            url, f"Content-Encoding is {encoding:.40}, though the request asked for identity"
        )


def check_validator(response: Answer, url: str, validator: str | None) -> None:
    """Raises Changed when the answer has another validator than `validator`."""
    now = validator_of(response)
    if validator and now and now != validator:
        raise Changed(
            f"{bare(url)}: the file has changed: its validator was {validator:.80} and is now {now:.80}"
        )


def announced(response: Answer, url: str, size: int, extent: Extent) -> int:
    """The number of bytes in the body, after a check of the headers (RFC 9110, 14.4 and 8.6).

    `size` is that of the file, `extent` what was asked for. Raises NoRanges for a complete file where a part
    was asked for, Changed for a file of another size, Unavailable when the headers contradict the request.
    """
    length_header = response.getheader("Content-Length")
    length = number(length_header)
    if length_header is not None and length is None:
        raise protocol_error(url, f"Content-Length is {length_header:.40}")
    if response.status == 206:
        stated = response.getheader("Content-Range") or "none"
        exact = f"bytes {extent.start}-{extent.stop - 1}/{size}"
        if stated != exact:
            raise protocol_error(url, f"Content-Range is {stated:.60}, not {exact}")
    elif extent.size != size:
        raise NoRanges(url)
    elif length is not None and length != size:
        kind = response.getheader("Content-Type") or "no type"
        raise Changed(f"{bare(url)}: {length} bytes of {kind:.60} where {size} were expected")
    if length is not None and length != extent.size:
        raise protocol_error(url, f"Content-Length is {length}, not {extent.size}")
    return extent.size


def protocol_error(url: str, what: str) -> Unavailable:
    """The error for an answer that breaks HTTP or contradicts the request; `what` says how."""
    return Unavailable(f"{bare(url)}: {what}", code="origin_protocol")


def broken(url: SplitResult, error: Exception, proxy: str = "") -> CachdError:
    """The error for a failed connection; `proxy` is the proxy that it went through, if any."""
    shown = f"{url.scheme}://{url.netloc}{url.path}"
    if not proxy:
        return _broken(shown, error)
    return _broken(f"{shown} (through the proxy)", error).withhold(proxy=proxy)


def _broken(shown: str, error: Exception) -> CachdError:
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == _NOT_YET_VALID:
        return Unavailable(
            f"{shown}: {error.verify_message}; this node's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
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
