"""Web servers that answer with pages, redirects or refusals."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from tests.ground.raw import Asked, RawServer, ranged, reply
from tests.wild.field import Odd, World, wild
from tests.wild.http import LARGE, SMALL, TAG, one_file, plainly

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


@wild("signed-url-expires")
def signed_url_expires(world: World) -> Iterator[Odd]:
    signed = itertools.count()
    left = {"": 0}

    def store(asked: Asked) -> bytes:
        key = asked.target.partition("=")[2]
        left[key] = left.get(key, 2) - 1
        return ranged(asked, LARGE, TAG) if left[key] >= 0 else reply(asked, "403 Forbidden", body=b"expired")

    with RawServer(store, host="127.0.0.2") as other:
        yield from one_file(
            lambda asked: reply(asked, "302 Found", f"Location: {other.url}/x?signature={next(signed)}"),
            LARGE,
        )


@wild("signed-url-leads-to-a-page")
def signed_url_leads_to_a_page(world: World) -> Iterator[Odd]:
    signed = itertools.count()
    used: set[str] = set()

    def store(asked: Asked) -> bytes:
        if asked.target in used:
            return reply(asked, "200 OK", "Content-Type: text/html", body=b"<p>This link has expired.")
        if asked.method == "GET":
            used.add(asked.target)
        return ranged(asked, LARGE, TAG)

    with RawServer(store, host="127.0.0.2") as other:
        yield from one_file(
            lambda asked: reply(asked, "302 Found", f"Location: {other.url}/x?signature={next(signed)}"),
            LARGE,
        )
