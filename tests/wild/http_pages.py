"""Web servers that answer with pages, redirects or limits."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping

from tests.ground.checksums import sha256sums
from tests.ground.raw import Asked, RawServer, ranged, reply
from tests.wild.field import Odd, World, wild
from tests.wild.http import LARGE, SMALL, TAG, Said, one_file, plainly

FEW = {f"{number:02}.json": SMALL[number : number + 2000] for number in range(12)}
MANY = {**FEW, "w.bin": LARGE}


def serving(files: Mapping[str, bytes]) -> Said:
    """What a correct server says for a directory."""
    held = {**{f"/m/{path}": content for path, content in files.items()}, "/m/SHA256SUMS": sha256sums(files)}
    return lambda asked: ranged(asked, held[asked.target], TAG)


# --- pages and redirects ---


@wild("login-page")
def login_page(world: World) -> Iterator[Odd]:
    page = b"<!doctype html><title>Sign in</title>"
    said = plainly("Content-Type: text/html; charset=utf-8", content=page)
    yield from one_file(said, name="model.safetensors")


@wild("login-page-for-get")
def login_page_for_get(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, "200 OK", TAG, length=len(LARGE))
        return reply(
            asked, "200 OK", "Content-Type: text/html", body=b"<!doctype html><title>Sign in</title>"
        )

    yield from one_file(said, LARGE, name="model.safetensors")


@wild("soft-404")
def soft_404(world: World) -> Iterator[Odd]:
    body = json.dumps({"error": "no such model"}).encode()
    yield from one_file(plainly("Content-Type: application/json", content=body), name="model.gguf")


@wild("page-in-place-of-sums")
def page_in_place_of_sums(world: World) -> Iterator[Odd]:
    with RawServer(plainly("Content-Type: text/html", content=b"<!doctype html>")) as app:
        yield Odd(f"{app.url}/m/", {})


@wild("sums-of-powershell")
def sums_of_powershell(world: World) -> Iterator[Odd]:
    correct = serving(FEW)

    def said(asked: Asked) -> bytes:
        if asked.target == "/m/SHA256SUMS":
            return reply(asked, body=sha256sums(FEW).decode().replace("\n", "\r\n").encode("utf-16"))
        return correct(asked)

    with RawServer(said) as origin:
        yield Odd(f"{origin.url}/m/", FEW)


@wild("sums-of-bsd")
def sums_of_bsd(world: World) -> Iterator[Odd]:
    correct = serving(FEW)
    lines = [f"SHA256 ({path}) = {hashlib.sha256(said).hexdigest()}\n" for path, said in FEW.items()]

    def said(asked: Asked) -> bytes:
        is_sums = asked.target == "/m/SHA256SUMS"
        return reply(asked, body="".join(lines).encode()) if is_sums else correct(asked)

    with RawServer(said) as origin:
        yield Odd(f"{origin.url}/m/", FEW)


@wild("relative-redirects")
def relative_redirects(world: World) -> Iterator[Odd]:
    to = {
        "/x.bin": "308 Permanent Redirect|files/../a",
        "/a": "307 Temporary Redirect|?v=2",
        "/a?v=2": "302 Found|./b",
    }

    def said(asked: Asked) -> bytes:
        status, _, target = to.get(asked.target, "").partition("|")
        return reply(asked, status, f"Location: {target}") if status else ranged(asked, LARGE, TAG)

    yield from one_file(said, LARGE)


@wild("redirect-wants-a-cookie")
def redirect_wants_a_cookie(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        if "cookie" in asked.headers:
            return ranged(asked, SMALL, TAG)
        return reply(asked, "302 Found", f"Location: {asked.target}", "Set-Cookie: seen=1; Path=/")

    yield from one_file(said)


def behind_signed_urls(store: Said) -> Iterator[Odd]:
    """A file whose URL redirects to another signed URL of the store each time."""
    signed = itertools.count()
    with RawServer(store, host="127.0.0.2") as other:
        yield from one_file(
            lambda asked: reply(asked, "302 Found", f"Location: {other.url}/x?signature={next(signed)}"),
            LARGE,
        )


@wild("signed-url-expires")
def signed_url_expires(world: World) -> Iterator[Odd]:
    left = {"": 0}

    def store(asked: Asked) -> bytes:
        key = asked.target.partition("=")[2]
        left[key] = left.get(key, 2) - 1
        return ranged(asked, LARGE, TAG) if left[key] >= 0 else reply(asked, "403 Forbidden", body=b"expired")

    yield from behind_signed_urls(store)


@wild("signed-url-leads-to-a-page")
def signed_url_leads_to_a_page(world: World) -> Iterator[Odd]:
    used: set[str] = set()

    def store(asked: Asked) -> bytes:
        if asked.target in used:
            return reply(asked, "200 OK", "Content-Type: text/html", body=b"<p>This link has expired.")
        if asked.method == "GET":
            used.add(asked.target)
        return ranged(asked, LARGE, TAG)

    yield from behind_signed_urls(store)


# --- limits ---


@wild("one-connection")
def one_connection(world: World) -> Iterator[Odd]:
    with RawServer(serving(MANY), connections=1) as origin:
        yield Odd(f"{origin.url}/m/", MANY)


@wild("two-connections")
def two_connections(world: World) -> Iterator[Odd]:
    with RawServer(serving(MANY), connections=2, refusal="429 Too Many Requests") as origin:
        yield Odd(f"{origin.url}/m/", MANY)


@wild("one-request")
def one_request(world: World) -> Iterator[Odd]:
    with RawServer(serving(MANY), requests=1, refusal="429 Too Many Requests") as origin:
        yield Odd(f"{origin.url}/m/", MANY)


@wild("every-second-connection")
def every_second_connection(world: World) -> Iterator[Odd]:
    correct = serving(MANY)

    def said(asked: Asked) -> bytes:
        if asked.connection % 2 == 0:
            return reply(asked, "503 Service Unavailable", "Connection: close")
        return correct(asked)

    with RawServer(said) as origin:
        yield Odd(f"{origin.url}/m/", MANY)


def once(*lines: str) -> Said:
    """429 with these lines to the first GET, then what a correct server says."""
    refused = itertools.chain([True], itertools.repeat(False))

    def said(asked: Asked) -> bytes:
        if asked.method == "GET" and next(refused):
            return reply(asked, "429 Too Many Requests", *lines)
        return ranged(asked, SMALL, TAG)

    return said


@wild("limit-not-reached")
def limit_not_reached(world: World) -> Iterator[Odd]:
    yield from one_file(once('RateLimit: "resolvers";r=4987;t=300'))


@wild("limit-reached")
def limit_reached(world: World) -> Iterator[Odd]:
    yield from one_file(once('RateLimit: "resolvers";r=0;t=1, "api";r=12;t=300'))


@wild("limit-until-a-time")
def limit_until_a_time(world: World) -> Iterator[Odd]:
    reset = f"X-RateLimit-Reset: {int(time.time()) + 2}"
    yield from one_file(once("X-RateLimit-Remaining: 0", reset))
