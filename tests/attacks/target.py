"""The daemon under attack: installed, with models that pods serve from, watched while it is attacked.

    with besieged(place, program, short=True) as target:
        verdict = target.tried(attack)

An attack is a function of the target, registered under its row of index.toml by `@attack(row)`. It does its
worst and asserts that what the row promises holds. Models that it pulls have names that begin with `attack`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.ground.hub import Hub
from tests.ground.models import noise, write_sha256sums
from tests.ground.node import Answer, Node
from tests.ground.origin import Origin
from tests.ground.rows import Rows
from tests.ground.site import until

MIB = 1 << 20
PATIENCE_SECONDS = 120.0
LEAST_SECONDS = 3.0  # so long the probes are asked during an attack, however soon it ends
LIMIT_BYTES = 256 * MIB  # of all models
PEAK_BYTES = 400 * MIB  # of the daemon's resident memory
TIMES_BARE, PLUS_SECONDS = 3.0, 0.05  # the bound of a probe's 99th percentile
TOKEN = "the-operator's-own-token"
TEAM_TOKEN = "the-token-of-an-admin-of-attack-team"
ROLE_TOKENS = {role: f"the-token-that-may-{role}" for role in ("read", "lease", "pull")}
TOKENS = [
    {"name": "operator", "role": "admin", "token": TOKEN},
    {
        "name": "team",
        "role": "admin",
        "token": TEAM_TOKEN,
        "namespaces": ["attack-team-*", "hf://attack-team/"],
    },
    *({"name": f"may-{role}", "role": role, "token": token} for role, token in ROLE_TOKENS.items()),
]
SERVED = "served"
Attack = Callable[["Target"], None]
ATTACKS = Rows[Attack]()
attack = ATTACKS.row  # registers what attacks as this row of index.toml says


@dataclass(frozen=True, slots=True)
class Probes:
    """The 99th percentile of each probe in seconds, and the answers that were not 200."""

    bare: float
    livez: float
    ready: float
    wrong: tuple[str, ...]

    @property
    def are_late(self) -> bool:
        bound = TIMES_BARE * self.bare + PLUS_SECONDS
        return max(self.livez, self.ready) > bound


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one attack. `failure`: what did not hold; empty when all did."""

    row: str
    failure: str
    peak_bytes: int
    probes: Probes
    seconds: float

    @property
    def held(self) -> bool:
        return not self.failure


