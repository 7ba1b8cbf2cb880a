"""Cold pull of a model, verified: 8 shards with 12 small files to memory, and 2,000 small files to disk.

cachd pulls a web directory by its SHA256SUMS, and a Hub repository, until the model is published. A peer
fetches the same files, followed by openssl sha256 on every core. To disk, each peer is also followed by one
`sync --file-system`. The Hub is an nginx that serves the documents of a Hub.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group

from bench import report
from bench.measure import (
    GIB,
    KIB,
    MIB,
    Failed,
    Run,
    available_bytes,
    command,
    daemon,
    file_system,
    interleaved,
    pulled,
    random_file,
    scripted,
    serving,
    sink,
    spread,
    warmed,
)
from bench.peers import DOWNLOADS, binary, trust
from bench.report import MB, Options, find, median, row
from tests.ground.hub import Hub
from tests.ground.nginx import Nginx

SHARDS = 8
SHARD_SIZE = 512 * MIB
BESIDE = 12
SMALL_FILES = 2000
RUNS = 3
QUICK_SHARD_SIZE = 4 * MIB
QUICK_SMALL_FILES = 40
REPO = "org/model"
BUCKET = "bucket"
HUB = "huggingface_hub snapshot_download"
CACHD_HUB = "cachd, hf://"


def run(options: Options) -> dict[str, Any]:
    """Every way for each model and sink."""
    runs = options.runs or (1 if options.quick else RUNS)
    results = report.head("models", options, runs=runs, cases=[])
    small = QUICK_SMALL_FILES if options.quick else SMALL_FILES
    for name, sizes, kind in (
        ("shards", sharded(shard_size(options)), "memory"),
        ("small", scattered(small), "disk"),
    ):
        with sink("memory") as web, served(web, sizes) as model, sink(kind) as place:
            facts = {"model": name, "sink": kind, "file_system": file_system(place)}
            counted = {"files": len(sizes), "size_bytes": sum(sizes.values())}
            rows = case(model, place, runs, sync=kind == "disk")
            results["cases"].append({**facts, **counted, "rows": rows})
    return results


def shard_size(options: Options) -> int:
    """512 MiB, or as much as fits into memory twice."""
    if options.size_bytes:
        return options.size_bytes // SHARDS
    if options.quick:
        return QUICK_SHARD_SIZE
    fits = (available_bytes() - 3 * GIB) // 2 // SHARDS
    return min(SHARD_SIZE, fits // (64 * MIB) * 64 * MIB)


def sharded(size: int) -> dict[str, int]:
    """Size of every file."""
    shards = {f"model-{number:05}-of-{SHARDS:05}.safetensors": size for number in range(1, SHARDS + 1)}
    return {**shards, **{f"part-{number}.json": 4 * KIB * (number + 1) for number in range(BESIDE)}}


def scattered(files: int) -> dict[str, int]:
    """Size of every small file."""
    chosen = random.Random(1)
    return {f"d{n % 20:02}/file-{n:04}.json": chosen.randint(KIB, 64 * KIB) for n in range(files)}


@dataclass(frozen=True, slots=True)
class Model:
    """A model on an origin, below /bucket/ and as a repository of a Hub; `sums` lists its files' sha256."""

    origin: Nginx
    sizes: Mapping[str, int]
    sums: Path
    commit: str

    @property
    def big(self) -> bool:
        """Whether it has shards."""
        return max(self.sizes.values()) > MIB


@contextmanager
def served(web: Path, sizes: Mapping[str, int]) -> Iterator[Model]:
    """Write the files of a model, and serve them from a web server that is a Hub, too."""
    directory = web / BUCKET
    digests = {}
    for number, (path, size) in enumerate(sizes.items()):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        digests[path] = random_file(directory / path, size)
        # The Hub's client tells files apart by their ETags; nginx makes an ETag of time and size.
        os.utime(directory / path, (number, number))
    sums = directory / "SHA256SUMS"
    sums.write_text("".join(f"{digests[path]} *{path}\n" for path in sorted(sizes)))
    commit = as_hub(web, {path: directory / path for path in sizes})
    with serving(web, headers={"X-Repo-Commit": commit}) as origin:
        yield Model(origin, sizes, sums, commit)


