"""Cold pull of one file: from nginx, in the clear, to memory and to disk, verified and not; bench/tls.py does
the same over TLS.

cachd is the daemon, asked by POST, until the model is ready: journalled, synced, published. A peer's verified
form is its download with its own checksum, else followed by openssl sha256; to disk it is followed by
`sync FILE`, as cachd is durable. Every peer has its bytes checked once, outside the clock.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from awscrt.checksums import crc64nvme
from rich.console import Group

from bench import openssl, peers, report
from bench.measure import (
    GIB,
    MIB,
    Run,
    daemon,
    file_system,
    interleaved,
    pulled,
    random_file,
    serving,
    sink,
    warmed,
)
from bench.peers import PEERS, File, Peer, limit
from bench.report import GB, Options, find, median, row
from tests.ground.nginx import Nginx
from tests.ground.node import Node

SIZE = 4 * GIB
QUICK_SIZE = 24 * MIB
RUNS = 3
FORMS = ("unverified", "verified")
IMAGE = "cachd, OpenSSL of its image"
RAW, RAW_HASHED = "recv_into + pwrite, 4 threads", "recv_into + xxh3 + pwrite, 4 threads"
RAW_VERIFIED = "recv_into + xxh3 + pwrite, 4 threads; sha256 of what they wrote, 1 thread"
RAW_DURABLE = f"{RAW_VERIFIED}; fsync"
SHA256, SHA256_FILE = "sha256, one core", "sha256, one core, from the page cache"
WRITE, WRITE_SYNC = "pwrite from memory", "pwrite from memory + fsync"
BUCKET = "bucket"
NAME = "model.bin"

Sink = Literal["memory", "disk"]


def run(options: Options, *, tls: bool = False) -> dict[str, Any]:
    """Every way to each sink."""
    size = options.size_bytes or (QUICK_SIZE if options.quick else SIZE)
    runs = options.runs or (1 if options.quick else RUNS)
    question = "tls" if tls else "cold"
    results = report.head(question, options, size_bytes=size, runs=runs, cases=[])
    with sink("memory") as web, tempfile.TemporaryDirectory(prefix="bench-") as libraries:
        image = openssl.given(Path(libraries)) if tls else {}
        if tls:
            results["openssl"] = {"here": openssl.HERE, "image": openssl.version(image) if image else None}
        (web / BUCKET).mkdir()
        sha256 = random_file(web / BUCKET / NAME, size)
        for kind in ("memory", "disk"):
            with sink(kind) as place, bed(web, place, sha256, image) as at:
                rows = case(at, runs, size, kind, tls=tls)
                facts = {"sink": kind, "file_system": file_system(place), "tls": tls}
                results["cases"].append({**facts, "rows": rows})
    return results


@dataclass(frozen=True, slots=True)
class Bed:
    """Origins with the same file, a daemon, another with the OpenSSL of the image, a place for copies."""

    plain: Nginx
    tls: Nginx
    node: Node
    image: Node | None
    place: Path
    sha256: str

    def file(self, *, tls: bool) -> File:
        return File(self.tls if tls else self.plain, f"{BUCKET}/{NAME}", self.sha256)


@contextmanager
def bed(web: Path, place: Path, sha256: str, image: Mapping[str, str]) -> Iterator[Bed]:
    """The S3 server is nginx with a listing, and the object's CRC64NVME in every answer."""
    (web / BUCKET / "listing.xml").write_text(listing((web / BUCKET / NAME).stat().st_size))
    crc = base64.b64encode(crc_of(web / BUCKET / NAME).to_bytes(8)).decode()
    told = {"x-amz-checksum-crc64nvme": crc, "x-amz-checksum-type": "FULL_OBJECT"}
    with ExitStack() as undo:
        plain = undo.enter_context(serving(web))
        s3 = undo.enter_context(serving(web, headers=told, index="listing.xml"))
        tls = undo.enter_context(serving(web, tls=True))
        node = undo.enter_context(
            daemon(place / "cache", ca_file=str(tls.ca_file), s3_endpoint_url=s3.url, s3_region="us-east-1")
        )
        other = None
        if image:
            other = undo.enter_context(daemon(place / "image", image, ca_file=str(tls.ca_file)))
        yield Bed(plain, tls, node, other, place, sha256)


