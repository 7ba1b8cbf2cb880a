"""Which error a failed exchange means, and how long an origin asks to wait."""

from __future__ import annotations

import email.utils
import ssl
from http.client import HTTPException
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError, Forbidden, Unavailable
from cachd.sources.connection import origin_of
from cachd.sources.failures import bare, broken, protocol_error, requested_wait, retry_after, said

NOW = 1_700_000_000.0
SOON = email.utils.formatdate(NOW + 90, usegmt=True)
PAST = email.utils.formatdate(NOW - 90, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"Retry-After": " 7 "}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": SOON}, 90),
        ({"Retry-After": PAST}, 0),
        ({"Retry-After": "7", "RateLimit": '"a";r=0;t=40'}, 7),
        ({"Retry-After": "soon", "RateLimit": '"a";r=0;t=40'}, 41),
        ({"RateLimit": '"a";r=1;t=40'}, None),
        ({"RateLimit": '"a";r=0'}, None),
        ({"RateLimit": "limit=10, remaining=0, reset=40"}, 41),
        ({"RateLimit": '"a";r=0;t=4, "b";r=0;t=9, "c";r=3;t=99'}, 10),
        ({"RateLimit": '"a";r=1;t=4', "RateLimit-Reset": "8"}, 8),
        ({"RateLimit-Reset": "30"}, 30),
        ({"RateLimit-Reset": "30", "RateLimit-Remaining": "0"}, 30),
        ({"RateLimit-Reset": "30", "RateLimit-Remaining": "1"}, None),
        ({"RateLimit-Reset": "30", "RateLimit-Remaining": "1", "X-RateLimit-Reset": "20"}, 20),
        ({"X-Rate-Limit-Reset": "12", "X-Rate-Limit-Remaining": " 0 "}, 12),
        ({"X-RateLimit-Reset": "12.5"}, 12.5),
        ({"X-RateLimit-Reset": "1000000000"}, 1e9),
        ({"X-RateLimit-Reset": f"{NOW + 25:.0f}"}, 25),
        ({"X-RateLimit-Reset": f"{NOW - 25:.0f}"}, 0),
        ({"X-RateLimit-Reset": f"{(NOW + 25) * 1000:.0f}"}, 25),
        ({"X-RateLimit-Reset": SOON}, 90),
        ({"X-RateLimit-Reset": PAST}, 0),
        ({"X-RateLimit-Reset": "soon"}, None),
        ({"X-RateLimit-Reset": "-5"}, None),
    ],
)
def test_the_first_header_that_states_a_wait_counts(headers: dict[str, str], wait: float | None) -> None:
    assert requested_wait(headers, lambda: NOW) == wait
    assert retry_after(headers, lambda: NOW) == (None if wait is None else min(wait, 600))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:word@host:8/a?b=c#d", "https://host:8/a"),
        ("https://host", "https://host"),
        ("https://[::1", "a URL that cannot be parsed"),
    ],
)
def test_a_url_is_shown_without_what_may_be_secret(url: str, shown: str) -> None:
    assert bare(url) == shown


def untrusted(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "verify failed")
    error.verify_code, error.verify_message = code, "not good"
    return error


def tls(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, "tls")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "kind", "code", "detail"),
    [
        (untrusted(9), Unavailable, "clock_skewed", "not good; this node's clock says 20"),
        (untrusted(18), Forbidden, "tls_untrusted", "not good"),
        (tls("UNSUPPORTED_PROTOCOL"), Forbidden, "tls_too_old", "UNSUPPORTED_PROTOCOL"),
        (tls("TLSV1_ALERT_PROTOCOL_VERSION"), Forbidden, "tls_too_old", "no version of TLS"),
        (tls("OTHER"), Unavailable, "connection_failed", "SSLError"),
        (TimeoutError(), Unavailable, "stalled", "no byte arrived"),
        (ConnectionResetError("reset"), Unavailable, "connection_failed", "ConnectionResetError: reset"),
        (HTTPException("odd"), Unavailable, "connection_failed", "HTTPException: odd"),
    ],
)
def test_a_failed_connection_becomes_an_error_that_says_what_to_do(
    error: Exception, kind: type[CachdError], code: str, detail: str
) -> None:
    url = urlsplit("https://host:8/a?secret")
    found = broken(url, error)
    assert (type(found), found.code, found.withheld) == (kind, code, {})
    assert found.detail.startswith("https://host:8/a: ")
    assert detail in found.detail
    assert bool(found.hint) == (code not in ("stalled", "connection_failed"))
    by_proxy = broken(url, error, "http://proxy:3")
    assert by_proxy.detail.startswith("https://host:8/a (through the proxy): ")
    assert "proxy:3" not in str(by_proxy)
    assert dict(by_proxy.withheld) == {"proxy": "http://proxy:3"}


def test_a_broken_protocol_names_the_url_without_its_query() -> None:
    error = protocol_error("https://host/a?b", "it is odd")
    assert (error.detail, error.code) == ("https://host/a: it is odd", "origin_protocol")


def test_a_time_is_said_for_people() -> None:
    assert said(NOW) == "2023-11-14 22:13 UTC"


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Host/a", ("https", "host", 443)),
        ("http://host", ("http", "host", 80)),
        ("http://host:443/", ("http", "host", 443)),
        ("https://[::1]:8/", ("https", "::1", 8)),
        ("https:///", ("https", "", 443)),
    ],
)
def test_an_origin_is_a_scheme_a_host_and_a_port(url: str, origin: tuple[str, str, int]) -> None:
    assert origin_of(urlsplit(url)) == origin