def as_hub(web: Path, files: Mapping[str, Path]) -> str:
    """Write what a Hub answers for a repository of these files to `web`; its commit."""
    with Hub() as hub:
        hub.page_size = len(files) + 1000
        commit = hub.add(REPO, dict(files))
        for asked, query in ((f"revision/{commit}", "blobs=true"), (f"tree/{commit}", "recursive=true")):
            kept = web / "api" / "models" / REPO / asked
            kept.parent.mkdir(parents=True)
            with urllib.request.urlopen(f"{hub.url}/api/models/{REPO}/{asked}?{query}") as answer:
                kept.write_bytes(answer.read())
    shutil.copy(
        web / "api/models" / REPO / "revision" / commit, web / "api/models" / REPO / "revision" / "main"
    )
    resolved = web / REPO / "resolve" / commit
    resolved.parent.mkdir(parents=True)
    resolved.symlink_to(web / BUCKET)
    return commit


def case(model: Model, place: Path, runs: int, *, sync: bool) -> list[dict[str, Any]]:
    """The rows of one model and sink."""
    failures: dict[str, str] = {}
    ways: dict[tuple[str, str], Callable[[], Run]] = {}
    once = set()
    with ExitStack() as undo:
        node = undo.enter_context(daemon(place / "cache", hf_endpoint=model.origin.url))
        ways["cachd", "verified"] = lambda: pulled(node, f"{model.origin.url}/{BUCKET}/")
        ways[CACHD_HUB, "verified"] = lambda: pulled(node, f"hf://{REPO}@{model.commit}")
        for peer in peers(model, place):
            key = peer.name, "verified"
            if peer.missing:
                failures[", ".join(key)] = "not installed"
            ways[key] = partial(fetched, model, peer, place, sync=sync)
            if peer.slow:
                once.add(", ".join(key))
        measured = interleaved(
            {", ".join(key): way for key, way in ways.items()},
            runs,
            pause=partial(warmed, place, sum(model.sizes.values())),
            failures=failures,
            once=once,
        )
    return [row(*key, measured[", ".join(key)], failures.get(", ".join(key))) for key in ways]


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to fetch every file of a model into a directory, `at` below it. A slow one runs once."""

    name: str
    fetch: Callable[[Path], Run]
    missing: bool = False
    slow: bool = False
    at: str = "."


def peers(model: Model, place: Path) -> list[Peer]:
    """The peers of a model; the lists of files that they take are written to `place`."""
    base = f"{model.origin.url}/{BUCKET}"
    env = trust(model.origin)
    plain, config, commands = (place / name for name in ("plain", "config", "commands"))
    plain.write_text("".join(f"{base}/{path}\n  out={path}\n" for path in model.sizes))
    config.write_text("".join(f'url="{base}/{path}"\noutput="{path}"\n' for path in model.sizes))
    commands.write_text("".join(f"cp s3://{BUCKET}/{path} {path}\n" for path in model.sizes))
    split = ("-x16", "-s16", "-k1M") if model.big else ("-x1",)
    aria2c = ("aria2c", "--no-conf", "--quiet", "--file-allocation=none", "-j16", *split)
    curl = ("curl", "-sSf", "--parallel", "--parallel-max", 16, "--create-dirs", "-K", config)
    s5cmd = (binary("s5cmd"), "--no-sign-request", "--endpoint-url", model.origin.url, "run", commands)

    def program(*words: object) -> Callable[[Path], Run]:
        return lambda target: command(*words, env=env, cwd=target)

    def library(name: str, *args: object) -> Callable[[Path], Run]:
        return lambda target: scripted(DOWNLOADS, name, *args, target, env=env)

    hub_at = f"models--{REPO.replace('/', '--')}/snapshots/{model.commit}"
    gone = {name: binary(name) is None for name in ("aria2c", "curl", "s5cmd")}
    return [
        Peer("aria2c -j16", program(*aria2c, "-i", plain), gone["aria2c"]),
        Peer("curl --parallel", program(*curl), gone["curl"]),
        Peer("s5cmd run", program(*s5cmd), gone["s5cmd"]),
        Peer(
            HUB,
            library("snapshot_download", model.origin.url, REPO, model.commit),
            slow=model.big,
            at=hub_at,
        ),
    ]


def fetched(model: Model, peer: Peer, place: Path, *, sync: bool) -> Run:
    """Fetch and verify by `peer`. The sizes of the files are checked outside the clock."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        target = Path(name)
        run = peer.fetch(target).then(hashed(model, target / peer.at))
        if sync:
            run = run.then(command("sync", "--file-system", target))
        for path, size in model.sizes.items():
            if (target / peer.at / path).stat().st_size != size:
                raise Failed(f"{peer.name} left another {path}")
        return run


