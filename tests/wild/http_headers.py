"""Web servers with odd headers and odd ranges."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator

from tests.ground.origin import noise
from tests.ground.raw import Asked, chunked, ranged, reply
from tests.wild.field import Odd, World, wild
from tests.wild.http import DATES, LARGE, SMALL, TAG, directory, one_file, plainly

# --- headers ---


@wild("content-encoding-of-an-upload")
def content_encoding_of_an_upload(world: World) -> Iterator[Odd]:
    codings = {"aws-chunked": "a", "utf-8": "b", "identity": "c", "": "d", "aws-chunked, identity": "e"}
    by_name = {f"{name}.bin": coding for coding, name in codings.items()}

    def said(asked: Asked, content: bytes) -> bytes:
        return ranged(asked, content, TAG, f"Content-Encoding: {by_name[asked.target.rpartition('/')[2]]}")

    yield from directory(said, {name: SMALL[number:] for number, name in enumerate(by_name)})


@wild("gzip-though-identity-is-asked")
def gzip_though_identity_is_asked(world: World) -> Iterator[Odd]:
    yield from one_file(
        lambda asked: reply(asked, "200 OK", "Content-Encoding: gzip", body=gzip.compress(SMALL))
    )


@wild("gzip-unpacked-on-the-way")
def gzip_unpacked_on_the_way(world: World) -> Iterator[Odd]:
    content = noise(1000) * 20_000

    def said(asked: Asked) -> bytes:
        stored = ("X-Goog-Stored-Content-Encoding: gzip", "Warning: 214 UploadServer gunzipped")
        body = b"" if asked.method == "HEAD" else chunked(content, 1 << 20)
        return reply(asked, "200 OK", *stored, "Transfer-Encoding: chunked", body=body, length=None)

    yield from one_file(said, content)


@wild("content-range-without-total")
def content_range_without_total(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        return ranged(asked, LARGE, TAG).replace(f"/{len(LARGE)}\r\n".encode(), b"/*\r\n", 1)

    yield from one_file(said, LARGE)


@wild("content-range-in-other-words")
def content_range_in_other_words(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        return ranged(asked, LARGE, TAG).replace(b"Content-Range: bytes ", b"CONTENT-RANGE:Bytes=", 1)

    yield from one_file(said, LARGE)


@wild("headers-repeated")
def headers_repeated(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        head, end, body = ranged(asked, LARGE, TAG).partition(b"\r\n\r\n")
        first, _, lines = head.partition(b"\r\n")
        again = lines.replace(b"Content-", b"content-").replace(b"ETag", b"etag")
        return b"\r\n".join((first, lines, again)) + end + body

    yield from one_file(said, LARGE)


@wild("lengths-contradict")
def lengths_contradict(world: World) -> Iterator[Odd]:
    yield from one_file(plainly(TAG, f"Content-Length: {len(SMALL) - 1}"))


@wild("transfer-encoding-gzip")
def transfer_encoding_gzip(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        line, body = "Transfer-Encoding: gzip, chunked", chunked(gzip.compress(SMALL))
        return reply(asked, "200 OK", TAG, line, body=body, length=None)

    yield from one_file(said)


# --- ranges ---


@wild("no-ranges")
def no_ranges(world: World) -> Iterator[Odd]:
    yield from one_file(lambda asked: reply(asked, "200 OK", TAG, body=LARGE), LARGE)


@wild("range-is-an-error")
def range_is_an_error(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        if asked.method == "HEAD" or "range" in asked.headers:
            return reply(asked, "501 Not Implemented")
        return reply(asked, "200 OK", TAG, body=SMALL)

    yield from one_file(said)


@wild("ranges-denied-but-served")
def ranges_denied_but_served(world: World) -> Iterator[Odd]:
    yield from one_file(plainly(TAG, "Accept-Ranges: none", content=LARGE), LARGE)


@wild("range-as-multipart")
def range_as_multipart(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        extent = asked.extent(len(LARGE))
        if extent is None or asked.method == "HEAD":
            return reply(asked, "200 OK", TAG, body=LARGE)
        part = f"--b\r\nContent-Range: bytes {extent[0]}-{extent[1] - 1}/{len(LARGE)}\r\n\r\n".encode()
        body = part + LARGE[slice(*extent)] + b"\r\n--b--\r\n"
        return reply(asked, "206 Partial", TAG, "Content-Type: multipart/byteranges; boundary=b", body=body)

    yield from one_file(said, LARGE)


@wild("another-range")
def another_range(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        extent = asked.extent(len(LARGE))
        if extent is None or asked.method == "HEAD":
            return ranged(asked, LARGE, TAG)
        start, stop = extent[0] + 512, extent[1]
        stated = f"Content-Range: bytes {start}-{stop - 1}/{len(LARGE)}"
        return reply(asked, "206 Partial", TAG, stated, body=LARGE[start:stop])

    yield from one_file(said, LARGE)


@wild("range-cut-short")
def range_cut_short(world: World) -> Iterator[Odd]:
    most = 1 << 20

    def said(asked: Asked) -> bytes:
        extent = asked.extent(len(LARGE))
        if extent is None or asked.method == "HEAD":
            return ranged(asked, LARGE, TAG)
        start, stop = extent[0], min(extent[1], extent[0] + most)
        stated = f"Content-Range: bytes {start}-{stop - 1}/{len(LARGE)}"
        return reply(asked, "206 Partial", TAG, stated, body=LARGE[start:stop])

    yield from one_file(said, LARGE)


def in_frames(
    asked: Asked,
    content: bytes,
    framed: Callable[[bytes], bytes],
    coding: bytes = b"Transfer-Encoding: chunked",
) -> bytes:
    """What a correct server answers, but with a body in frames in place of Content-Length."""
    head, _, body = ranged(asked, content, TAG).partition(b"\r\n\r\n")
    if not body:
        return head + b"\r\n\r\n"
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    return b"\r\n".join([*lines, coding]) + b"\r\n\r\n" + framed(body)


@wild("range-in-chunks")
def range_in_chunks(world: World) -> Iterator[Odd]:
    yield from one_file(lambda asked: in_frames(asked, LARGE, chunked), LARGE)


@wild("bytes-after-the-end")
def bytes_after_the_end(world: World) -> Iterator[Odd]:
    def said(asked: Asked, content: bytes) -> bytes:
        return ranged(asked, content, TAG) + (b"" if asked.method == "HEAD" else b"\r\n")

    yield from directory(said, {f"{number}.bin": SMALL[number:] for number in range(3)})


@wild("http-1.0")
def http_1_0(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        return reply(asked, "200 OK", DATES[0], "Connection: close", body=LARGE, version="HTTP/1.0")

    yield from one_file(said, LARGE)
