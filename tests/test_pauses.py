"""A pause that an origin wants is kept by all requests to it, or to the bucket that wants it."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from cachd.errors import Unavailable
from cachd.sources.pauses import Pauses, is_pause

ASKED = {"Retry-After": "60"}
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=x"}
HOST = "https://host/a/x"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def pause(of: Pauses, url: str, headers: dict[str, str] | None = None) -> float | None:
    """The seconds that a request must wait; None if it may be sent."""
    try:
        of.check(urlsplit(url), headers or {})
    except Unavailable as error:
        return error.retry_after if is_pause(error) else -1.0
    return None


def test_a_pause_lasts_as_long_as_the_origin_asks() -> None:
    clock = Clock()
    pauses = Pauses(clock)
    assert pause(pauses, HOST) is None
    pauses.note(urlsplit(HOST), {}, {})
    pauses.note(urlsplit(HOST), {}, {"Retry-After": "0"})
    assert pause(pauses, HOST) is None, "it asked for none"
    pauses.note(urlsplit(HOST), {}, ASKED)
    assert pause(pauses, HOST) == 60
    clock.now += 59.5
    assert pause(pauses, HOST) == 0.5
    clock.now += 0.5
    assert pause(pauses, HOST) is None


@pytest.mark.parametrize(
    ("url", "is_paused"),
    [
        ("https://host/b/y?z", True),
        ("https://host:443/", True),
        ("https://host:8443/a/x", False),
        ("http://host/a/x", False),
        ("https://other/a/x", False),
    ],
)
def test_a_pause_is_of_an_origin(url: str, is_paused: bool) -> None:
    pauses = Pauses(Clock())
    pauses.note(urlsplit(HOST), {}, ASKED)
    assert pause(pauses, url) == (60 if is_paused else None)


@pytest.mark.parametrize("is_signed_by", ["header", "query"])
def test_a_pause_of_a_signed_request_is_of_its_bucket(is_signed_by: str) -> None:
    headers = SIGNED if is_signed_by == "header" else {}
    query = "" if headers else "?X-Amz-Signature=0"
    pauses = Pauses(Clock())
    pauses.note(urlsplit(f"https://host/bucket/x{query}"), headers, ASKED)
    assert pause(pauses, f"https://host/bucket/y/z{query}", headers) == 60
    assert pause(pauses, f"https://host/other/y{query}", headers) is None
    assert pause(pauses, "https://host/bucket/x") is None, "a request that is not signed"
    assert pause(pauses, f"https://host{query}", headers) is None


def test_a_refusal_of_the_origin_itself_is_no_pause() -> None:
    assert not is_pause(Unavailable("x", code="rate_limited", origin_status=429))
    assert not is_pause(Unavailable("x", code="origin_failed"))
