"""Redirects are followed within the address policy, and secrets stay with their origin."""

from __future__ import annotations

import pytest

from cachd.errors import CachdError, Forbidden, Invalid, Unavailable
from cachd.model import Extent
from cachd.sources.cancel import CancelToken
from cachd.sources.http import MAX_REDIRECTS, Target
from cachd.sources.secrets import Secrets
from tests.fetching import EITHER, KIB, fetch, http, read, refused
from tests.ground.models import noise
from tests.ground.origin import (
    Origin,
    Redirect,
    Seen,
    Status,
)

# --- redirects ---


def chain(origin: Origin, hops: int) -> str:
    """A URL from which it is so many redirects to a file of two bytes."""
    for number in range(hops):
        origin.fault(f"/{number}", Redirect(to=f"/{number + 1}"), methods=EITHER)
    origin.add(f"/{hops}", b"ok")
    return f"{origin.url}/0"


def test_ten_redirects_are_followed_and_eleven_are_not() -> None:
    for hops in (1, MAX_REDIRECTS):
        with Origin() as origin:
            assert fetch(http(), chain(origin, hops), 2) == b"ok"
    with Origin() as origin:
        refused(lambda: fetch(http(), chain(origin, MAX_REDIRECTS + 1), 2), "redirect_loop")
        assert len(origin.requests) == MAX_REDIRECTS + 1 == 11


def test_a_redirect_to_itself_ends(origin: Origin) -> None:
    origin.fault("/x", Redirect(to="/x"), methods=EITHER)
    refused(lambda: http().head(f"{origin.url}/x", CancelToken()), "redirect_loop")


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect_keeps_the_method_and_the_range(origin: Origin, code: int) -> None:
    origin.add("/y", noise(KIB))
    origin.fault("/x", Redirect(to="y", code=code), methods=EITHER)
    body = http().open(Target(f"{origin.url}/x", KIB), Extent(5, 10), CancelToken())
    assert read(body, 5) == noise(KIB)[5:10]
    assert http().head(f"{origin.url}/x", CancelToken()).file_size == KIB
    assert [seen.method for seen in origin.requests] == ["GET", "GET", "HEAD", "HEAD"]


def test_a_redirect_from_https_to_http_is_refused(origin: Origin) -> None:
    with Origin(tls=True) as secure:
        secure.fault("/x", Redirect(to=f"{origin.url}/x"), methods=EITHER)
        over = http("127.0.0.0/8", f"{origin.url}/", ca_file=secure.ca_file)
        refused(lambda: over.head(f"{secure.url}/x", CancelToken()), "downgrade_refused")
        assert origin.requests == []


BAD_LOCATIONS = [
    ("file:///etc/passwd", Invalid),
    ("gopher://127.0.0.1/x", Forbidden),
    ("http://user:hunter2@127.0.0.1/x", Invalid),
    ("http://169.254.169.254/latest/meta-data", Forbidden),
    ("http://127.0.0.1:99999/x", Invalid),
    ("/a b", Invalid),
    ("/\\evil", Invalid),
    ("http://[::1", (Invalid, Unavailable)),
]


@pytest.mark.parametrize(("location", "kind"), BAD_LOCATIONS)
def test_a_redirect_to_where_nothing_may_be_asked_is_refused(
    origin: Origin, location: str, kind: type[CachdError]
) -> None:
    origin.fault("/x", Redirect(to=location), methods=EITHER)
    with pytest.raises(kind) as refusal:
        http().head(f"{origin.url}/x", CancelToken())
    assert "hunter2" not in str(refusal.value)


SECRET = {"Authorization": "Bearer canary", "X-Token": "canary"}


def secrets_of(seen: Seen) -> set[str]:
    return {name for name, value in seen.headers.items() if "canary" in value}


def test_secrets_follow_a_redirect_within_their_origin(origin: Origin) -> None:
    origin.add("/y", b"ok")
    origin.fault("/x", Redirect(to="/y"), methods=EITHER)
    http().head(f"{origin.url}/x", CancelToken(), secrets=Secrets(SECRET))
    assert [secrets_of(seen) for seen in origin.requests] == [{"authorization", "x-token"}] * 2


