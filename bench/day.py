"""A day on a node: random pulls, opens, leases, pins and deletes on a disk that is too small for all of them.

The real daemon on a file system of its own (ext4 on a loop device), an origin on loopback, and this process
as the pods and operators of the node: it maps files, takes leases, fills the disk with files of its own,
lowers the limit, kills the daemon. Everything comes from one seed. What must never happen is counted:

    reserve    free bytes fell below the reserve
    taken      a model went that was mapped, leased or pinned
    freed      an eviction freed other than what it was chosen for
    figures    at the end, a figure of cachd is not what du, statvfs or the files say

A day of requests is pressed into minutes: the policy's clock runs as the wall's, only more happens in it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.measure import MIB, Failed
from bench.report import Options
from tests.ground.node import Node
from tests.ground.origin import Content, File, Origin, Patched

SEED = 20_26
FULL_ACTIONS, QUICK_ACTIONS = 2000, 150
AT_ONCE = 3  # pulls under way, before there is another
PATIENCE_SECONDS = 60.0
MODELS = 40
RESERVE = 64  # of the disk's parts, one stays free
WEIGHTS = {
    "pull": 40,
    "open": 20,
    "close": 18,
    "lease": 8,
    "release": 5,
    "pin": 2,
    "unpin": 3,
    "delete": 3,
    "fill": 5,
    "clear": 4,
    "limit": 2,
    "evict": 2,
    "kill": 1,
}


@dataclass
class Model:
    """One of the origin's models: files as (path, content, sha256)."""

    name: str
    ref: str
    files: Sequence[tuple[str, Content, str]]
    mapped: list[mmap.mmap] = field(default_factory=list)
    leases: dict[str, float] = field(default_factory=dict)  # id -> until when it surely holds
    pinned: bool = False

    @property
    def size(self) -> int:
        return sum(content.size for _, content, _ in self.files)

    def is_protected(self) -> bool:
        now = time.time()
        return bool(self.mapped) or self.pinned or any(until > now for until in self.leases.values())


@dataclass(frozen=True, slots=True)
class Slice:
    """`size` bytes of `held` from `first` on, never copied as a whole."""

    held: bytes
    first: int
    size: int

    def read(self, start: int, stop: int) -> bytes:
        return self.held[self.first + start : self.first + min(stop, self.size)]


