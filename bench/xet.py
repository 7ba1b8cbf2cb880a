"""Whether hf_xet, the Hub's client of its Xet storage, fetches a file better than cachd does by plain HTTP.

    python -m bench.xet [--mib 1024] [--runs 5]

hf_xet itself uploads the files to a store (tests/ground/xet.py), so chunks and compression are those of the
Hub. One nginx serves the xorbs, and the files as they are, as the Hub's bridge for plain HTTP does.
The cases:

    random       incompressible bytes, such as quantised weights
    bf16         normally distributed numbers, such as weights as they were trained
    revision     random, of which the node has another revision: 10 runs of 1 % each differ
    throttled    from an origin that gives 80 MiB/s to each connection, 50 ms after it is asked

hf_xet verifies no sha256. So it is measured as it is, and followed by `openssl sha256`. Its cache of chunks
is off by default; a revision is fetched with the option that turns it on, too. Figures are medians of
interleaved runs, and ratios are medians over pairs of runs. docs/decisions/0009 says what follows.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy

from bench import peers, report
from bench.clock import clocked
from bench.measure import (
    MIB,
    Run,
    daemon,
    interleaved,
    machine,
    pulled,
    random_file,
    scripted,
    sink,
    spread,
    warmed,
)
from bench.report import GB, MB
from tests.ground.nginx import Nginx
from tests.ground.node import Node
from tests.ground.xet import SETTINGS, XetStore

RUNS = 5
COLUMNS = (
    "",
    "GB/s",
    "CPU s/GB",
    "memory, MB",
    "received, MB (requests)",
    "time against cachd",
    "CPU against cachd",
)
THROTTLE = """
    limit_rate 80m;
    auth_request /.late;
    location = /.late { internal; auth_request off; echo_sleep 0.05; echo -n ""; }
