"""Simulates a day on a node: random pulls, opens, leases, pins and deletes on a disk that is too small.

The daemon is real, on a file system of its own (ext4 on a loop device). This process plays the pods and the
operators of the node: it maps files, takes leases, fills the disk, lowers the limit and kills the daemon. One
seed decides everything. The simulation collects what must never happen:

    reserve    free bytes fell below the reserve
    taken      a model was removed that was mapped, leased or pinned
    freed      an eviction freed other bytes than it was chosen for
    figures    at the end, a figure of cachd differs from du, statvfs or the files
"""

from __future__ import annotations

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
from itertools import accumulate
from pathlib import Path
from typing import Any

from tests.ground.figures import wrong_figures, wrong_models
from tests.ground.node import Node
from tests.ground.shelf import MIB, Model, Shelf

AT_ONCE = 3  # pulls under way, before there is another
PATIENCE_SECONDS = 60.0
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


class Day:
    """One simulation. `failures` lists what must never happen and did; `counts` counts everything else.

    Enter `set_up`, then call `live`, then `settle`. It is over 250 lines: each action is a method.
    """

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
        """Start the origin, the daemon, and the thread that watches the disk."""
        largest = self.size // 6
        self.shelf = stack.enter_context(Shelf(self.chance, largest))
        self.models = self.shelf.stock(largest)
        totals = list(accumulate(rank**-0.5 for rank in range(1, len(self.models) + 1)))
        self._popular: Callable[[], Model] = lambda: self.chance.choices(self.models, cum_weights=totals)[0]
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
            time.sleep(self.chance.uniform(0, 0.02))  # so the next thing meets any state of a pull

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
        with suppress(TimeoutError):  # the daemon may still be writing its own files
            wait_until(lambda: not wrong_figures(self.node, self.reserve), "every figure is right", seconds=5)
        ready = [model for model in self.models if self._is_ready(model)]
        self.failures += wrong_figures(self.node, self.reserve) + wrong_models(self.node, ready)

    def _pulling(self) -> list[str]:
        models = self.node.ask("GET", "/v1/models").document["models"]
        running = ("queued", "resolving", "downloading", "publishing")
        return [m["name"] for m in models if m["pull"] and m["pull"]["state"] in running]

    def _capacity(self) -> dict[str, Any]:
        told: dict[str, Any] = self.node.ask("GET", "/v1/capacity").document
        return told


def wait_until(what: Callable[[], bool], name: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Return once `what` is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain until {name}")
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