@dataclass
class Target:
    """A daemon, the origins and the share within its reach. `short`: attack with less, and soon."""

    node: Node
    origin: Origin
    hub: Hub
    share: Path
    guarded: socket.socket  # listens at an address of which only the path /ok/ is allowed
    short: bool
    judges_time: bool = True
    standing: dict[str, Any] = field(default_factory=dict)

    # what attacks use

    def many(self, full: int) -> int:
        """So many of something: a tenth of it in the short form."""
        return full // 10 if self.short else full

    def dial(self) -> socket.socket:
        url = urlsplit(self.node.url)
        return socket.create_connection((url.hostname or "", url.port or 0), timeout=PATIENCE_SECONDS)

    def ask(
        self, method: str, path: str, body: object = None, *, token: str | None = None, **headers: str
    ) -> Answer:
        said = {"Authorization": f"Bearer {token}"} if token else {}
        return self.node.ask(method, path, body, headers={**said, **headers})

    def pull(self, ref: str, name: str, **asked: Any) -> Answer:
        """Ask for a model as a tenant who may pull."""
        return self.ask("POST", "/v1/models", {"ref": ref, "name": name, **asked}, token=TOKEN)

    def delete(self, name: str) -> Answer:
        return self.ask("DELETE", f"/v1/models/{name}?force=true", token=TOKEN)

    def outcome(self, ref: str, name: str) -> Answer:
        """The refusal of a pull, or what `/ready` says once it ended."""
        answer = self.pull(ref, name)
        return self.ended(name) if answer.status == 202 else answer

    def ended(self, name: str) -> Answer:
        """What `/ready` says once the pull ended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = self.ask("GET", f"/v1/models/{name}/ready?wait=10")
            if answer.status != 503 or time.monotonic() > deadline:
                return answer

    def another(self, name: str, env: Mapping[str, str] | None = None, **options: Any) -> Node:
        """Another daemon of the same program, not started: for attacks on what only a start reads. It is
        asked by no probe; the caller starts it (`with`), and its root is `node.root`."""
        plain = {key: self.node.options[key] for key in ("allow", "hf_endpoint")}
        root = self.node.root.parent / name
        return Node(
            root, {**plain, **options}, program=self.node.program, CACHD_LOG_LEVEL="info", **(env or {})
        )

    # what is judged

    def tried(self, row: str) -> Verdict:
        """Attack, and see what held."""
        self._forget_peak()
        began = time.monotonic()
        failures = []
        with self._probed() as probes:
            try:
                ATTACKS[row](self)
            except Exception as error:  # noqa: BLE001 - whatever did not hold
                failures.append(_told(error))
            self._clear()
        alive = self._is_alive()
        peak = self._peak() if alive else 0
        failures += [f"{self.node.output[-2000:]}\nthe daemon is dead"] * (not alive)
        failures += [f"peak memory {peak // MIB} MiB"] * (peak > PEAK_BYTES)
        failures += [f"{word}: {now}" for word, now in self._changed() if alive]
        failures += [f"a probe was answered {wrong!r}" for wrong in probes[0].wrong[:1]]
        failures += ["probes came late"] * (self.judges_time and probes[0].are_late)
        self.remember()  # what one attack broke is not told of the next
        return Verdict(row, "; ".join(failures), peak, probes[0], time.monotonic() - began)

    def remember(self) -> None:
        """Take what stands now as what every attack must leave alone."""
        self.standing = shown_in(self.node.root)

    def _changed(self) -> Iterator[tuple[str, str]]:
        now = shown_in(self.node.root)
        for name, shown in self.standing.items():
            if now.get(name) != shown:
                yield name, "is gone" if name not in now else "was moved"

    def _clear(self) -> None:
        """Delete what the attack brought."""
        with suppress(OSError, ValueError):
            for model in self.ask("GET", "/v1/models").document["models"]:
                if model["name"].startswith("attack"):
                    self.delete(model["name"])
        self.origin.clear()
        self.hub.clear()

    def _is_alive(self) -> bool:
        with suppress(OSError):
            return self.ask("GET", "/livez").status == 200
        return False

    def _forget_peak(self) -> None:
        Path(f"/proc/{self.node.pid}/clear_refs").write_text("5")

    def _peak(self) -> int:
        said = Path(f"/proc/{self.node.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", said)
        assert found
        return int(found[1]) << 10

    @contextmanager
    def _probed(self) -> Iterator[list[Probes]]:
        """Ask the probes meanwhile; the list holds what they took, afterwards."""
        port = str(urlsplit(self.node.url).port)
        command = [sys.executable, "-m", "tests.attacks.onlookers", port, SERVED]
        found: list[Probes] = []
        began = time.monotonic()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
            assert asking.stdout
            assert asking.stdin
            assert asking.stdout.readline() == "asking\n"
            yield found
            if self.judges_time:  # enough answers for a 99th percentile
                time.sleep(max(0.0, LEAST_SECONDS - (time.monotonic() - began)))
            asking.stdin.close()
            took = json.loads(asking.stdout.read())
        words = {word: _percentile(seconds) for word, (seconds, _) in took.items()}
        wrong = tuple(text for word in ("livez", "ready") for text in took[word][1])
        found.append(Probes(**words, wrong=wrong))


def outcome(target: Target, name: str) -> str:
    """The code that a pull failed with, `ready`, or `waiting` when its origin is to be asked again later."""

    def settled() -> str:
        shown = target.ask("GET", f"/v1/models/{name}").document
        if shown["state"] == "failed":
            return str(shown["pull"]["error"]["code"])
        waits = (shown["pull"] or {}).get("waits") or {}
        return "waiting" if waits.get("reason") == "origin" else shown["state"] * (shown["state"] == "ready")

    return until(settled)


def _percentile(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100)[-1] if len(seconds) > 1 else max(seconds, default=0.0)


def _told(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)
    line = next((f"{f.name}:{f.lineno}" for f in reversed(where) if "/attacks/by_" in f.filename), "")
    return f"{type(error).__name__} in {line}: {error}"[:600]


def shown_in(root: Path) -> dict[str, Any]:
    """What pods see of every ready model: its ready document and each file's inode, size and mode."""
    shown: dict[str, Any] = {}
    for ready in sorted((root / "ready").glob("*.json")):
        if ready.name.startswith("attack"):
            continue
        name = ready.name.removesuffix(".json")
        with suppress(FileNotFoundError):
            top = (root / "models" / name).resolve(strict=True)
            files = {str(p.relative_to(top)): p.stat() for p in sorted(top.rglob("*")) if p.is_file()}
            inodes = {path: (s.st_ino, s.st_size, s.st_mode) for path, s in files.items()}
            shown[name] = (json.loads(ready.read_text())["revision"], inodes)
    for ref in sorted((root / "hub").glob("*/refs/*")):
        if not ref.parent.parent.name.startswith("models--attack"):
            shown[str(ref.relative_to(root))] = ref.read_text()
    return shown


