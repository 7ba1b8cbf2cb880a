"""Web servers whose heads, bodies and checksums files come in odd forms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from urllib.parse import quote

from tests.ground.checksums import sha256sums
from tests.ground.raw import Asked, RawServer, ranged, reply
from tests.wild.field import Odd, World, wild
from tests.wild.http import LARGE, SMALL, TAG, directory, one_file
from tests.wild.http_headers import in_frames
from tests.wild.http_pages import FEW, serving
from tests.wild.http_reports import parts, summed

# --- lines of a head ---


def heads(row: str, old: bytes, new: bytes) -> None:
    """A row: a server that writes this in place of that into each of its heads."""

    @wild(row)
    def of_file(world: World) -> Iterator[Odd]:
        def said(asked: Asked) -> bytes:
            head, end, body = ranged(asked, LARGE, TAG).partition(b"\r\n\r\n")
            return (head + end).replace(old, new) + body

        yield from one_file(said, LARGE)


heads("lines-end-with-lf", b"\r\n", b"\n")
heads("name-in-utf-8", b"\r\nETag", b"\r\nContent-Disposition: attachment; filename=\xe6\xa8\xa1.bin\r\nETag")
heads("long-head", b"\r\nETag", b"\r\nSet-Cookie: " + b"a" * 20_000 + b"\r\nETag")
heads("status-without-a-reason", b" Partial Content\r\n", b"\r\n")
heads("spaces-before-colons", b": ", b" : ")


@wild("length-as-a-list")
def length_as_a_list(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        head, end, body = ranged(asked, SMALL, TAG).partition(b"\r\n\r\n")
        stated = head.rpartition(b"Content-Length: ")[2]
        return head + b", " + stated + end + body

    yield from one_file(said)


@wild("chunks-with-trailers")
def chunks_with_trailers(world: World) -> Iterator[Odd]:
    def framed(body: bytes) -> bytes:
        return b"%X ; x=y\r\n%b\r\n0000\r\nX-Checksum: 1\r\n\r\n" % (len(body), body)

    yield from one_file(lambda asked: in_frames(asked, SMALL, framed, b"transfer-encoding: Chunked"))


# --- ranges ---


parts(
    "range-end-counts-one-more",
    lambda asked, start, stop: reply(
        asked,
        "206 Partial Content",
        f"Content-Range: bytes {start}-{stop}/{len(LARGE)}",
        TAG,
        body=LARGE[start:stop],
    ),
)
parts(
    "range-is-always-all",
    lambda asked, start, stop: reply(
        asked,
        "206 Partial Content",
        f"Content-Range: bytes 0-{len(LARGE) - 1}/{len(LARGE)}",
        TAG,
        body=LARGE,
    ),
)


@wild("length-differs-each-time")
def length_differs_each_time(world: World) -> Iterator[Odd]:
    more = itertools.count()
    yield from one_file(lambda asked: ranged(asked, SMALL + b"x" * next(more), TAG))


@wild("grows-while-it-is-read")
def grows_while_it_is_read(world: World) -> Iterator[Odd]:
    more = itertools.count()
    yield from one_file(lambda asked: ranged(asked, SMALL + b"x" * (10 * next(more))))


@wild("no-range-in-an-empty-file")
def no_range_in_an_empty_file(world: World) -> Iterator[Odd]:
    def said(asked: Asked, content: bytes) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, "405 Method Not Allowed")
        if not content and "range" in asked.headers:
            return reply(asked, "416 Range Not Satisfiable", "Content-Range: bytes */0")
        return ranged(asked, content, TAG)

    yield from directory(said, {"config.json": b"{}", "merges.txt": b"", "w.bin": SMALL})


@wild("signed-for-get-behind-a-redirect")
def signed_for_get_behind_a_redirect(world: World) -> Iterator[Odd]:
    def store(asked: Asked) -> bytes:
        return reply(asked, "403 Forbidden") if asked.method == "HEAD" else ranged(asked, LARGE, TAG)

    with RawServer(store, host="127.0.0.2") as other:
        yield from one_file(lambda asked: reply(asked, "302 Found", f"Location: {other.url}/x?signed"), LARGE)


# --- bodies that do not end, or end too early ---


@wild("always-ends-early")
def always_ends_early(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, "200 OK", TAG, length=len(LARGE))
        return reply(asked, "200 OK", TAG, "Connection: close", body=LARGE[: 1 << 20], length=len(LARGE))

    yield from one_file(said, LARGE)


@wild("cached-before-it-was-complete")
def cached_before_it_was_complete(world: World) -> Iterator[Odd]:
    short = {"config.json": b"{}", "w.bin": SMALL[:100_000]}
    whole = {**short, "w.bin": SMALL}
    correct = serving(whole)

    def said(asked: Asked) -> bytes:
        return ranged(asked, short["w.bin"], TAG) if asked.target == "/m/w.bin" else correct(asked)

    with RawServer(said) as origin:
        yield Odd(f"{origin.url}/m/", {})


@wild("head-alone-answers")
def head_alone_answers(world: World) -> Iterator[Odd]:
    stated = f"Content-Range: bytes 0-{len(SMALL) - 1}/{len(SMALL)}"

    def said(asked: Asked) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, "200 OK", TAG, length=len(SMALL))
        return reply(asked, "206 Partial Content", TAG, stated, length=len(SMALL))  # and no byte of it

    yield from one_file(said)


@wild("get-is-not-allowed")
def get_is_not_allowed(world: World) -> Iterator[Odd]:
    yield from one_file(lambda asked: reply(asked, "405 Method Not Allowed", "Allow: PROPFIND"))


@wild("firewall-of-applications")
def firewall_of_applications(world: World) -> Iterator[Odd]:
    yield from one_file(lambda asked: reply(asked, "406 Not Acceptable", body=b"Mod_Security"))


# --- checksums files ---


summed("sums-of-another-place", lambda digest, path: f"{digest}  /builds/7/{path}\n")
summed("sums-of-digests-alone", lambda digest, path: f"{digest}\n")
summed("sums-of-openssl", lambda digest, path: f"SHA2-256({path})= {digest}\n")
summed(
    "sums-of-encoded-names",
    lambda digest, path: f"{digest}  {quote(path)}\n",
    {"config.json": b"{}", "a b+c.bin": SMALL},
)
summed("sums-with-a-mark", lambda digest, path: f"\ufeff{digest}  {path}\n", {"w.bin": SMALL})


@wild("sums-signed")
def sums_signed(world: World) -> Iterator[Odd]:
    lines = sha256sums(FEW).decode()
    signature = "-----BEGIN PGP SIGNATURE-----\n\niQIzBAEBCAAdFiEE\n=abcd\n-----END PGP SIGNATURE-----\n"
    text = f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n{lines}{signature}"
    correct = serving(FEW)

    def said(asked: Asked) -> bytes:
        return reply(asked, body=text.encode()) if asked.target == "/m/SHA256SUMS" else correct(asked)

    with RawServer(said) as origin:
        yield Odd(f"{origin.url}/m/", FEW)