def listing(size: int) -> str:
    return (
        f"<?xml version='1.0'?><ListBucketResult><Name>{BUCKET}</Name><Prefix>{NAME}</Prefix>"
        "<KeyCount>1</KeyCount><IsTruncated>false</IsTruncated>"
        f"<Contents><Key>{NAME}</Key><ETag>1</ETag><Size>{size}</Size></Contents>"
        "</ListBucketResult>"
    )


def crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(16 * MIB):
            crc = crc64nvme(block, crc)
    return crc


def case(at: Bed, runs: int, size: int, kind: Sink, *, tls: bool) -> list[dict[str, Any]]:
    """The rows of one sink and transport."""
    ways: dict[tuple[str, str], Callable[[], Run]] = {}
    file = at.file(tls=tls)
    notes: dict[tuple[str, str], str] = {}
    nodes = {"cachd": at.node, IMAGE: at.image} if tls else {"cachd": at.node}
    for name, node in nodes.items():
        for form, digest in zip(FORMS, ("", f"#sha256={file.sha256}"), strict=True):
            ways[name, form] = partial(pulled, node, file.url + digest)
            if node is None:
                notes[name, form] = "not installed"
    if not tls:
        ways["cachd, s3 with crc64nvme", "verified"] = lambda: pulled(at.node, f"s3://{BUCKET}/{NAME}")
    once = set()
    for peer in PEERS:
        for form in forms(peer, kind):
            if missing := peer.missing():
                notes[peer.name, form] = missing
            ways[peer.name, form] = way(peer, file, at.place / "got", form, sync=kind == "disk")
            if peer.slow:
                once.add((peer.name, form))
    for name, do in limits(at.place, at.plain.directory / file.path, file, size, kind).items():
        ways[name, "limit"] = do
    failures = {label(key): note for key, note in notes.items()}
    measured = interleaved(
        {label(key): do for key, do in ways.items()},
        runs,
        pause=lambda: warmed(at.place, size),
        failures=failures,
        once={label(key) for key in once},
    )
    return [row(*key, measured[label(key)], failures.get(label(key))) for key in ways]


def forms(peer: Peer, kind: Sink) -> tuple[str, ...]:
    """To memory both, a slow peer's unverified form alone; to disk the verified one."""
    if kind == "disk":
        return ("verified",)
    return ("unverified",) if peer.slow else FORMS


def label(key: tuple[str, str]) -> str:
    return ", ".join(key)


def way(peer: Peer, file: File, target: Path, form: str, *, sync: bool) -> Callable[[], Run]:
    """Fetch by `peer` in one form; the first time, its bytes are checked outside the clock."""
    checked = False

    def fetch() -> Run:
        nonlocal checked
        try:
            if form == "unverified":
                run = peer.fetch(file, target)
            elif peer.verified:
                run = peer.verified(file, target)
            else:
                run = peer.fetch(file, target).then(peers.hashed(target, file.sha256))
            if sync:
                run = run.then(peers.synced(target))
            if not checked:
                peers.hashed(target, file.sha256)
                checked = True
            return run
        finally:
            target.unlink(missing_ok=True)

    return fetch


