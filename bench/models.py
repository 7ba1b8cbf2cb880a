"""Cold pull of a model: 8 shards of 1 GiB with 12 small files, and 2,000 small files.

cachd takes what the SHA256SUMS of a web directory list, or a Hub repository; it ends verified and published.
A peer fetches the same list; its verified form checks by itself or is followed by openssl sha256 on every
core. To disk, every peer is followed by one `sync --file-system`. The Hub is nginx with the documents of one.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
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
    cpu_seconds,
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
from bench.peers import DOWNLOADS, binary, limit, trust
from bench.report import GB, MB, Options, find, median, row
from tests.ground.hub import Hub
from tests.ground.nginx import Nginx

SHARDS = 8
SHARD_SIZE = GIB
BESIDE = 12
SMALL_FILES = 2000
RUNS = 3
QUICK_SHARD_SIZE = 4 * MIB
QUICK_SMALL_FILES = 40
REPO = "org/model"
BUCKET = "bucket"
RECEIVED = "recv_into + pwrite of a shard, CPU of both sides"
HASHED = "sha256, every core"
SHARD_EACH = "recv_into + xxh3 + sha256 + pwrite, 4 threads, a shard each"
ASKED = "GET + sha256 + write + fsync + two links in a bare Python loop"
LIBRARY = "the same by Python's own HTTP client, HEAD and GET"
ASKED_BY = (1, 2, 4)
HUB = "huggingface_hub snapshot_download"
CACHD_HUB = "cachd, hf://"


def run(options: Options) -> dict[str, Any]:
    """Every way for each model and sink."""
    runs = options.runs or (1 if options.quick else RUNS)
    results = report.head("models", options, runs=runs, cores=os.cpu_count() or 1, cases=[])
    small = QUICK_SMALL_FILES if options.quick else SMALL_FILES
    for name, sizes, sinks in (
        ("shards", sharded(shard_size(options)), ("memory",)),
        ("small", scattered(small), ("small files", "disk")),
    ):
        with sink("memory") as web, served(web, sizes) as model:
            for kind in sinks:
                with sink(kind) as place:
                    shown = "disk" if kind == "disk" else "memory"
                    facts = {"model": name, "sink": shown, "file_system": file_system(place)}
                    told = {
                        "files": len(sizes),
                        "size_bytes": sum(sizes.values()),
                        "largest_bytes": max(sizes.values()),
                    }
                    results["cases"].append({**facts, **told, "rows": case(model, place, runs, kind)})
    return results


def shard_size(options: Options) -> int:
    """Of 1 GiB, or of what the memory holds twice."""
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
    def digests(self) -> dict[str, str]:
        return {line[66:]: line[:64] for line in self.sums.read_text().splitlines()}

    @property
    def big(self) -> bool:
        return max(self.sizes.values()) > MIB


@contextmanager
def served(web: Path, sizes: Mapping[str, int]) -> Iterator[Model]:
    """Made, and served."""
    directory = web / BUCKET
    digests = {}
    for number, (path, size) in enumerate(sizes.items()):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        digests[path] = random_file(directory / path, size)
        os.utime(
            directory / path, (number, number)
        )  # nginx's ETag is time and size; the Hub's client goes by it
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


def case(model: Model, place: Path, runs: int, kind: str) -> list[dict[str, Any]]:
    """The rows of one model and sink."""
    failures: dict[str, str] = {}
    ways: dict[tuple[str, str], Callable[[], Run]] = {}
    once = set()
    with ExitStack() as undo:
        node = undo.enter_context(daemon(place / "cache", hf_endpoint=model.origin.url))
        ways["cachd", "verified"] = lambda: pulled(node, f"{model.origin.url}/{BUCKET}/")
        ways[CACHD_HUB, "verified"] = lambda: pulled(node, f"hf://{REPO}@{model.commit}")
        for peer in peers(model, place):
            for form in ("verified",) if model.big or peer.verifies else ("unverified", "verified"):
                key = peer.name, form
                if peer.missing:
                    failures[", ".join(key)] = "not installed"
                ways[key] = partial(fetched, model, peer, place / "got", form, sync=kind == "disk")
                if peer.slow:
                    once.add(", ".join(key))
        if not model.big:
            for what, shown in (("small", ASKED), ("small-library", LIBRARY)):
                for threads in ASKED_BY:
                    way = partial(asked, what, model, place / "got", threads, sync=kind == "disk")
                    ways[f"{shown}, threads: {threads}", "limit"] = way
        if model.big:
            ways[RECEIVED, "limit"] = partial(received, model, place)
            ways[HASHED, "limit"] = partial(limit, "sha256-all", sum(model.sizes.values()))
            ways[SHARD_EACH, "limit"] = partial(shards_alone, model, place / "got")
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
    """A way to fetch every file of a model into a directory; `at` is where the files are then, below it.

    One that is slow for this model runs once.
    """

    name: str
    fetch: Callable[[Path], Run]
    missing: bool = False
    verifies: bool = False
    slow: bool = False
    at: str = "."


def peers(model: Model, place: Path) -> list[Peer]:
    """Their lists are written to `place`."""
    base = f"{model.origin.url}/{BUCKET}"
    env = trust(model.origin)
    digests = model.digests
    plain, checked, config, commands = (place / name for name in ("plain", "checked", "config", "commands"))
    plain.write_text("".join(f"{base}/{path}\n  out={path}\n" for path in digests))
    lines = (f"{base}/{path}\n  out={path}\n  checksum=sha-256={hex_}\n" for path, hex_ in digests.items())
    checked.write_text("".join(lines))
    config.write_text("".join(f'url="{base}/{path}"\noutput="{path}"\n' for path in digests))
    commands.write_text("".join(f"cp s3://{BUCKET}/{path} {path}\n" for path in digests))
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
        Peer("aria2c -j16 --checksum", program(*aria2c, "-i", checked), gone["aria2c"], verifies=True),
        Peer("curl --parallel", program(*curl), gone["curl"]),
        Peer("s5cmd run", program(*s5cmd), gone["s5cmd"]),
        Peer(
            "hf_transfer, 8 files at once",
            library("hf_transfer_all", base, model.sums),
            no("hf_transfer"),
            slow=not model.big,
        ),
        Peer(
            HUB,
            library("snapshot_download", model.origin.url, REPO, model.commit),
            slow=model.big,
            at=hub_at,
        ),
    ]


def no(library: str) -> bool:
    return importlib.util.find_spec(library) is None


def fetched(model: Model, peer: Peer, target: Path, form: str, *, sync: bool) -> Run:
    """Fetch by `peer` in one form. The sizes of the files are checked outside the clock."""
    with directory(target):
        run = peer.fetch(target)
        if form == "verified" and not peer.verifies:
            run = run.then(hashed(model, target / peer.at))
        if sync:
            run = run.then(command("sync", "--file-system", target))
        for path, size in model.sizes.items():
            if (target / peer.at / path).stat().st_size != size:
                raise Failed(f"{peer.name} left another {path}")
        return run


@contextmanager
def directory(path: Path) -> Iterator[None]:
    """Made, and removed with all that came into it."""
    path.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(path)


def hashed(model: Model, directory: Path) -> Run:
    """The sha256 of every file on every core, compared with the list. Raises Failed."""
    at_once = 1 if model.big else 32
    script = 'cut -c67- "$0" | xargs -P "$1" -n "$2" openssl dgst -sha256 -r | LC_ALL=C sort -k2 | cmp - "$0"'
    return command("sh", "-c", script, model.sums, os.cpu_count(), at_once, cwd=directory)


def asked(what: str, model: Model, target: Path, threads: int, *, sync: bool) -> Run:
    """A limit of small files for one Python process: the requests a file takes, the system calls that make
    it durable and show it, and nothing else.
    """
    with directory(target):
        run = limit(what, f"{model.origin.url}/{BUCKET}", model.sums, threads, target)
        return run.then(command("sync", "--file-system", target)) if sync else run


def received(model: Model, place: Path) -> Run:
    """The raw limit for one shard; its CPU is that of both sides."""
    shard = next(iter(model.sizes))
    before = cpu_seconds(model.origin.pid)
    url = f"{model.origin.url}/{BUCKET}/{shard}"
    try:
        run = limit("recv+pwrite", url, model.sizes[shard], place / "limit")
    finally:
        (place / "limit").unlink(missing_ok=True)
    return Run(run.seconds, run.cpu_seconds + cpu_seconds(model.origin.pid) - before, run.anonymous_bytes)


def shards_alone(model: Model, target: Path) -> Run:
    """The limit of shards for one Python process: a thread at each, its bytes hashed where they came."""
    shards = {path: size for path, size in model.sizes.items() if size > MIB}
    with directory(target):
        return limit("shards", f"{model.origin.url}/{BUCKET}", max(shards.values()), target, *shards)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The named figures that the goals are judged by."""
    found: dict[str, float | None] = {}
    for measured in results["cases"]:
        rows = measured["rows"]
        ours = find(rows, "cachd", "verified")
        if not ours:
            continue
        if measured["model"] == "shards":
            allowed = cores_allow(results, measured)
            alone = find(rows, SHARD_EACH, "limit")
            speeds = {
                name: measured["size_bytes"] / median(of) / GB
                for name, of in (("shards", ours), ("shards limit", alone))
                if of
            }
            peers = [
                r for r in rows if r["form"] == "verified" and r["runs"] and not r["name"].startswith("cachd")
            ]
            fastest = min(map(median, peers), default=None)
            for name, speed in speeds.items():
                found[f"{name} / cores"] = allowed and speed / allowed
                found[f"{name} / fastest peer"] = fastest and fastest * GB * speed / measured["size_bytes"]
            continue
        hub = find(rows, CACHD_HUB, "verified")
        for name, peer, mine in (
            ("small / snapshot_download", HUB, hub and median(hub)),
            ("small / aria2c", "aria2c -j16", median(ours)),
            ("bare loop / aria2c", "aria2c -j16", fastest_loop(rows, ASKED)),
            ("library loop / aria2c", "aria2c -j16", fastest_loop(rows, LIBRARY)),
        ):
            theirs = find(rows, peer, "unverified")
            if theirs and mine:
                found[name] = min(found.get(name) or float("inf"), median(theirs) / mine)
        if measured["sink"] == "disk":
            verified = [find(rows, name, "verified") for name in ("aria2c -j16", "aria2c -j16 --checksum")]
            fastest = min((median(row) for row in verified if row), default=None)
            found["small durable / aria2c"] = fastest and fastest / median(ours)
    return {name: value for name, value in found.items() if value is not None}