def test_secrets_stay_behind_at_another_port_and_do_not_come_back(origin: Origin) -> None:
    with Origin() as other:
        origin.add("/z", b"ok")
        origin.fault("/x", Redirect(to=f"{other.url}/y"))
        other.fault("/y", Redirect(to=f"{origin.url}/z"))
        over = http()
        for _ in range(2):
            target = Target(f"{origin.url}/x", 2, Secrets(SECRET))
            assert read(over.open(target, Extent(0, 2), CancelToken()), 2) == b"ok"
        assert [secrets_of(seen) for seen in other.requests] == [set()] * len(other.requests)
        told = {seen.path: secrets_of(seen) for seen in origin.requests}
        assert told == {"/x": {"authorization", "x-token"}, "/z": set()}


def test_secrets_stay_behind_at_another_host(origin: Origin) -> None:
    port = origin.url.rpartition(":")[2]
    origin.add("/y", b"ok")
    origin.fault("/x", Redirect(to=f"http://localhost:{port}/y"), methods=EITHER)
    http("::1/128", "127.0.0.0/8").head(f"{origin.url}/x", CancelToken(), secrets=Secrets(SECRET))
    assert [secrets_of(seen) for seen in origin.requests] == [{"authorization", "x-token"}, set()]


def test_a_signed_address_is_asked_again_until_it_expires(origin: Origin) -> None:
    with Origin() as cdn:
        cdn.add("/signed", noise(KIB))
        origin.fault("/x", Redirect(to=f"{cdn.url}/signed?sig=1"))
        over, target = http(), Target(f"{origin.url}/x", KIB, Secrets(SECRET))
        for start in (0, 100, 200):
            read(over.open(target, Extent(start, start + 100), CancelToken()), 100)
        assert len(origin.requests) == 1
        cdn.fault("/signed", Status(403), times=1)
        read(over.open(target, Extent(300, 400), CancelToken()), 100)
        assert len(origin.requests) == 2
        assert not any(map(secrets_of, cdn.requests))


def test_a_header_that_cannot_be_sent_is_not_sent(origin: Origin) -> None:
    url = origin.add("/x", b"ok")
    evil = {"Authorization": "Bearer canary\r\nX-Evil: 1"}
    assert "canary" not in str(
        refused(lambda: http().head(url, CancelToken(), secrets=Secrets(evil)), "bad_header")
    )
    assert origin.requests == []


# --- reach ---


def test_an_address_within_no_allowance_is_refused_before_it_is_connected_to(origin: Origin) -> None:
    origin.add("/x", b"ok")
    port = origin.url.rpartition(":")[2]
    for url in (f"http://127.0.0.1:{port}/x", f"http://0x7f.1:{port}/x", f"http://localhost:{port}/x"):
        refused(lambda url=url: http("10.0.0.0/8").head(url, CancelToken()), "private_address")
        refused(lambda url=url: http("http://elsewhere/").head(url, CancelToken()), "plaintext_refused")
        refused(
            lambda url=url: http("http://elsewhere/").head(url.replace("http:", "https:"), CancelToken()),
            "private_address",
        )
    assert origin.requests == []


def test_a_kept_connection_widens_no_allowance() -> None:
    with Origin(tls=True) as origin:
        allowed, other = origin.add("/models/x", b"ok"), origin.add("/admin", b"no")
        over = http(f"{origin.url}/models/", ca_file=origin.ca_file)
        refused(lambda: over.head(other, CancelToken()), "private_address")
        over.head(allowed, CancelToken())
        refused(lambda: over.head(other, CancelToken()), "private_address")
        assert {seen.path for seen in origin.requests} == {"/models/x"}


def test_a_redirect_out_of_an_allowed_prefix_is_refused(origin: Origin) -> None:
    origin.add("/admin", b"no")
    origin.fault("/models/x", Redirect(to="/models/../admin"), methods=EITHER)
    with pytest.raises(Forbidden):
        http(f"{origin.url}/models/").head(f"{origin.url}/models/x", CancelToken())
    assert {seen.path for seen in origin.requests} == {"/models/x"}


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1/x",
        "http://hunter2@127.0.0.1/x",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/é",
        "http://good\\@127.0.0.1/x",
        "http://127.0.0.1/x\r\nX: y",
        "http:///x",
        "http://[::1/x",
    ],
    ids=ascii,
)
def test_a_url_that_two_readers_may_read_differently_is_refused(url: str) -> None:
    assert "hunter2" not in str(refused(lambda: http().head(url, CancelToken()), "bad_ref"))