"""
NO_MORE: Mapping[str, str] = {}
HIGH_PERFORMANCE = {"HF_XET_HIGH_PERFORMANCE": "1"}
CACHED = {"HF_XET_CHUNK_CACHE_SIZE_BYTES": str(16 << 30)}


# --- hf_xet, in a process of its own ---


def upload(endpoint: str, path: str) -> None:
    """Upload a file."""
    import hf_xet

    with (
        clocked(),
        hf_xet.XetSession().new_upload_commit(
            endpoint=endpoint, token="any", token_expiry_unix_secs=1 << 40
        ) as commit,
    ):
        commit.start_upload_file(path)


def download(endpoint: str, name: str, size: str, target: str) -> None:
    """Download a file, as huggingface_hub does."""
    import hf_xet

    with (
        clocked(),
        hf_xet.XetSession().new_file_download_group(
            endpoint=endpoint, token="any", token_expiry_unix_secs=1 << 40
        ) as group,
    ):
        group.start_download_file(hf_xet.XetFileInfo(name, int(size)), target)


# --- the cases ---


@dataclass(frozen=True, slots=True)
class File:
    """A file at both origins. `xet` is its name in the store."""

    path: Path
    sha256: str
    xet: str

    @property
    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size


@dataclass(frozen=True, slots=True)
class Bed:
    """What all cases share. `home` keeps hf_xet's caches."""

    web: Path
    place: Path
    home: Path
    store: XetStore
    node: Node

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Of hf_xet."""
        return {**SETTINGS, "HF_HOME": str(self.home), **more}

    def stored(self, path: Path) -> File:
        """A file below `web`, uploaded."""
        names = set(self.store.files)
        scripted(Path(__file__), "upload", self.store.url, path, env=self.environment({}))
        (xet,) = set(self.store.files) - names
        with path.open("rb") as opened:
            return File(path, hashlib.file_digest(opened, "sha256").hexdigest(), xet)

    @contextmanager
    def served(self, directives: str = "") -> Iterator[Nginx]:
        """An nginx that has the files and the xorbs."""
        with Nginx(self.web, congestion="cubic", directives=directives) as nginx:
            self.store.served = f"{nginx.url}/xorbs"
            yield nginx

    def by_xet(self, file: File, more: Mapping[str, str] = NO_MORE, *, is_verified: bool = False) -> Run:
        """One download by hf_xet, with more settings."""
        target = self.place / "got"
        arguments = ("download", self.store.url, file.xet, file.size, target)
        try:
            run = scripted(Path(__file__), *arguments, env=self.environment(more))
            return run.then(peers.hashed(target, file.sha256)) if is_verified else run
        finally:
            target.unlink(missing_ok=True)

    def by_cachd(self, file: File, nginx: Nginx) -> Run:
        """One pull by cachd, verified by its sha256."""
        return pulled(self.node, f"{nginx.url}/{file.path.name}#sha256={file.sha256}")


@contextmanager
def bed() -> Iterator[Bed]:
    """A store, a daemon, and directories in memory."""
    with sink("memory") as web, sink("memory") as place, tempfile.TemporaryDirectory(dir=place) as home:
        (web / "xorbs").mkdir()
        with XetStore(web / "xorbs") as store, daemon(place / "cache") as node:
            yield Bed(web, place, Path(home) / "home", store, node)


def bf16(path: Path, size: int) -> Path:
    """Write numbers as weights are distributed."""
    source = numpy.random.Generator(numpy.random.SFC64(1))
    with path.open("wb") as file:
        for _ in range(0, size, 16 * MIB):
            numbers = source.standard_normal(8 * MIB, dtype=numpy.float32) * numpy.float32(0.02)
            file.write((numbers.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes())
    return path


def revised(path: Path, before: Path) -> Path:
    """Write another revision: of each tenth, a tenth differs."""
    shutil.copyfile(before, path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        for tenth in range(10):
            file.seek(tenth * (size // 10))
            file.write(os.urandom(size // 100))
    return path


def case(
    at: Bed, name: str, ways: Mapping[str, Callable[[], Run]], nginx: Nginx, size: int, runs: int
) -> None:
    """Measure, and print."""
    received: dict[str, int] = {}
    requests: dict[str, int] = {}

    def counted(way: str) -> Run:
        before = len(nginx.requests())
        run = ways[way]()
        asked = nginx.requests()[before:]
        received[way], requests[way] = sum(each.body_bytes for each in asked), len(asked)
        return run

    measured = interleaved(
        {way: partial(counted, way) for way in ways}, runs, pause=partial(warmed, at.place, size)
    )
    ours = measured["cachd, verified"]
    lines = [
        [
            way,
            spread(size / run.seconds / GB for run in found),
            spread(run.cpu_seconds / size * GB for run in found),
            f"{max(run.anonymous_bytes for run in found) / MB:,.0f}",
            f"{received[way] / MB:,.0f} ({requests[way]})",
            spread(run.seconds / own.seconds for run, own in zip(found, ours, strict=False)),
            spread(run.cpu_seconds / own.cpu_seconds for run, own in zip(found, ours, strict=False)),
        ]
        for way, found in measured.items()
    ]
    print(f"**{name}, {size // MIB} MiB**\n\n{report.markdown(COLUMNS, lines)}", flush=True)


def two_ways(at: Bed, file: File, nginx: Nginx) -> dict[str, Callable[[], Run]]:
    """cachd, and hf_xet."""
    return {"cachd, verified": partial(at.by_cachd, file, nginx), "hf_xet": partial(at.by_xet, file)}


def compare(size: int, runs: int) -> None:
    """All cases, one after the other."""
    with bed() as at:
        random_file(at.web / "random", size)
        random = at.stored(at.web / "random")
        revision = at.stored(revised(at.web / "revision", random.path))
        weights = at.stored(bf16(at.web / "bf16", size))
        verified = {"hf_xet, then sha256": partial(at.by_xet, random, is_verified=True)}
        hurried = {"hf_xet, high performance": partial(at.by_xet, random, HIGH_PERFORMANCE)}
        cached = {"hf_xet, cache on": partial(at.by_xet, revision, CACHED)}
        with at.served() as nginx:
            case(at, "random", two_ways(at, random, nginx) | verified | hurried, nginx, size, runs)
            at.by_xet(random, CACHED)
            case(at, "revision", two_ways(at, revision, nginx) | cached, nginx, size, runs)
            case(at, "bf16", two_ways(at, weights, nginx), nginx, size, runs)
        with at.served(THROTTLE) as nginx:
            case(at, "throttled", two_ways(at, random, nginx), nginx, size, runs)
            case(at, "revision, throttled", two_ways(at, revision, nginx), nginx, size, runs)


def main() -> None:
    """Compare, with the sizes of the command line."""
    parser = argparse.ArgumentParser("python -m bench.xet", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS, help="counted runs of each way")
    parser.add_argument("--mib", type=int, default=1024, help="size of each file")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started and mounted goes, too
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}, hf_xet {version('hf_xet')}\n")
    compare(asked.mib * MIB, asked.runs)


if __name__ == "__main__":
    match sys.argv[1:]:
        case "upload", endpoint, path:
            upload(endpoint, path)
        case "download", endpoint, name, size, target:
            download(endpoint, name, size, target)
        case _:
            main()