def limits(place: Path, stored: Path, file: File, size: int, kind: Sink) -> dict[str, Callable[[], Run]]:
    """What no client can beat; `stored` is the file that the origin serves."""
    target = place / "limit"

    def removed(what: str, *args: object, origin: Nginx | None = None) -> Callable[[], Run]:
        def do() -> Run:
            try:
                return limit(what, *args, origin=origin)
            finally:
                target.unlink(missing_ok=True)

        return do

    receive = (file.url, size, target)
    found = {
        "recv_into, 4 threads": removed("recv", *receive, origin=file.origin),
        RAW: removed("recv+pwrite", *receive, origin=file.origin),
        RAW_HASHED: removed("recv+xxh3+pwrite", *receive, origin=file.origin),
        RAW_VERIFIED: removed("recv+xxh3+pwrite+sha256", *receive, origin=file.origin),
        SHA256: removed("sha256", size),
        SHA256_FILE: lambda: limit("sha256-file", size, stored),
        WRITE: removed("pwrite", size, target),
    }
    if kind == "disk":
        found[WRITE_SYNC] = removed("pwrite+fsync", size, target)
        found[RAW_DURABLE] = removed("recv+xxh3+pwrite+sha256+fsync", *receive, origin=file.origin)
    return found


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The named figures that the goals are judged by, and what the limits of the same run reach."""
    cases = {c["sink"]: c["rows"] for c in results["cases"]}
    size, memory, disk = results["size_bytes"], cases["memory"], cases["disk"]
    found: dict[str, float | None] = {
        "unverified / raw limit": speed(memory, "unverified", RAW),
        "raw limit with parts hashed / raw limit": speed(memory, "limit", RAW, RAW_HASHED),
        "unverified CPU s/GB": cpu(memory, "cachd", "unverified", size),
        "raw limit with parts hashed, CPU s/GB": cpu(memory, RAW_HASHED, "limit", size),
        "verified / sha256 of one core": speed(memory, "verified", SHA256),
        "verified limit / sha256 of one core": speed(memory, "limit", SHA256, RAW_VERIFIED),
        "verified / aria2c --checksum": speed(memory, "verified", "aria2c -x16"),
        "verified limit / aria2c --checksum": speed(memory, "verified", "aria2c -x16", RAW_VERIFIED),
        "crc64nvme / unverified": ratio(
            seconds(memory, "cachd", "unverified"), seconds(memory, "cachd, s3 with crc64nvme", "verified")
        ),
    }
    for name in ("aria2c -x16", "hf_transfer", "awscrt", "curl", "s5cmd"):
        found[f"unverified / {name}"] = speed(memory, "unverified", name)
        found[f"raw limit with parts hashed / {name}"] = speed(memory, "unverified", name, RAW_HASHED)
    for name in ("hf_transfer", "awscrt", "aria2c -x16"):
        found[f"durable / {name}"] = speed(disk, "verified", name)
        found[f"durable limit / {name}"] = speed(disk, "verified", name, RAW_DURABLE)
    return {name: value for name, value in found.items() if value is not None}


def speed(rows: Any, form: str, peer: str, ours: str = "cachd") -> float | None:
    """How many times as fast as `peer` `ours` is in this form; None where one of them was not measured."""
    return ratio(seconds(rows, peer, form), seconds(rows, ours, form))


def seconds(rows: Any, name: str, form: str) -> float | None:
    """The median; a limit has no other form."""
    found = find(rows, name, form) or find(rows, name, "limit")
    return median(found) if found else None


def cpu(rows: Any, name: str, form: str, size: int) -> float | None:
    found = find(rows, name, form)
    return median(found, "cpu_seconds") / size * GB if found else None


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def title(results: dict[str, Any], case: dict[str, Any]) -> str:
    transport = "TLS" if case["tls"] else "plaintext"
    size = results["size_bytes"] // MIB
    return f"cold pull of one file of {size} MiB, {transport}, to {case['sink']} ({case['file_system']})"


def table(results: dict[str, Any]) -> Group:
    size = results["size_bytes"]
    return Group(
        *(
            report.table(title(results, c), report.LINES, report.lines(c["rows"], size))
            for c in results["cases"]
        )
    )


def markdown(results: dict[str, Any]) -> str:
    parts = []
    for found in results["cases"]:
        lines = report.markdown(report.LINES, report.lines(found["rows"], results["size_bytes"]))
        parts.append(f"**{report.heading(title(results, found))}**\n\n{lines}")
    return "\n".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
    size = results["size_bytes"]
    panels = {
        title(results, c): {
            f"{r['name']}, {r['form']}": [size / run["seconds"] / GB for run in r["runs"]]
            for r in c["rows"]
            if r["runs"]
        }
        for c in results["cases"]
    }
    report.bars(path, panels, "GB/s")
