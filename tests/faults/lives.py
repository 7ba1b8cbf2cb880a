"""One life of cachd over a root, with everything that changes the disk, and what the next life must find.

Everything is real but the API: the daemon's parts as `assembled` puts them together, in a forked child,
against origins in a process of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cachd.config import Config
from cachd.daemon.logs import configure_logs
from cachd.daemon.parts import Daemon, assembled
from cachd.errors import CachdError, NotFound
from cachd.model import ModelSpec, Ref
from cachd.report.models import Models
from tests.ground import mount
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.origin import (
    Fault,
    Flip,
    Gzip,
    IgnoreRange,
    Origin,
    Reply,
    Reset,
    Seen,
    Short,
    Status,
    TooLong,
    WrongRange,
)

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 120.0
SHARED = noise(MIB + 4321, 1)
CONTENTS: dict[str, dict[str, bytes]] = {
    "a": {"config.json": noise(300, 2), "small.bin": noise(90 * KIB, 3), "1.bin": noise(9 * MIB + 17, 4)},
    "b": {"config.json": noise(310, 5), "sub/dir/1.bin": noise(2 * MIB, 6), "empty": b""},
    "c": {"config.json": noise(320, 7), "model.safetensors": noise(MIB + 99, 8)},
    "d.bin": {"d.bin": noise(5 * MIB + 5, 9)},
}
CONTENTS["a"]["shared.bin"] = CONTENTS["b"]["shared.bin"] = SHARED
ORIGIN_FAULTS: dict[str, Fault] = {
    "reset": Reset(70 * KIB),
    "short body": Short(1000),
    "wrong range": WrongRange(3),
    "too long": TooLong(100),
    "503": Status(503, {"Retry-After": "0"}),
    "flipped bit": Flip(150),
    "whole file for a range": IgnoreRange(),
    "gzip": Gzip(),
}
Digests = dict[str, str]


@dataclass(frozen=True, slots=True)
class Counted(Fault):
    """Another fault, counted by its kind each time it met a request."""

    kind: str
    under: Fault
    counts: dict[str, int]

    def stored(self, file: Any) -> Any:
        self.counts[self.kind] = self.counts.get(self.kind, 0) + 1
        return self.under.stored(file)

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return self.under.reply(seen, reply)


class Origins:
    """The origins, in a process of their own: where they are, what they have sent, faults on request."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._told, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is an end here
        self.web, self.hub = self._told.recv()

    def ask(self, *words: Any) -> Any:
        self._told.send(words)
        return self._told.recv()

    def spoil(self, kind: str, times: int) -> None:
        """Let the next requests for bytes meet a fault."""
        self.ask("spoil", kind, times)

    def clear(self) -> None:
        self.ask("clear")

    def sent(self) -> int:
        return int(self.ask("sent"))

    def faults(self) -> dict[str, int]:
        """Faults that requests met, by kind."""
        return dict(self.ask("faults"))

    def close(self) -> None:
        self._told.close()
        self._process.join(PATIENCE_SECONDS)


def _spoilable(seen: Seen) -> bool:
    """A request for bytes, of a file whose digest its source publishes: no other could be told from a lie."""
    return "range" in seen.headers and seen.path != "/d.bin"


def _serve(told: Connection) -> None:
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # its clients are killed all the time
    counts: dict[str, int] = {}
    with Origin() as web, Hub() as hub:
        for model in ("a", "b"):
            for path, content in CONTENTS[model].items():
                web.add(f"/{model}/{path}", content)
            checksums = "".join(f"{_sha256(c)}  {p}\n" for p, c in CONTENTS[model].items())
            web.add(f"/{model}/SHA256SUMS", checksums.encode())
        web.add("/d.bin", CONTENTS["d.bin"]["d.bin"])
        hub.add("org/c", CONTENTS["c"])
        told.send((web.url, hub.url))
        while True:
            try:
                words = told.recv()
            except EOFError:
                return
            answer: object = None
            match words:
                case ("spoil", kind, times):
                    for server in (web, hub.cdn):
                        fault = Counted(kind, ORIGIN_FAULTS[kind], counts)
                        server.fault("*", fault, times, when=_spoilable)
                case ("clear",):
                    web.clear()
                    hub.cdn.clear()
                case ("sent",):
                    answer = web.bytes_sent() + hub.bytes_sent() + hub.cdn.bytes_sent()
                case ("faults",):
                    answer = dict(counts)
            told.send(answer)


@contextmanager
def opened(root: Path, origins: Origins) -> Iterator[Daemon]:
    """cachd's parts over `root`."""
    configure_logs("critical", "json")
    allow = ("127.0.0.0/8", "http://127.0.0.1/")
    options = {"streams": 3, "retries": 3, "pulls": 2, "hf_endpoint": origins.hub, "reserve_free": 0}
    with assembled(Config(root=root, allow=allow, **options)) as parts:
        yield parts