def hashed(model: Model, directory: Path) -> Run:
    """The sha256 of every file on every core, compared with the list. Raises Failed."""
    at_once = 1 if model.big else 32
    script = 'cut -c67- "$0" | xargs -P "$1" -n "$2" openssl dgst -sha256 -r | LC_ALL=C sort -k2 | cmp - "$0"'
    return command("sh", "-c", script, model.sums, os.cpu_count(), at_once, cwd=directory)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as each peer a verified pull is, by model."""
    found: dict[str, float | None] = {}
    for measured in results["cases"]:
        rows, model = measured["rows"], measured["model"]
        ours, hub = find(rows, "cachd", "verified"), find(rows, CACHD_HUB, "verified")
        if not ours or not hub:
            continue
        theirs = {r["name"]: median(r) for r in rows if r["runs"] and not r["name"].startswith("cachd")}
        found |= {f"{model} / {name}": seconds / median(ours) for name, seconds in theirs.items()}
        found[f"{model} / fastest peer"] = min(theirs.values(), default=0) / median(ours) or None
        found[f"{model} / {HUB}"] = theirs[HUB] / median(hub) if HUB in theirs else None
        found[f"{model}, seconds"] = median(ours)
    return {name: value for name, value in found.items() if value is not None}


def title(measured: dict[str, Any]) -> str:
    """What was fetched, and where to."""
    size = measured["size_bytes"] / MIB
    where = f"to {measured['sink']} ({measured['file_system']})"
    return f"a model of {measured['files']} files, {size:,.0f} MiB, {where}"


LINES = ("", "form", "seconds", "CPU seconds", "memory, MB", "time against cachd's")


def cells(measured: dict[str, Any]) -> list[list[str]]:
    """The cells below `LINES`."""
    lines = []
    ours = find(measured["rows"], "cachd", "verified")
    for found in measured["rows"]:
        if not found["runs"]:
            lines.append([found["name"], found["form"], found["note"] or "not measured", "", "", ""])
            continue
        lines.append(
            [
                found["name"],
                found["form"],
                spread(run["seconds"] for run in found["runs"]),
                spread(run["cpu_seconds"] for run in found["runs"]),
                f"{max(run['anonymous_bytes'] for run in found['runs']) / MB:.0f}",
                f"{median(found) / median(ours):.2f} x" if ours else "",
            ]
        )
    return lines


def table(results: dict[str, Any]) -> Group:
    """For the terminal."""
    return Group(*(report.table(title(found), LINES, cells(found)) for found in results["cases"]))


def markdown(results: dict[str, Any]) -> str:
    """For the page."""
    return "\n".join(
        f"**{report.heading(title(found))}**\n\n{report.markdown(LINES, cells(found))}"
        for found in results["cases"]
    )
