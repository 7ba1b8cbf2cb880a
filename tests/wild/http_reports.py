"""Web servers as reports of downloaders describe them: odd ranges, odd framing, odd checksums files."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import unquote

from tests.ground.checksums import sha256sums
from tests.ground.raw import Asked, RawServer, chunked, ranged, reply
from tests.ground.weights import gguf, lfs_pointer, safetensors
from tests.wild.field import Odd, World, wild
from tests.wild.http import LARGE, SMALL, TAG, directory, headed, one_file, plainly
from tests.wild.http_pages import FEW

BLOCK = 64 << 10


def part(asked: Asked, start: int, stop: int, *lines: str) -> bytes:
    """206 with these bytes of LARGE."""
    stated = f"Content-Range: bytes {start}-{stop - 1}/{len(LARGE)}"
    return reply(asked, "206 Partial Content", stated, TAG, *lines, body=LARGE[start:stop])


def parts(row: str, said: Callable[[Asked, int, int], bytes | Iterator[bytes]]) -> None:
    """A row: a server of LARGE that says this to a range that is asked for."""

    @wild(row)
    def of_large(world: World) -> Iterator[Odd]:
        def answer(asked: Asked) -> bytes | Iterator[bytes]:
            extent = asked.extent(len(LARGE))
            if extent is None or asked.method == "HEAD":
                return ranged(asked, LARGE, TAG)
            return said(asked, *extent)

        with RawServer(answer) as origin:
            yield Odd(f"{origin.url}/x.bin", {"x.bin": LARGE})


parts("range-end-ignored", lambda asked, start, _: part(asked, start, len(LARGE)))
parts(
    "range-in-blocks",
    lambda asked, start, stop: part(
        asked, start // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK + BLOCK, len(LARGE))
    ),
)
parts(
    "range-without-content-range",
    lambda asked, start, stop: reply(asked, "206 Partial Content", TAG, body=LARGE[start:stop]),
)
parts(
    "range-without-length",
    lambda asked, start, stop: part(asked, start, stop, "Connection: close").replace(b"Content-Length", b"X"),
)


def breaking(asked: Asked, start: int, stop: int) -> Iterator[bytes]:
    """All of the head, and the body up to the end of its first MiB."""
    head, end, body = part(asked, start, stop, "Connection: close").partition(b"\r\n\r\n")
    yield head + end + body[: 1 << 20]


parts("range-breaks-off", breaking)


@wild("range-total-of-the-part")
def range_total_of_the_part(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        extent = asked.extent(len(LARGE))
        if asked.method == "HEAD":
            return reply(asked, "405 Method Not Allowed")
        if extent is None:
            return reply(asked, "200 OK", TAG, body=LARGE)
        start, stop = extent
        stated = f"Content-Range: bytes {start}-{stop - 1}/{stop - start}"
        return reply(asked, "206 Partial Content", stated, TAG, body=LARGE[start:stop])

    yield from one_file(said, LARGE)


# --- framing ---


@wild("early-hints")
def early_hints(world: World) -> Iterator[Odd]:
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"
    yield from one_file(lambda asked: hint + ranged(asked, LARGE, TAG), LARGE)


@wild("closes-without-saying-so")
def closes_without_saying_so(world: World) -> Iterator[Odd]:
    files = {f"{number}.bin": SMALL[number:] for number in range(4)}
    held, seen = {**files, "SHA256SUMS": sha256sums(files)}, set[int]()

    def answer(asked: Asked) -> bytes:
        if asked.connection in seen:
            return b""  # a request that arrives after the server has closed the connection
        seen.add(asked.connection)
        return ranged(asked, held[asked.target.removeprefix("/m/")], TAG)

    with RawServer(answer) as origin:
        yield Odd(f"{origin.url}/m/", files)


@wild("length-and-chunks")
def length_and_chunks(world: World) -> Iterator[Odd]:
    def said(asked: Asked) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, "200 OK", TAG, length=len(SMALL))
        lines = ("Transfer-Encoding: chunked", TAG)
        return reply(asked, "200 OK", *lines, body=chunked(SMALL), length=len(SMALL) + 7)

    yield from one_file(said)


@wild("head-ends-with-a-chunk")
def head_ends_with_a_chunk(world: World) -> Iterator[Odd]:
    def said(asked: Asked, content: bytes) -> bytes:
        if asked.method != "HEAD":
            return ranged(asked, content, TAG)
        return reply(asked, "200 OK", "Transfer-Encoding: chunked", length=None) + b"0\r\n\r\n"

    yield from directory(said, {f"{number}.bin": SMALL[number:] for number in range(3)})


@wild("one-mirror-lacks-it")
def one_mirror_lacks_it(world: World) -> Iterator[Odd]:
    with (
        RawServer(lambda asked: ranged(asked, LARGE, TAG), host="127.0.0.2") as good,
        RawServer(lambda asked: reply(asked, "404 Not Found", body=b"gone"), host="127.0.0.3") as bad,
    ):
        to = itertools.cycle((bad, good))
        yield from one_file(
            lambda asked: reply(asked, "302 Found", f"Location: {next(to).url}/x.bin"), LARGE, digest=True
        )


# --- files that are not what they should be ---


def published(row: str, content: bytes, *, name: str = "model.safetensors", kind: str = "") -> None:
    """A row: a server with one file, which is refused."""

    @wild(row)
    def of_one_file(world: World) -> Iterator[Odd]:
        lines = [f"Content-Type: {kind}"] if kind else []
        yield from one_file(plainly(TAG, *lines, content=content), name=name)


AS_BYTES = "application/octet-stream"
published(
    "error-without-a-type", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", kind=AS_BYTES
)
published("upload-of-a-part", safetensors()[:1500], kind=AS_BYTES)
published("pointer-on-the-web", lfs_pointer(safetensors()))
published("cached-with-no-bytes", b"", name="model.gguf")


@wild("weights-called-a-page")
def weights_called_a_page(world: World) -> Iterator[Odd]:
    with RawServer(plainly(TAG, "Content-Type: text/html", content=gguf())) as origin:
        digest = hashlib.sha256(gguf()).hexdigest()
        yield Odd(f"{origin.url}/model.gguf#sha256={digest}", {"model.gguf": gguf()})


@wild("head-has-no-type")
def head_has_no_type(world: World) -> Iterator[Odd]:
    yield from one_file(headed(lambda asked: reply(asked, "200 OK", TAG, length=len(SMALL))))


# --- checksums files ---


def summed(
    row: str, line: Callable[[str, str], str], files: Mapping[str, bytes] = FEW, more: str = ""
) -> None:
    """A row: a directory whose SHA256SUMS has such a line for each digest and path, and `more`."""

    @wild(row)
    def of_directory(world: World) -> Iterator[Odd]:
        lines = [line(hashlib.sha256(held).hexdigest(), path) for path, held in files.items()]
        text = "".join(lines) + more

        def said(asked: Asked) -> bytes:
            path = unquote(asked.target).removeprefix("/m/")
            if path == "SHA256SUMS":
                return reply(asked, body=text.encode())
            return ranged(asked, files[path], TAG) if path in files else reply(asked, "404 Not Found")

        with RawServer(said) as origin:
            yield Odd(f"{origin.url}/m/", files)


DEEP = {"config.json": b"{}", "sub/dir/w.bin": SMALL}
LITTER = (".git/config", "sub/._w.bin", ".DS_Store", ".cache/huggingface/download/w.bin.metadata")
summed("sums-with-one-space", lambda digest, path: f"{digest} {path}\r\n")
summed("sums-with-tabs", lambda digest, path: f"{digest.upper()}\t{path}\n")
summed(
    "sums-of-windows",
    lambda digest, path: (
        f"\\{digest} *{path}\n".replace("/", "\\\\") if "/" in path else f"{digest} *{path}\n"
    ),
    DEEP,
)
summed(
    "sums-of-a-clone",
    lambda digest, path: f"{digest}  ./{path}\n",
    DEEP,
    "".join(f"{'0' * 64}  ./{path}\n" for path in LITTER),
)