def fastest_loop(rows: Any, name: str) -> float | None:
    """Seconds of the best number of threads."""
    return min((median(r) for r in rows if r["name"].startswith(name) and r["runs"]), default=None)


def cores_allow(results: dict[str, Any], measured: dict[str, Any]) -> float | None:
    """GB/s at which receiving, writing, hashing and the origin keep every core busy."""
    received, hashed = (find(measured["rows"], name, "limit") for name in (RECEIVED, HASHED))
    if not received or not hashed:
        return None
    needed = (
        median(received, "cpu_seconds") / measured["largest_bytes"]
        + median(hashed, "cpu_seconds") / measured["size_bytes"]
    )
    return float(results["cores"]) / needed / GB


def title(measured: dict[str, Any]) -> str:
    size = measured["size_bytes"] / MIB
    where = f"to {measured['sink']} ({measured['file_system']})"
    return f"cold pull of a model of {measured['files']} files, {size:,.0f} MiB, {where}"


LINES = ("", "form", "seconds", "CPU seconds", "memory, MB", "time against cachd's")


def cells(measured: dict[str, Any]) -> list[list[str]]:
    """The cells below `LINES`. A limit is given for the whole model."""
    lines = []
    ours = find(measured["rows"], "cachd", "verified")
    for found in measured["rows"]:
        if not found["runs"]:
            lines.append([found["name"], found["form"], found["note"] or "not measured", "", "", ""])
            continue
        whole = measured["size_bytes"] / measured["largest_bytes"] if found["name"] == RECEIVED else 1.0
        lines.append(
            [
                found["name"],
                found["form"],
                spread((run["seconds"] for run in found["runs"]), whole),
                spread((run["cpu_seconds"] for run in found["runs"]), whole),
                f"{max(run['anonymous_bytes'] for run in found['runs']) / MB:.0f}",
                f"{median(found) / median(ours):.2f} x" if ours and found["form"] != "limit" else "",
            ]
        )
    return lines


