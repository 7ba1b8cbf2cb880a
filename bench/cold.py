"""Cold pull of one file: from nginx to memory, to disk, and to disk over TLS, each verified.

cachd is the daemon, from the request until the model is ready: journalled, synced, published. A peer's
verified form is its download with its own checksum, or else followed by openssl sha256. To disk it is
followed by `sync FILE`, because cachd is durable. Each peer's bytes are checked once, outside the clock.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from awscrt.checksums import crc64nvme
from rich.console import Group

from bench import peers, report
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
from bench.peers import PEERS, File, Peer
from bench.report import GB, Options, find, median, row
from tests.ground.nginx import Nginx
from tests.ground.node import Node

SIZE = 2 * GIB
QUICK_SIZE = 24 * MIB
RUNS = 3
CASES = (("memory", False), ("disk", False), ("disk", True))  # where to, and whether over TLS
CRC = "cachd, s3 with crc64nvme"
SHA256 = "sha256, one core, from the page cache"
BUCKET = "bucket"
NAME = "model.bin"


def run(options: Options) -> dict[str, Any]:
    """Every way, for each case."""
    size = options.size_bytes or (QUICK_SIZE if options.quick else SIZE)
    runs = options.runs or (1 if options.quick else RUNS)
    results = report.head("cold", options, size_bytes=size, runs=runs, cases=[])
    with sink("memory") as web:
        (web / BUCKET).mkdir()
        sha256 = random_file(web / BUCKET / NAME, size)
        for kind, tls in CASES:
            with sink(kind) as place, bed(web, place, sha256) as at:
                rows = case(at, runs, size, sync=kind == "disk", tls=tls)
                facts = {"sink": kind, "file_system": file_system(place), "tls": tls}
                results["cases"].append({**facts, "rows": rows})
    return results


@dataclass(frozen=True, slots=True)
class Bed:
    """Two origins with the same file, a daemon, and a directory for the copies of peers."""

    plain: Nginx
    tls: Nginx
    node: Node
    place: Path
    sha256: str

    def file(self, *, tls: bool) -> File:
        """The file, as peers are given it."""
        return File(self.tls if tls else self.plain, f"{BUCKET}/{NAME}", self.sha256)


@contextmanager
def bed(web: Path, place: Path, sha256: str) -> Iterator[Bed]:
    """The S3 server is an nginx with a listing, which sends the object's CRC64NVME with every answer."""
    (web / BUCKET / "listing.xml").write_text(listing((web / BUCKET / NAME).stat().st_size))
    crc = base64.b64encode(crc_of(web / BUCKET / NAME).to_bytes(8)).decode()
    headers = {"x-amz-checksum-crc64nvme": crc, "x-amz-checksum-type": "FULL_OBJECT"}
    with ExitStack() as undo:
        plain = undo.enter_context(serving(web))
        s3 = undo.enter_context(serving(web, headers=headers, index="listing.xml"))
        tls = undo.enter_context(serving(web, tls=True))
        options: dict[str, Any] = {
            "ca_file": str(tls.ca_file),
            "s3_endpoint_url": s3.url,
            "s3_region": "us-east-1",
        }
        node = undo.enter_context(daemon(place / "cache", **options))
        yield Bed(plain, tls, node, place, sha256)


def listing(size: int) -> str:
    """What S3 answers for a bucket with the one file."""
    return (
        f"<?xml version='1.0'?><ListBucketResult><Name>{BUCKET}</Name><Prefix>{NAME}</Prefix>"
        "<KeyCount>1</KeyCount><IsTruncated>false</IsTruncated>"
        f"<Contents><Key>{NAME}</Key><ETag>1</ETag><Size>{size}</Size></Contents>"
        "</ListBucketResult>"
    )