def specs(origins: Origins) -> dict[str, ModelSpec]:
    web = origins.web
    return {
        "a": ModelSpec(Ref.parse(f"{web}/a/"), "m"),
        "b": ModelSpec(Ref.parse(f"{web}/b/"), "m"),
        "c": ModelSpec(Ref.parse("hf://org/c"), "c"),
        "d.bin": ModelSpec(Ref.parse(f"{web}/d.bin"), "d.bin"),
    }


class Life:
    """What is done over and over; each step may fail with an error of cachd's, and with no other."""

    def __init__(
        self, parts: Daemon, origins: Origins, *, pulled: Callable[[str], None] = lambda _: None
    ) -> None:
        self._parts, self._specs, self._pulled = parts, specs(origins), pulled
        self.errors: list[CachdError] = []

    def run(self) -> None:
        """Every step once. Raises what is not one of cachd's own errors, with a reason."""
        pins = self._parts.store.pins
        self._step(self.resumed)
        self._step(lambda: self.pull("a"))
        self._step(lambda: pins.add("m"))
        self._step(lambda: self.pull("d.bin"))
        self._step(lambda: self.pull("c"))
        self._step(lambda: pins.remove("m"))
        self._step(lambda: self.pull("b"))
        self._step(lambda: self._parts.pulls.delete("d.bin", force=True))

    def resumed(self) -> None:
        """Go on with what an earlier life began, to its end; what fails then fails."""
        self._parts.pulls.resume()
        wait([running.done for running in self._parts.pulls.running()], PATIENCE_SECONDS)

    def pull(self, model: str) -> None:
        running = self._parts.pulls.start(self._specs[model], replace=True)
        if running is not None:
            running.done.result(PATIENCE_SECONDS)
        self._pulled(model)

    def _step(self, step: Any) -> None:
        try:
            step()
        except NotFound as error:
            self.errors.append(error)
        except CachdError as error:
            if error.code == "internal":
                raise
            self.errors.append(error)


def visible(root: Path, known: dict[str, Digests]) -> list[str]:
    """What a reader of `root` sees that is not true: each a line. `known`: what each manifest holds."""
    wrong = mount.wrong(root)
    for told in sorted((root / "ready").glob("[!.]*.json")):
        document = json.loads(told.read_bytes())
        tree = (root / "models" / told.stem).resolve()
        expected = known.get(document["manifest"])
        if expected is None or tree.name != document["manifest"]:
            wrong.append(f"{told.name} names {document['manifest']}, the link {tree.name}")
        elif (found := digests(tree)) != expected:
            wrong.append(f"{told.name} is ready, and {sorted(set(found.items()) ^ set(expected.items()))}")
    contents = {_sha256(content) for model in CONTENTS.values() for content in model.values()}
    shown = [*(root / "models/.trees").rglob("*"), *(root / "hub").glob("*/snapshots/**/*")]
    wrong += [
        f"{path.relative_to(root)} holds bytes that no origin has"
        for path in shown
        if path.is_file() and _sha256(path.read_bytes()) not in contents
    ]
    blobs = [path for path in (root / ".cachd/blobs/sha256").glob("*") if ".parts" not in path.name]
    return wrong + [
        f"blob {path.name} has another digest" for path in blobs if _sha256(path.read_bytes()) != path.name
    ]


def left_over(root: Path) -> list[str]:
    """Files that should not be there once every requested pull has ended.

    A blob that the reader had open when it was deleted stays in the trash until the next sweep.
    """
    places = ("ingest", "staging", "pending")
    found = [path for place in places for path in (root / ".cachd" / place).iterdir()]
    found += [path for path in (root / ".cachd/trash").iterdir() if not path.is_file()]
    blobs = [path for path in (root / ".cachd/blobs").glob("*/*") if path.suffix != ".parts"]
    found += [path for path in blobs if path.stat().st_nlink == 1]
    trees = {path.name for path in (root / "models/.trees").iterdir()}
    found += [path for path in (root / ".cachd/manifests").glob("*.json") if path.stem not in trees]
    return [f"{path.relative_to(root)} was left" for path in found] + mount.left_over(root)


def known_manifests(root: Path, model: str, known: dict[str, Digests]) -> None:
    """Learn which manifest stands for `model`, just pulled over `root`, from its ready file."""
    name = "m" if model in ("a", "b") else model
    document = json.loads((root / f"ready/{name}.json").read_bytes())
    known[document["manifest"]] = {path: _sha256(content) for path, content in CONTENTS[model].items()}


def digests(tree: Path) -> Digests:
    files = (path for path in tree.rglob("*") if path.is_file())
    return {str(path.relative_to(tree)): _sha256(path.read_bytes()) for path in files}


def states(parts: Daemon) -> dict[str, str]:
    models = Models(parts.store, parts.pulls, parts.scrubs, parts.warms)
    return {name: str(models.state(name)) for name in models.names()}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
