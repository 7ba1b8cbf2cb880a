"""Web servers that claim one thing and send another; versions of files."""

from __future__ import annotations

import gzip
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping

from tests.ground.checksums import sha256sums
from tests.ground.origin import noise
from tests.ground.raw import Asked, RawServer, chunked, ranged, reply
from tests.wild.field import Odd, World, wild

SMALL = noise(300_000)
LARGE = noise(6 << 20)  # it arrives in two parts
TAG = 'ETag: "one"'
DATES = (
    "Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT",
    "Last-Modified: Sunday, 06-Nov-94 08:49:37 GMT",
    "Last-Modified: Sun Nov  6 08:49:37 1994",
    "Last-Modified: 1994-11-06T08:49:37Z",
)

Said = Callable[[Asked], bytes]


def one_file(
    said: Said, content: bytes = SMALL, *, digest: bool = False, name: str = "x.bin"
) -> Iterator[Odd]:
    """An origin that says this for its only file. `digest`: the ref has the sha256 of the file."""
    with RawServer(said) as origin:
        stated = f"#sha256={hashlib.sha256(content).hexdigest()}" if digest else ""
        yield Odd(f"{origin.url}/{name}{stated}", {name: content})


def directory(said: Callable[[Asked, bytes], bytes], files: Mapping[str, bytes]) -> Iterator[Odd]:
    """An origin with SHA256SUMS, which says this for each file of it."""

    def answer(asked: Asked) -> bytes:
        path = asked.target.removeprefix("/m/")
        if path == "SHA256SUMS":
            return ranged(asked, sha256sums(files))
        return said(asked, files[path])

    with RawServer(answer) as origin:
        yield Odd(f"{origin.url}/m/", files)


def plainly(*lines: str, content: bytes = SMALL) -> Said:
    """What a correct server says, with these header lines."""
    return lambda asked: ranged(asked, content, *lines)


def headed(head: Callable[[Asked], bytes], content: bytes = SMALL) -> Said:
    """What a correct server says to GET, and this to HEAD."""
    return lambda asked: head(asked) if asked.method == "HEAD" else ranged(asked, content, TAG)


@wild("plain-file")
def plain_file(world: World) -> Iterator[Odd]:
    yield from one_file(plainly(TAG))


# --- what an origin claims before it sends ---


@wild("head-says-empty")
def head_says_empty(world: World) -> Iterator[Odd]:
    yield from one_file(headed(reply))


@wild("head-says-empty-in-directory")
def head_says_empty_in_directory(world: World) -> Iterator[Odd]:
    def said(asked: Asked, content: bytes) -> bytes:
        return reply(asked) if asked.method == "HEAD" else ranged(asked, content)

    yield from directory(said, {"config.json": b"{}", "empty": b"", "weights.bin": SMALL})


@wild("head-refused")
def head_refused(world: World) -> Iterator[Odd]:
    statuses = {
        "405": "405 Method Not Allowed",
        "403": "403 Forbidden",
        "404": "404 Not Found",
        "501": "501 No",
    }

    def said(asked: Asked, content: bytes) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, statuses[asked.target.rpartition("/")[2]], body=b"refused")
        return ranged(asked, content, TAG)

    yield from directory(said, {status: SMALL[: 1000 + int(status)] for status in statuses})


@wild("head-hangs-up")
def head_hangs_up(world: World) -> Iterator[Odd]:
    yield from one_file(headed(lambda asked: b""))


@wild("head-understates")
def head_understates(world: World) -> Iterator[Odd]:
    yield from one_file(headed(lambda asked: reply(asked, "200 OK", TAG, length=100)))


@wild("head-overstates")
def head_overstates(world: World) -> Iterator[Odd]:
    yield from one_file(headed(lambda asked: reply(asked, "200 OK", TAG, length=8 << 20)))


@wild("head-understates-large")
def head_understates_large(world: World) -> Iterator[Odd]:
    yield from one_file(headed(lambda asked: reply(asked, "200 OK", TAG, length=5 << 20), LARGE), LARGE)


@wild("head-chunked")
def head_chunked(world: World) -> Iterator[Odd]:
    said = headed(lambda asked: reply(asked, "200 OK", "Transfer-Encoding: chunked", length=None))
    yield from one_file(said)


@wild("head-compressed")
def head_compressed(world: World) -> Iterator[Odd]:
    size = len(gzip.compress(SMALL))
    yield from one_file(headed(lambda asked: reply(asked, "200 OK", "Content-Encoding: gzip", length=size)))


@wild("head-states-compressed-size")
def head_states_compressed_size(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, "200 OK", TAG, length=len(gzip.compress(SMALL[:1000])))
        return reply(asked, "200 OK", TAG, "Transfer-Encoding: chunked", body=chunked(SMALL), length=None)

    yield from one_file(said)


