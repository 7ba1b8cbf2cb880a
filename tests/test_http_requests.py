"""Each kind of request: what is sent, which answers it takes, and what is asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError, Changed, Invalid
from cachd.model import Extent
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http, Target
from cachd.sources.http1 import Request
from cachd.sources.response import Response
from cachd.sources.secrets import Secrets
from cachd.sources.source import NoRanges
from tests.fetching import http, read, refused
from tests.ground.raw import Asked, RawServer, ranged, reply

CONTENT = b"0123456789"
SECRETS = Secrets({"X-Key": "hunter2"}, "sig=hunter2")
TOKEN = CancelToken()


def file(asked: Asked) -> bytes:
    return ranged(asked, CONTENT)


def opened(over: Http, url: str, *, start: int = 0, stop: int = 10, validator: str | None = None) -> bytes:
    """The bytes of an extent of the file at `url`."""
    target = Target(url, 10, SECRETS, validator)
    return read(over.open(target, Extent(start, stop), TOKEN), stop - start)


KINDS: dict[str, tuple[Callable[[Http, str], Response], str, str | None]] = {
    "head": (lambda over, url: over.head(url, TOKEN, secrets=SECRETS), "HEAD", None),
    "peek": (lambda over, url: over.peek(url, TOKEN, secrets=SECRETS), "HEAD", None),
    "peek by GET": (
        lambda over, url: over.peek(url, TOKEN, secrets=SECRETS, method="GET"),
        "GET",
        "bytes=0-0",
    ),
    "first_byte": (lambda over, url: over.first_byte(url, TOKEN, secrets=SECRETS), "GET", "bytes=0-0"),
    "get": (lambda over, url: over.get(url, TOKEN, secrets=SECRETS), "GET", None),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_a_request_has_its_method_its_range_and_its_secrets(kind: str) -> None:
    call, method, extent = KINDS[kind]
    with RawServer(file) as server:
        with call(http(), f"{server.url}/x?a=b") as response:
            assert response.status == (206 if extent else 200)
            assert response.url == f"{server.url}/x", "no query is shown"
        (asked,) = server.asked
    assert (asked.method, asked.target) == (method, "/x?a=b&sig=hunter2")
    assert asked.headers.get("range") == extent
    assert asked.headers["x-key"] == "hunter2"
    assert (asked.headers["accept-encoding"], asked.headers["accept"]) == ("identity", "*/*")
    assert asked.headers["user-agent"].startswith("cachd/")


@each_kind
def test_a_status_is_an_error_of_head_alone(kind: str) -> None:
    call, _, _ = KINDS[kind]
    with RawServer(lambda asked: reply(asked, "403 X")) as server:
        if kind == "head":
            over = http()
            for _ in range(2):
                refused(lambda: call(over, f"{server.url}/x"), "source_forbidden")
            assert [each.connection for each in server.asked] == [1, 1]
        else:
            with call(http(), f"{server.url}/x") as response:
                assert response.status == 403


@each_kind
def test_only_a_peek_follows_no_redirect(kind: str) -> None:
    def answer(asked: Asked) -> bytes:
        return file(asked) if asked.target.startswith("/y") else reply(asked, "302 X", "Location: /y")

    call, _, extent = KINDS[kind]
    with RawServer(answer) as server, call(http(), f"{server.url}/x") as response:
        found = 302 if kind.startswith("peek") else 206 if extent else 200
        assert response.status == found


@each_kind
def test_no_request_is_sent_where_the_policy_does_not_allow_it(kind: str) -> None:
    call, _, _ = KINDS[kind]
    with RawServer(file) as server:
        over = http(f"{server.url}/allowed/")
        with call(over, f"{server.url}/allowed/x"):
            pass
        refused(lambda: call(over, f"{server.url}/x"), "plaintext_refused")
        with call(over.anywhere(), f"{server.url}/x"):
            pass
        asked = Request("GET", urlsplit(f"{server.url}/x"), {})
        refused(lambda: over.relay(asked, TOKEN), "plaintext_refused")
        assert len(server.asked) == 2


@pytest.mark.parametrize("status", ["405 X", "501 X"])
def test_a_server_without_head_is_asked_by_get_with_the_same_secrets(status: str) -> None:
    with RawServer(lambda asked: reply(asked, status) if asked.method == "HEAD" else file(asked)) as server:
        over = http()
        for _ in range(2):
            assert over.head(f"{server.url}/x", TOKEN, secrets=SECRETS).file_size == 10
    assert [(each.method, each.headers["x-key"]) for each in server.asked] == [
        ("HEAD", "hunter2"),
        ("GET", "hunter2"),
    ] * 2


def test_a_touch_reads_one_byte_and_raises_what_a_status_means() -> None:
    with RawServer(lambda asked: file(asked) if asked.target == "/x" else reply(asked, "404 X")) as server:
        http().touch(f"{server.url}/x", TOKEN)
        assert server.asked[0].headers["range"] == "bytes=0-0"
        refused(lambda: http().touch(f"{server.url}/y", TOKEN), "file_not_found")


def test_a_small_file_is_read_with_its_secrets_up_to_its_limit() -> None:
    with RawServer(file) as server:
        over = http()
        assert over.read(f"{server.url}/x", TOKEN, at_most=10, secrets=SECRETS) == CONTENT
        with pytest.raises(Invalid):
            over.read(f"{server.url}/x", TOKEN, at_most=9)
        assert [each.headers.get("x-key") for each in server.asked] == ["hunter2", None]


def test_a_coding_of_the_content_is_refused_wherever_a_file_is_read() -> None:
    with RawServer(lambda asked: reply(asked, "200 OK", "Content-Encoding: gzip", body=CONTENT)) as server:
        over, url = http(), f"{server.url}/x"
        for call in (
            lambda: over.head(url, TOKEN),
            lambda: over.touch(url, TOKEN),
            lambda: over.read(url, TOKEN, at_most=99),
            lambda: opened(over, url),
        ):
            refused(call, "content_encoded")


# --- extents ---


def test_a_part_is_asked_for_by_its_range_and_a_complete_file_without_one() -> None:
    with RawServer(file) as server:
        over, url = http(), f"{server.url}/x"
        assert opened(over, url, start=2, stop=5) == b"234"
        assert opened(over, url) == CONTENT
        assert opened(over, url, start=9) == b"9"
        assert [each.headers.get("range") for each in server.asked] == ["bytes=2-4", None, "bytes=9-9"]
        assert {each.connection for each in server.asked} == {1}


@pytest.mark.parametrize(
    ("lines", "is_changed"), [(['ETag: "one"'], False), (['ETag: "two"'], True), ([], True)]
)
def test_an_origin_that_refuses_a_condition_is_asked_without_it(lines: list[str], is_changed: bool) -> None:
    def answer(asked: Asked) -> bytes:
        return reply(asked, "412 X") if "if-match" in asked.headers else ranged(asked, CONTENT, *lines)

    with RawServer(answer) as server:
        over = http()
        if is_changed:
            with pytest.raises(Changed) as refusal:
                opened(over, f"{server.url}/x", stop=5, validator='"one"')
            assert refusal.value.origin_status == (None if lines else 412)
        else:
            assert opened(over, f"{server.url}/x", stop=5, validator='"one"') == CONTENT[:5]
        assert [each.headers.get("if-match") for each in server.asked] == ['"one"', None]
        assert [each.headers["range"] for each in server.asked] == ["bytes=0-4"] * 2
        assert {each.connection for each in server.asked} == {1}


def test_a_412_without_a_condition_is_a_changed_file() -> None:
    with RawServer(lambda asked: reply(asked, "412 X")) as server:
        with pytest.raises(Changed) as refusal:
            opened(http(), f"{server.url}/x", validator="unquoted")
        assert refusal.value.origin_status == 412
        assert len(server.asked) == 1


def test_a_part_without_its_place_is_an_error_once_and_then_the_origin_has_no_ranges() -> None:
    def answer(asked: Asked) -> bytes:
        return reply(asked, "206 X") if asked.target.startswith("/bad") else file(asked)

    with RawServer(answer) as server, RawServer(answer) as other:
        over = http()
        for each in (server, other):
            refused(lambda each=each: opened(over, f"{each.url}/bad", stop=1), "origin_protocol")
            assert opened(over, f"{each.url}/x", stop=1) == b"0"
            with pytest.raises(NoRanges):
                opened(over, f"{each.url}/bad", stop=1)
            assert {asked.connection for asked in each.asked} == {1}


# --- redirects to another origin ---


@contextmanager
def led_on(answer: Callable[[Asked], bytes]) -> Iterator[tuple[Http, str, RawServer, RawServer]]:
    """A client, the URL of a file that redirects to another server with this answer, and both servers."""
    with RawServer(answer) as store:
        location = f"Location: {store.url}/signed"
        with RawServer(lambda asked: reply(asked, "302 X", location)) as hub:
            yield http(), f"{hub.url}/x", hub, store


def test_a_signed_url_serves_further_parts_until_it_is_forgotten() -> None:
    with led_on(file) as (over, url, hub, store):
        assert [opened(over, url, start=at) for at in (0, 3, 6)] == [CONTENT, CONTENT[3:], CONTENT[6:]]
        assert (len(hub.asked), len(store.asked)) == (1, 3)
        over.touch(url, TOKEN)
        assert (len(hub.asked), len(store.asked)) == (2, 4), "a touch asks the first origin"
        over.anew()
        assert opened(over, url) == CONTENT
        assert (len(hub.asked), len(store.asked)) == (3, 5)
        assert all("x-key" not in each.headers and "hunter2" not in each.target for each in store.asked)


@pytest.mark.parametrize(
    ("status", "is_asked_anew"),
    [*((status, True) for status in (400, 401, 403, 404, 410)), (500, False), (402, False), (503, False)],
)
def test_a_signed_url_that_may_have_expired_is_asked_for_anew(status: int, is_asked_anew: bool) -> None:
    with led_on(lambda asked: reply(asked, f"{status} X") if asked.request == 2 else file(asked)) as found:
        over, url, hub, store = found
        assert opened(over, url, stop=1) == b"0"
        if is_asked_anew:
            assert opened(over, url, stop=1) == b"0"
        else:
            with pytest.raises(CachdError) as refusal:
                opened(over, url, stop=1)
            assert refusal.value.origin_status == status
        assert opened(over, url, stop=1) == b"0"
        assert (len(hub.asked), len(store.asked)) == ((2, 4) if is_asked_anew else (1, 3))
        assert {each.connection for each in store.asked} == {1}


def test_a_file_that_is_redirected_no_more_is_asked_for_where_it_is() -> None:
    with RawServer(lambda asked: file(asked) if asked.request == 1 else reply(asked, "403 X")) as store:
        location = f"Location: {store.url}/signed"

        def answer(asked: Asked) -> bytes:
            return reply(asked, "302 X", location) if asked.request == 1 else file(asked)

        with RawServer(answer) as hub:
            over = http()
            assert [opened(over, f"{hub.url}/x", stop=1) for _ in range(4)] == [b"0"] * 4
            assert (len(hub.asked), len(store.asked)) == (4, 2)


def test_a_signed_url_that_leads_to_a_page_now_is_asked_for_anew() -> None:
    with led_on(lambda asked: reply(asked, body=b"<html>") if asked.request == 2 else file(asked)) as found:
        over, url, hub, _ = found
        assert [opened(over, url) for _ in range(2)] == [CONTENT, CONTENT]
        assert len(hub.asked) == 2


def test_a_redirect_within_an_origin_is_followed_for_each_part() -> None:
    def answer(asked: Asked) -> bytes:
        return file(asked) if asked.target == "/y" else reply(asked, "302 X", "Location: /y")

    with RawServer(answer) as server:
        over = http()
        assert [opened(over, f"{server.url}/x", stop=1) for _ in range(2)] == [b"0", b"0"]
        assert len(server.asked) == 4


@pytest.mark.parametrize(("status", "tries"), [(404, 3), (410, 3), (403, 1), (500, 1)])
def test_of_several_mirrors_three_are_tried_for_what_one_lacks(status: int, tries: int) -> None:
    with led_on(lambda asked: reply(asked, f"{status} X")) as (over, url, hub, store):
        with pytest.raises(CachdError) as refusal:
            over.head(url, TOKEN)
        assert refusal.value.origin_status == status
        assert (len(hub.asked), len(store.asked)) == (tries, tries)
        assert {each.connection for each in hub.asked + store.asked} == {1}
    with led_on(lambda asked: file(asked) if asked.request == 3 else reply(asked, f"{status} X")) as found:
        over, url, _, _ = found
        with over.get(url, TOKEN) as response:
            assert response.status == (200 if tries == 3 else status)


def test_what_an_origin_lacks_itself_is_asked_for_once() -> None:
    with RawServer(lambda asked: reply(asked, "404 X")) as server:
        refused(lambda: http().head(f"{server.url}/x", TOKEN), "file_not_found")
        assert len(server.asked) == 1


def test_a_redirect_without_a_location_is_an_answer() -> None:
    with RawServer(lambda asked: reply(asked, "302 X")) as server:
        with http().get(f"{server.url}/x", TOKEN) as response:
            assert response.status == 302
        assert refused(lambda: http().head(f"{server.url}/x", TOKEN), "origin_failed").origin_status == 302


@pytest.mark.parametrize("sets", [True, False])
def test_a_server_that_wants_its_cookie_back_is_recognized(sets: bool) -> None:
    cookie = ["Set-Cookie: a=b"] if sets else []

    def answer(asked: Asked) -> bytes:
        return reply(asked, "302 X", "Location: /x", *(cookie if asked.request == 1 else []))

    with RawServer(answer) as server:
        error = refused(lambda: http().get(f"{server.url}/x", TOKEN), "redirect_loop")
        assert ("cookie" in error.hint) is sets


def test_a_redirect_to_another_origin_takes_nothing_of_the_secret_query_along() -> None:
    def lead(asked: Asked, to: str) -> bytes:
        return reply(asked, "302 X", f"Location: {to}?a=b&{asked.target.partition('?')[2]}&c=%64")

    with RawServer(file) as store, RawServer(lambda asked: lead(asked, f"{store.url}/y")) as hub:
        with http().get(f"{hub.url}/x", TOKEN, secrets=Secrets(query="sig=hunter2&k=%76")) as response:
            assert response.status == 200
        with http().get(f"{hub.url}/x?d=e", TOKEN) as response:
            assert response.status == 200
        assert hub.asked[0].target == "/x?sig=hunter2&k=%76"
        assert [each.target for each in store.asked] == ["/y?a=b&c=%64", "/y?a=b&d=e&c=%64"]


def test_a_redirect_within_an_origin_keeps_what_it_repeats_of_the_secret_query() -> None:
    def answer(asked: Asked) -> bytes:
        return file(asked) if asked.target.startswith("/y") else reply(asked, "302 X", "Location: /y?sig=1")

    with RawServer(answer) as server:
        with http().get(f"{server.url}/x", TOKEN, secrets=Secrets(query="sig=1")) as response:
            assert response.status == 200
        assert [each.target for each in server.asked] == ["/x?sig=1", "/y?sig=1"]


@pytest.mark.parametrize("secret", ["", "sig=1"])
def test_a_redirect_to_no_url_is_the_origins_failure(secret: str) -> None:
    with RawServer(lambda asked: reply(asked, "302 X", "Location: http://[/")) as server:
        url = f"{server.url}/x"
        refused(lambda: http().get(url, TOKEN, secrets=Secrets(query=secret)), "origin_protocol")