def below(results: dict[str, Any], measured: dict[str, Any]) -> str:
    """What the cores allow, and how near cachd comes."""
    allowed = cores_allow(results, measured)
    ours = find(measured["rows"], "cachd", "verified")
    bare, library = (fastest_loop(measured["rows"], name) for name in (ASKED, LIBRARY))
    if ours and bare and library:
        each = 1e6 * (median(ours) - bare) / measured["files"]
        return (
            f"A bare loop takes {bare:.2f} s, one by Python's own HTTP client, with a HEAD a file,"
            f" {library:.2f} s; cachd takes {each:.0f} µs a file more than the first: to ask for its size, to"
            " check what comes, to share it with other pulls, to go on after a failure."
        )
    if not allowed or not ours:
        return ""
    speed = measured["size_bytes"] / median(ours) / GB
    work = "receive, write, hash, serve"
    return f"{results['cores']} cores allow {allowed:.2f} GB/s ({work}); cachd: {speed:.2f}."


def table(results: dict[str, Any]) -> Group:
    parts: list[Any] = []
    for found in results["cases"]:
        parts += [report.table(title(found), LINES, cells(found)), below(results, found)]
    return Group(*filter(None, parts))


def markdown(results: dict[str, Any]) -> str:
    parts = []
    for found in results["cases"]:
        parts += [
            f"**{report.heading(title(found))}**",
            report.markdown(LINES, cells(found)),
            below(results, found),
        ]
    return "\n\n".join(filter(None, parts)) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    panels = {
        title(found): {
            f"{r['name']}, {r['form']}": [run["seconds"] for run in r["runs"]]
            for r in found["rows"]
            if r["runs"] and r["form"] != "limit"
        }
        for found in results["cases"]
    }
    report.bars(path, panels, "seconds")