@wild("head-redirected-elsewhere")
def head_redirected_elsewhere(world: World) -> Iterator[Odd]:
    with RawServer(lambda asked: reply(asked, "200 OK", 'ETag: "page"', body=b"an index")) as other:
        yield from one_file(headed(lambda asked: reply(asked, "302 Found", f"Location: {other.url}/index")))


@wild("head-is-a-page")
def head_is_a_page(world: World) -> Iterator[Odd]:
    yield from one_file(headed(lambda asked: reply(asked, "200 OK", "Content-Type: text/html", body=b"<p>")))


@wild("head-with-body")
def head_with_body(world: World) -> Iterator[Odd]:
    def said(asked: Asked, content: bytes) -> bytes:
        head, _, body = ranged(asked, content, TAG).partition(b"\r\n\r\n")
        return head + b"\r\n\r\n" + (content if asked.method == "HEAD" else body)

    yield from directory(said, {f"{number}.bin": SMALL[number:] for number in range(3)})


@wild("head-has-another-etag")
def head_has_another_etag(world: World) -> Iterator[Odd]:
    yield from one_file(headed(lambda asked: reply(asked, "200 OK", 'ETag: "head"', length=len(SMALL))))


@wild("empty-file")
def empty_file(world: World) -> Iterator[Odd]:
    yield from one_file(plainly(TAG, content=b""), b"")


@wild("no-length-at-all")
def no_length_at_all(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        return reply(asked, "200 OK", TAG, "Transfer-Encoding: chunked", body=chunked(SMALL), length=None)

    yield from one_file(said)


@wild("no-length-until-the-end")
def no_length_until_the_end(world: World) -> Iterator[Odd]:
    yield from one_file(
        lambda asked: reply(asked, "200 OK", TAG, "Connection: close", body=SMALL, length=None)
    )


# --- versions ---


def backends(lines: tuple[str, ...], content: bytes = LARGE) -> Said:
    """Servers behind one name, each of which has its own line for the same bytes."""
    turns = itertools.cycle(lines)
    return lambda asked: ranged(asked, content, next(turns))


@wild("etags-differ-with-digest")
def etags_differ_with_digest(world: World) -> Iterator[Odd]:
    turns = itertools.cycle(('ETag: "one"', 'ETag: "two"', 'ETag: "three"'))
    files = {"config.json": b"{}", "weights.bin": LARGE}
    yield from directory(lambda asked, content: ranged(asked, content, next(turns)), files)


@wild("etags-differ")
def etags_differ(world: World) -> Iterator[Odd]:
    said = backends(tuple(f'ETag: "{number}"' for number in range(97)))
    yield from one_file(said, LARGE)


@wild("dates-differ-with-digest")
def dates_differ_with_digest(world: World) -> Iterator[Odd]:
    said = backends(tuple(f"Last-Modified: Sun, 06 Nov 1994 08:49:{second} GMT" for second in range(10, 30)))
    yield from one_file(said, LARGE, digest=True)


@wild("if-match-is-sent-to-every-backend")
def if_match_is_sent_to_every_backend(world: World) -> Iterator[Odd]:
    turns = itertools.cycle(('"one"', '"two"'))

    def said(asked: Asked) -> bytes:
        tag = next(turns)
        if asked.headers.get("if-match", tag) != tag:
            return reply(asked, "412 Precondition Failed", f"ETag: {tag}")
        return ranged(asked, LARGE, f"ETag: {tag}")

    yield from one_file(said, LARGE, digest=True)


@wild("dates-in-every-form")
def dates_in_every_form(world: World) -> Iterator[Odd]:
    yield from one_file(backends(DATES), LARGE)


@wild("date-is-garbage")
def date_is_garbage(world: World) -> Iterator[Odd]:
    yield from one_file(
        backends(("Last-Modified: yesterday", "Last-Modified: -1", "Last-Modified: 0")), LARGE
    )


@wild("etag-without-quotes")
def etag_without_quotes(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        if "if-match" in asked.headers:
            return reply(asked, "412 Precondition Failed")
        return ranged(asked, LARGE, "ETag: 6544d1-5f3a")

    yield from one_file(said, LARGE)


@wild("etag-without-quotes-changes")
def etag_without_quotes_changes(world: World) -> Iterator[Odd]:
    yield from one_file(backends(tuple(f"ETag: 6544d1-{number:04}" for number in range(97))), LARGE)


@wild("etag-weak-or-empty")
def etag_weak_or_empty(world: World) -> Iterator[Odd]:
    yield from one_file(backends(('ETag: W/"one"', 'ETag: ""', "ETag:", "X: none")), LARGE)


@wild("etag-weak-changes")
def etag_weak_changes(world: World) -> Iterator[Odd]:
    yield from one_file(backends(tuple(f'ETag: W/"{number}"' for number in range(97))), LARGE)


@wild("refuses-its-own-etag")
def refuses_its_own_etag(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        if "if-match" in asked.headers:
            return reply(asked, "412 Precondition Failed", TAG)
        return ranged(asked, LARGE, TAG)

    yield from one_file(said, LARGE)