@contextmanager
def besieged(place: Path, program: Sequence[str], *, short: bool, judges_time: bool) -> Iterator[Target]:
    """A daemon with models of each kind, a limit that holds them and some more, and tokens of all roles."""
    share = place / "share"
    share.mkdir()
    (place / "tokens").write_text(json.dumps({"tokens": TOKENS}))
    with ExitStack() as stack:
        origin, hub = stack.enter_context(Origin()), stack.enter_context(Hub())
        guarded = stack.enter_context(socket.create_server(("127.0.0.2", 0)))
        options = {
            "allow": [
                "127.0.0.1/32",
                f"file://{share}/",
                f"http://127.0.0.2:{guarded.getsockname()[1]}/ok/",
            ],
            "token_file": str(place / "tokens"),
            "hf_endpoint": hub.url,
            "hub_listen": "127.0.0.1:0",
            "limit_bytes": LIMIT_BYTES,
            "keep_opened_seconds": 0,
            "log_level": "info",
        }
        node = Node(place / "root", options, program=program, CACHD_LOG_LEVEL="info")
        target = Target(stack.enter_context(node), origin, hub, share, guarded, short, judges_time)
        _furnish(target)
        target.remember()
        yield target


def _furnish(target: Target) -> None:
    """Pull what pods are served from: files, a repository, a model of many files."""
    for name in (SERVED, "kept-1", "kept-2", "kept-3"):
        target.pull(target.origin.add(f"/{name}", noise(8 * MIB, seed=len(name) + ord(name[-1]))), name)
    files = {"config.json": b'{"model_type": "bert"}', "model.safetensors": noise(6 * MIB, seed=6)}
    target.hub.add("org/model", files)
    target.pull("hf://org/model", "org--model", pin=True)
    many = target.share / "many"
    many.mkdir()
    for number in range(target.many(8000)):
        (many / f"{number:04}.txt").write_text(str(number))
    write_sha256sums(many)
    target.pull(f"file://{many}/", "many", hub_id="org/many")
    for name in (SERVED, "kept-1", "kept-2", "kept-3", "org--model", "many"):
        answer = target.ended(name)
        assert answer.status == 200, (name, answer)


def installed(place: Path, project: Path) -> list[str]:
    """The words that run cachd from an environment of its own, with the project installed in it."""
    environment = place / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip: list[str | Path] = [
        environment / "bin/python",
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
    ]
    subprocess.run([*pip, project], check=True, env={**os.environ, "PYTHONPATH": ""})
    os.sync()  # or the daemon's own syncs wait for what pip wrote
    return [str(environment / "bin/cachd")]
