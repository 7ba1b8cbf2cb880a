"""What an HTTP answer must be before a byte of it is believed, and what any other one means."""

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
_NOT_YET_VALID = 9  # X509_V_ERR_CERT_NOT_YET_VALID (OpenSSL's x509_vfy.h): a clock that is not set yet
_RATE_LIMIT_WAIT = re.compile(r"\bt=([0-9]{1,9})\b")


def bare(url: str) -> str:
    """A URL as it may be shown: signatures live in queries."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a URL that cannot be read"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def number(text: str | None) -> int | None:
    """A header's plain decimal number, None when it is anything else."""
    return int(text) if text and _NUMBER.fullmatch(text) else None


def validator_of(response: Answer) -> str | None:
    """The strong ETag of an answer, else its date, else None."""
    tag = response.getheader("ETag") or ""
    if tag.startswith('"'):  # a weak one (W/"...") promises less than equal bytes
        return tag
    return response.getheader("Last-Modified")


def check_status(response: Answer, url: str) -> None:
    """Raises what a status other than 200 and 206 means: Forbidden, NotFound, Changed or Unavailable."""
    status = response.status
    if status in (200, 206):
        return
    shown = bare(url)
    hub_says = response.getheader("X-Error-Code")  # the Hub's reason, where a status alone is ambiguous
    reason = f"{shown}: {status} {response.reason}".rstrip()
    if status == 401:
        raise Forbidden(
            reason, code="source_unauthorized", hint="check the token", status=status, hub_says=hub_says
        )
    if status in (403, 451):
        raise Forbidden(
            reason,
            code="source_forbidden",
            hint="check that the token may read it; some origins say this of what does not exist",
            status=status,
            hub_says=hub_says,
        )
    if status in (404, 410):
        raise NotFound(reason, code="file_not_found", hint="check the name", status=status)
    if status in (412, 416):
        raise Changed(f"{shown}: the file is not what it was ({status})", status=status)
    told = told_wait(response.headers)
    raise Unavailable(
        f"{reason}; it asks for {told:.0f} s without a request" if told else reason,
        code="rate_limited" if status == 429 else "origin_failed",
        retry_after=retry_after(response.headers),
        status=status,
    )


class Headers(Protocol):
    """The headers of an answer, whichever client brought them."""

    def get(self, name: str, /) -> str | None: ...


def retry_after(headers: Headers) -> float | None:
    """Seconds to wait as the origin asks for, but ten minutes at most; None when it asks for nothing."""
    told = told_wait(headers)
    return None if told is None else min(told, LONGEST_TOLD_SECONDS)


def told_wait(headers: Headers) -> float | None:
    """Seconds the origin asks for: Retry-After as seconds or a date (RFC 9110), or RateLimit's t.

    What is no such thing, a negative number among it, asks for nothing.
    """
    told = (headers.get("Retry-After") or "").strip()
    if _DIGITS.fullmatch(told):
        return min(float(told), _LONGEST_SHOWN_SECONDS)
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    limit = _RATE_LIMIT_WAIT.search(headers.get("RateLimit") or "")
    return float(limit[1]) + 1 if limit else None


def check_encoding(response: Answer, url: str) -> None:
    """Raises Unavailable for coded bytes: they are not the ones a digest speaks of."""
    encoding = response.getheader("Content-Encoding") or "identity"
    if encoding != "identity":
        raise protocol_error(url, f"Content-Encoding {encoding:.40} though identity was asked for")


def check_validator(response: Answer, url: str, validator: str | None) -> None:
    """Raises Changed when the answer is about another state of the file than `validator` marks."""
    now = validator_of(response)
    if validator and now and now != validator:
        raise Changed(f"{bare(url)}: the file is now {now:.80}, and was {validator:.80}")


def announced(response: Answer, url: str, size: int, extent: Extent) -> int:
    """How many bytes an answer must hold, once its headers were found to say so too.

    Raises NoRanges for a whole file where a part was asked for, Changed when the size is another, Unavailable
    when the headers contradict what was asked.
    """
    told_length = response.getheader("Content-Length")
    length = number(told_length)
    if told_length is not None and length is None:
        raise protocol_error(url, f"Content-Length is {told_length:.40}")
    if response.status == 206:
        told = response.getheader("Content-Range") or "none"
        exact = f"bytes {extent.start}-{extent.stop - 1}/{size}"
        if told != exact:
            raise protocol_error(url, f"Content-Range is {told:.60}, not {exact}")
    elif extent.size != size:
        raise NoRanges(url)
    elif length is not None and length != size:
        kind = response.getheader("Content-Type") or "no type"
        raise Changed(f"{bare(url)}: {length} bytes of {kind:.60} where {size} were expected")
    if length is not None and length != extent.size:
        raise protocol_error(url, f"Content-Length is {length}, not {extent.size}")
    return extent.size


def protocol_error(url: str, what: str) -> Unavailable:
    """The origin does not keep to HTTP: `what` it did instead."""
    return Unavailable(f"{bare(url)}: {what}", code="origin_protocol")


def broken(url: SplitResult, error: Exception, proxy: str = "") -> CachdError:
    """What a failed connection means; `proxy` is whom it led through."""
    shown = f"{url.scheme}://{url.netloc}{url.path}"
    return _broken(f"{shown} (by the proxy)", error).withhold(proxy=proxy) if proxy else _broken(shown, error)


def _broken(shown: str, error: Exception) -> CachdError:
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == _NOT_YET_VALID:
        return Unavailable(
            f"{shown}: {error.verify_message}; this node's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            code="clock_skewed",
            hint="set the node's clock (chronyc tracking); it is asked again meanwhile",
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return Forbidden(
            f"{shown}: {error.verify_message}",
            code="tls_untrusted",
            hint="set ca_file if the origin, or a proxy that opens TLS, has its own authority;"
            " check the node's clock",
        )
    if isinstance(error, ssl.SSLError) and error.reason in _TOO_OLD:
        return Forbidden(
            f"{shown}: it speaks no TLS that can be trusted ({error.reason})",
            code="tls_too_old",
            hint="the origin must speak TLS 1.2 or later",
        )
    if isinstance(error, TimeoutError):
        return Unavailable(f"{shown}: no byte for too long", code="stalled")
    return Unavailable(f"{shown}: {type(error).__name__}: {error}", code="connection_failed")