def crc_of(path: Path) -> int:
    """The CRC64NVME of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(16 * MIB):
            crc = crc64nvme(block, crc)
    return crc


def case(at: Bed, runs: int, size: int, *, sync: bool, tls: bool) -> list[dict[str, Any]]:
    """The rows of one sink and transport."""
    file = at.file(tls=tls)
    ways: dict[tuple[str, str], Callable[[], Run]] = {
        ("cachd", "verified"): lambda: pulled(at.node, f"{file.url}#sha256={file.sha256}"),
        ("cachd", "unverified"): lambda: pulled(at.node, file.url),
    }
    if not tls:
        ways[CRC, "verified"] = lambda: pulled(at.node, f"s3://{BUCKET}/{NAME}")
    ways |= {(peer.name, "verified"): way(peer, file, at.place / "got", sync=sync) for peer in PEERS}
    ways[SHA256, "limit"] = partial(peers.hashed_only, at.plain.directory / file.path)
    failures = {f"{peer.name}, verified": missing for peer in PEERS if (missing := peer.missing())}
    measured = interleaved(
        {", ".join(key): do for key, do in ways.items()},
        runs,
        pause=lambda: warmed(at.place, size),
        failures=failures,
        once={f"{peer.name}, verified" for peer in PEERS if peer.slow},
    )
    return [row(*key, measured[", ".join(key)], failures.get(", ".join(key))) for key in ways]


def way(peer: Peer, file: File, target: Path, *, sync: bool) -> Callable[[], Run]:
    """Fetch and verify by `peer`; the first time, the bytes are checked outside the clock."""
    checked = False

    def fetch() -> Run:
        nonlocal checked
        try:
            if peer.verified:
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


def figures(results: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as each peer a verified pull is, by case, and what it costs."""
    found: dict[str, float | None] = {}
    for measured in results["cases"]:
        rows, where = measured["rows"], name_of(measured)
        times = {peer.name: speed(rows, peer.name) for peer in PEERS}
        found |= {f"{where} / {name}": value for name, value in times.items()}
        found[f"{where} / fastest peer"] = min(filter(None, times.values()), default=None)
        found[f"{where} / sha256 of one core"] = speed(rows, SHA256, "limit")
        ours = find(rows, "cachd", "verified")
        found[f"{where}, GB/s"] = results["size_bytes"] / median(ours) / GB if ours else None
    plain = results["cases"][0]["rows"]
    unverified, crc = find(plain, "cachd", "unverified"), find(plain, CRC, "verified")
    found["crc64nvme / unverified"] = median(unverified) / median(crc) if unverified and crc else None
    return {name: value for name, value in found.items() if value is not None}


def name_of(measured: dict[str, Any]) -> str:
    """A case in two or three words."""
    return f"{measured['sink']}, {'TLS' if measured['tls'] else 'plaintext'}"


def speed(rows: Any, peer: str, form: str = "verified") -> float | None:
    """How many times as fast as `peer` cachd is; None where one of them was not measured."""
    theirs, ours = find(rows, peer, form), find(rows, "cachd", "verified")
    return median(theirs) / median(ours) if theirs and ours else None


def title(results: dict[str, Any], measured: dict[str, Any]) -> str:
    """What was fetched, and where to."""
    transport = "TLS" if measured["tls"] else "plaintext"
    where = f"{measured['sink']} ({measured['file_system']})"
    return f"one file of {results['size_bytes'] // MIB} MiB, {transport}, to {where}"


def table(results: dict[str, Any]) -> Group:
    """For the terminal."""
    size = results["size_bytes"]
    shown = [(title(results, c), report.lines(c["rows"], size)) for c in results["cases"]]
    return Group(*(report.table(name, report.LINES, lines) for name, lines in shown))


def markdown(results: dict[str, Any]) -> str:
    """For the page."""
    parts = []
    for measured in results["cases"]:
        lines = report.markdown(report.LINES, report.lines(measured["rows"], results["size_bytes"]))
        parts.append(f"**{report.heading(title(results, measured))}**\n\n{lines}")
    return "\n".join(parts)


def plot(results: dict[str, Any]) -> str:
    """Verified pulls to disk, in the clear: median GB/s of each way."""
    (measured,) = [c for c in results["cases"] if name_of(c) == "disk, plaintext"]
    rows = [r for r in measured["rows"] if r["form"] == "verified" and r["runs"] and r["name"] != CRC]
    speeds = {r["name"]: results["size_bytes"] / median(r) / GB for r in sorted(rows, key=median)}
    return report.bars("One file, verified by sha256 and synced to disk", speeds, "GB/s")