class Shelf(Origin):
    """An origin of models whose bytes are a common noise with a head of their own: made without a disk."""

    def __init__(self, chance: random.Random, most: int) -> None:
        super().__init__()
        self._chance = chance
        self._noise = b"".join(chance.randbytes(MIB) for _ in range(-(-most // MIB) + 1))

    def content(self, size: int) -> Content:
        common = Slice(self._noise, self._chance.randrange(MIB), size)
        return Patched(common, 0, self._chance.randbytes(64))

    def hold_model(self, name: str, files: dict[str, Content]) -> Model:
        held = [(path, content, sha256_of(content)) for path, content in files.items()]
        for path, content, digest in held:
            self._files[f"/{name}/{path}"] = File(content, f'"{digest[:32]}"')
        sums = "".join(f"{digest}  {path}\n" for path, _, digest in held)
        self.add(f"/{name}/SHA256SUMS", sums.encode())
        return Model(name, f"{self.url}/{name}/", held)


def sha256_of(content: Content) -> str:
    digest = hashlib.sha256()
    for at in range(0, content.size, 8 * MIB):
        digest.update(content.read(at, min(at + 8 * MIB, content.size)))
    return digest.hexdigest()


class Day:
    """One run: `failures` is what must not happen, `counts` what did."""

    def __init__(self, place: Path, size: int, seed: int) -> None:
        self.size, self.chance = size, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.disk = place / "disk"
        self.reserve = size // RESERVE
        self.least = 1 << 62
        self._lock = threading.Lock()  # one thing at a time: an action, or a look at what is protected
        self._stop = threading.Event()
        self._asked: dict[str, float] = {}  # model -> when it was last asked for
        self._evictions: dict[tuple[str, str], dict[str, Any]] = {}

    # --- the node ---

    @contextmanager
    def set_up(self, stack: ExitStack) -> Iterator[None]:
        largest = self.size // 6
        self.shelf = stack.enter_context(Shelf(self.chance, largest))
        self.models = self._models(largest)
        totals = list(accumulate(rank**-0.5 for rank in range(1, len(self.models) + 1)))
        self._popular = lambda: self.chance.choices(self.models, cum_weights=totals)[0]
        options = {
            "allow": [f"{self.shelf.url}/"],
            "reserve_free": self.reserve,
            "retries": 2,
            "streams": 8,
            "limit_bytes": self.size,
            "keep_opened_seconds": 0,  # a day is over in less than its default
        }
        self.node = stack.enter_context(Node(self.disk / "root", options, CACHD_LOG_LEVEL="info"))
        watching = threading.Thread(target=self._watch)
        watching.start()
        try:
            yield
        finally:
            self._stop.set()
            watching.join()

    def _models(self, largest: int) -> list[Model]:
        """Three times the disk in all; every fourth shares its larger file with another."""
        made: list[Model] = []
        for number in range(MODELS):
            size = int(largest * 2 ** self.chance.uniform(-3, 0))
            files = {"config.json": self.shelf.content(4096 + number), "a.bin": self.shelf.content(size // 3)}
            if number % 4 == 3:
                files["b.bin"] = next(c for path, c, _ in made[-1].files if path == "b.bin")
            else:
                files["b.bin"] = self.shelf.content(size - size // 3)
            made.append(self.shelf.hold_model(f"m{number:02d}", files))
        self.chance.shuffle(made)
        return made

    def _watch(self) -> None:
        """Look at the disk all the time, and now and then at whatever is protected."""
        turn = 0
        while not self._stop.wait(0.002):
            found = os.statvfs(self.disk)
            free = found.f_bavail * found.f_frsize
            self.least = min(self.least, free - self.reserve)
            if free < self.reserve:
                self.failures.append(f"reserve: {free} bytes free, {self.reserve} are to stay")
            turn += 1
            if turn % 25 == 0:
                with self._lock:
                    self._check_protected()

    def _check_protected(self) -> None:
        for model in self.models:
            if model.is_protected() and not self._is_ready(model):
                self.failures.append(f"taken: {model.name} went while it was protected")
                model.mapped, model.leases, model.pinned = [], {}, False

    def _is_ready(self, model: Model) -> bool:
        return (self.node.root / f"ready/{model.name}.json").exists()

    # --- what happens ---

    def live(self, actions: int) -> None:
        """Do so many things at random."""
        names = list(WEIGHTS)
        for _ in range(actions):
            (action,) = self.chance.choices(names, list(WEIGHTS.values()))
            if action == "pull":
                wait_until(lambda: len(self._pulling()) < AT_ONCE, "fewer pulls run")
            with self._lock:
                done = getattr(self, f"_{action}")()
            self.counts[action if done is not False else f"{action}, refused"] += 1
            self._note_evictions()
            time.sleep(self.chance.uniform(0, 0.02))

    def _ready(self) -> Model | None:
        ready = [m for m in self.models if self._is_ready(m)]
        return self.chance.choice(ready) if ready else None

    def _protected(self) -> list[Model]:
        return [m for m in self.models if m.is_protected()]

    def _pull(self) -> bool:
        model = self._popular()
        priority = self.chance.choice((0, 0, 0, 10))
        self._asked[model.name] = time.monotonic()
        return self.node.pull(model.ref, name=model.name, priority=priority).status in (200, 202)

    def _open(self) -> bool:
        """As a pod: see the ready file, open, map, close. Then it may not go any more."""
        model = self._ready()
        if model is None or len([m for m in self.models if m.mapped]) > 4:
            return False
        with suppress(FileNotFoundError):
            for path, _, _ in model.files:
                with (self.node.root / f"models/{model.name}/{path}").open("rb") as opened:
                    model.mapped.append(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ))
            if self._is_ready(model):
                return True
        model.mapped = []  # it went before it was open: a pod would start over
        return False

    def _close(self) -> bool:
        mapped = [m for m in self.models if m.mapped]
        if mapped:
            model = self.chance.choice(mapped)
            for (_, content, _), seen in zip(model.files, model.mapped, strict=False):
                at = self.chance.randrange(content.size)
                if seen[at : at + 4096] != content.read(at, min(at + 4096, content.size)):
                    self.failures.append(f"figures: {model.name} is mapped and has changed")
            model.mapped = []
        return bool(mapped)

    def _lease(self) -> bool:
        model = self._ready()
        if model is None:
            return False
        seconds = self.chance.uniform(0.5, 4)
        began = time.time()
        answer = self.node.ask(
            "POST", f"/v1/models/{model.name}/leases", {"seconds": seconds, "holder": "day"}
        )
        if answer.status != 201:
            return False
        if self._is_ready(model):
            model.leases[answer.document["id"]] = began + seconds
        return True

    def _release(self) -> bool:
        held = [(m, lease) for m in self.models for lease in m.leases]
        if held:
            model, lease = self.chance.choice(held)
            del model.leases[lease]
            self.node.ask("DELETE", f"/v1/models/{model.name}/leases/{lease}")
        return bool(held)

    def _pin(self) -> bool:
        model = self._ready()
        if sum(m.pinned for m in self.models) >= 2 or model is None:
            return False
        if self.node.ask("PUT", f"/v1/models/{model.name}/pin").status != 204:
            return False
        model.pinned = self._is_ready(model)
        return True

    def _unpin(self) -> bool:
        pinned = [m for m in self.models if m.pinned]
        if pinned:
            model = self.chance.choice(pinned)
            model.pinned = False
            self.node.ask("DELETE", f"/v1/models/{model.name}/pin")
        return bool(pinned)

    def _delete(self) -> bool:
        """Now and then by force, and then what is mapped stays readable and taken."""
        model = self.chance.choice(self.models)
        protected = model.is_protected()
        force = self.chance.random() < 0.3
        if force:
            model.leases, model.pinned = {}, False
        kept, model.mapped = model.mapped, [] if force else model.mapped
        answer = self.node.ask("DELETE", f"/v1/models/{model.name}?force={str(force).lower()}")
        del kept
        if answer.status == 200 and protected and not force:
            self.failures.append(f"taken: {model.name} was deleted while it was protected")
        return answer.status == 200

    def _fill(self) -> bool:
        """Another process takes room, itself keeping well above the reserve."""
        found = os.statvfs(self.disk)
        most = found.f_bavail * found.f_frsize - self.reserve - self.size // 5
        if most < MIB:
            return False
        with (self.disk / f"foreign-{self.chance.randrange(10**9)}").open("wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, self.chance.randint(MIB, min(most, self.size // 6)))
        return True

    def _clear(self) -> bool:
        foreign = sorted(self.disk.glob("foreign-*"))
        if foreign:
            self.chance.choice(foreign).unlink()
        return bool(foreign)

    def _limit(self) -> bool:
        limit = self.chance.choice((self.size, self.size * 3 // 4, self.size // 2))
        self.node.configure(**{**self.node.options, "limit_bytes": limit})
        return True

    def _evict(self) -> bool:
        wanted = self.size // self.chance.randrange(4, 16)
        planned = self.node.ask("POST", "/v1/evictions?dry_run=true", {"bytes": wanted})
        protected = {m.name for m in self._protected()}
        going = {name for e in planned.document["evictions"] for name in e["names"]}
        if going & protected:
            self.failures.append(f"taken: {going & protected} would go while protected")
        return self.node.ask("POST", "/v1/evictions", {"bytes": wanted}).status == 200

    def _kill(self) -> bool:
        self._note_evictions()
        self.node.kill()
        self._evictions.clear()
        self.node.start()
        return True

    def _note_evictions(self) -> None:
        for told in self.node.ask("GET", "/v1/evictions").document["evictions"]:
            key = told["at"], told["manifest"]
            if key not in self._evictions:
                self._evictions[key] = told
                self.counts[f"evicted, {told['reason']}"] += 1
                self.counts["bytes freed"] += told["freed_bytes"]
                if told["freed_bytes"] != told["frees_bytes"] and not self._came_back(told["names"]):
                    self.failures.append(f"freed: {told}")
                if not told["why"]:
                    self.failures.append(f"freed: {told['manifest']} without a reason")

    def _came_back(self, names: Sequence[str]) -> bool:
        """Whether a pull has just come for files of a model, which then stay though it goes."""
        digests = {digest for m in self.models if m.name in names for _, _, digest in m.files}
        lately = time.monotonic() - 5
        return any(
            self._asked.get(m.name, 0) > lately and digests & {digest for _, _, digest in m.files}
            for m in self.models
        )

    # --- the end ---

    def settle(self) -> None:
        """Let go of everything, wait for the pulls, and compare every figure."""
        with self._lock:
            for model in self.models:
                if model.pinned:
                    self.node.ask("DELETE", f"/v1/models/{model.name}/pin")
                model.mapped, model.leases, model.pinned = [], {}, False
            for foreign in self.disk.glob("foreign-*"):
                foreign.unlink()
        self.node.configure(**{**self.node.options, "limit_bytes": self.size})
        wait_until(lambda: not self._pulling(), "the pulls end")
        wait_until(lambda: not self._capacity()["held_bytes"], "what was deleted comes free")
        wait_until(lambda: not self.node.metric("cachd_leases"), "the leases expire")
        self._note_evictions()
        self._stop.set()
        with suppress(Failed):  # the daemon may be writing what it remembers: the figures settle, too
            wait_until(lambda: not self._wrong_figures(), "every figure is right", seconds=5)
        self.failures += self._wrong_figures()
        self._compare_models()

    def _pulling(self) -> list[str]:
        models = self.node.ask("GET", "/v1/models").document["models"]
        running = ("queued", "resolving", "downloading", "publishing")
        return [m["name"] for m in models if m["pull"] and m["pull"]["state"] in running]

    def _capacity(self) -> dict[str, Any]:
        told: dict[str, Any] = self.node.ask("GET", "/v1/capacity").document
        return told

    def _wrong_figures(self) -> list[str]:
        """Each figure of the API and the metrics that is not what the system says."""
        told, private = self._capacity(), self.node.root / ".cachd"
        metrics = ("cache_size_bytes", "fs_free_bytes", "held_bytes", "reserved_bytes")
        told |= {name: self.node.metric(f"cachd_{name}") for name in metrics}
        found = os.statvfs(self.disk)
        free = found.f_bavail * found.f_frsize
        blobs, ingests = allocated(private / "blobs"), allocated(private / "ingest")
        expected = {
            "total_bytes": found.f_blocks * found.f_frsize,
            "free_bytes": free,
            "free_inodes": found.f_favail,
            "blob_bytes": blobs,
            "ingest_bytes": ingests,
            "used_bytes": blobs + ingests,
            "held_bytes": 0,
            "reserved_bytes": 0,
            "reserve_free_bytes": self.reserve,
            "cache_size_bytes": blobs,
            "fs_free_bytes": free,
        }
        return [
            f"figures: {name} is told as {told[name]}, found {value}"
            for name, value in expected.items()
            if told[name] != value
        ]

    def _compare_models(self) -> None:
        """What is ready is whole; what pulls that failed left is told."""
        private = self.node.root / ".cachd"
        ready = [model for model in self.models if self._is_ready(model)]
        expected = {digest: content.size for model in ready for _, content, digest in model.files}
        here = {path.name for path in (private / "blobs").rglob("*") if path.is_file()}
        if absent := expected.keys() - here:
            self.failures.append(f"figures: {len(absent)} blobs of ready models are not on disk")
        self.counts["blobs of no ready model at the end"] = len(here - expected.keys())
        taken, size = allocated(private / "blobs"), sum(expected.values())
        if taken < size:
            self.failures.append(f"figures: blobs take {taken} bytes, ready models have {size}")
        for model in ready:
            self._compare_files(model)

    def _compare_files(self, model: Model) -> None:
        for path, _, digest in model.files:
            with (self.node.root / f"models/{model.name}/{path}").open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                    self.failures.append(f"figures: {model.name}/{path} is not what was pulled")
        self.counts["ready at the end"] += 1


def allocated(directory: Path) -> int:
    """Bytes of disk in the files below, each inode once, as du counts them."""
    seen: dict[int, int] = {}
    for at, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(at, name))
            seen[status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def wait_until(what: Callable[[], bool], name: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise Failed(f"waited in vain until {name}")
        time.sleep(0.05)


@contextmanager
def loop_disk(place: Path, size: int) -> Iterator[Path]:
    """An empty ext4 file system of `size` bytes on a loop device, below `place`."""
    image, disk = place / "image", place / "disk"
    disk.mkdir()
    image.touch()
    os.truncate(image, size)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    try:
        disk.chmod(0o755)
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # a day that failed may still map files
        image.unlink()


def simulated(size: int, actions: int, seed: int) -> dict[str, Any]:
    """One day of so many actions on a disk of `size` bytes."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="day-") as name, ExitStack() as stack:
        place = Path(name)
        place.chmod(0o755)
        stack.enter_context(loop_disk(place, size))
        day = Day(place, size, seed)
        with day.set_up(stack):
            day.live(actions)
            day.settle()
        return {
            "disk_bytes": size,
            "models_bytes": sum(model.size for model in day.models),
            "actions": actions,
            "seconds": time.monotonic() - began,
            "seed": seed,
            "least_above_reserve_bytes": day.least,
            "counts": dict(sorted(day.counts.items())),
            "failures": day.failures,
        }


# --- as a question of python -m bench ---


def run(options: Options) -> dict[str, Any]:
    size = options.size_bytes or (128 if options.quick else 2048) * MIB
    actions = QUICK_ACTIONS if options.quick else FULL_ACTIONS
    days = [simulated(size, actions, SEED + turn) for turn in range(options.runs or 1)]
    return report.head("day", options, days=days)


def figures(results: dict[str, Any]) -> dict[str, float]:
    return {"what must not happen": float(sum(len(day["failures"]) for day in results["days"]))}


COLUMNS = ("", "times")


def cells(results: dict[str, Any]) -> list[list[str]]:
    counts: Counter[str] = Counter()
    for day in results["days"]:
        counts.update(day["counts"])
    rows = [[name, str(count)] for name, count in sorted(counts.items())]
    least = min(day["least_above_reserve_bytes"] for day in results["days"])
    failures = [failure for day in results["days"] for failure in day["failures"]]
    return [*rows, ["least free above the reserve, bytes", str(least)], *([f, "!"] for f in failures)]


def table(results: dict[str, Any]) -> Table:
    return report.table("A day on a node", COLUMNS, cells(results))


def markdown(results: dict[str, Any]) -> str:
    return report.markdown(COLUMNS, cells(results))


def plot(results: dict[str, Any], path: Path) -> None:
    counts = {name: [float(n)] for name, n in results["days"][0]["counts"].items() if "bytes" not in name}
    report.bars(path, {"what happened": counts}, "times")
