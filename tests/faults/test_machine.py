"""Whatever is asked of a node, in whatever order, kills between: what a plain model says is what is there.

The model knows for each name what is ready, what is on its way and held by its origin, what failed and what
is pinned; after every step the API, the disk and the counters of a real daemon must agree with it, and
every byte that a ready file vouches for must be right.

A longer search: CACHD_MACHINE_EXAMPLES=500 CACHD_MACHINE_STEPS=60 pytest tests/faults/test_machine.py
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.ground import mount
from tests.ground.models import digests, noise
from tests.ground.node import Answer, Node
from tests.ground.origin import Hold, Origin, Status
from tests.ground.site import until

EXAMPLES = int(os.environ.get("CACHD_MACHINE_EXAMPLES", "8"))
STEPS = int(os.environ.get("CACHD_MACHINE_STEPS", "30"))
PATIENCE_SECONDS = 120
NAMES = ("red", "green", "blue")
SHARED = {"shared.bin": noise(300_000, 7), "small.bin": noise(2000, 8)}  # in each model and revision
OWN_BYTES = 500_000

Digests = dict[str, str]  # sha256 by path


@dataclass(frozen=True)
class Held:
    """A model at one revision, as the origin has it: what a name is when it is ready."""

    model: str
    revision: int

    @property
    def files(self) -> dict[str, bytes]:
        own = noise(OWN_BYTES, seed=1000 * ord(self.model) + self.revision)
        return {**SHARED, "own.bin": own}

    @property
    def digests(self) -> Digests:
        return {path: hashlib.sha256(content).hexdigest() for path, content in self.files.items()}


@dataclass
class Expected:
    """What must be true of one name."""

    ready: Held | None = None
    running: Held | None = None
    failed: Held | None = None
    pinned: bool = False

    @property
    def owner(self) -> Held | None:
        """What the name is, or becomes, and nothing else without `replace`."""
        return self.running or self.ready or (self.failed if self.pinned else None)

    @property
    def state(self) -> str:
        if self.ready:
            return "ready"
        return "running" if self.running else "failed" if self.failed else "unknown"


@dataclass
class Model:
    """What must be true of the node. `counted` is since the daemon's last start."""

    names: dict[str, Expected] = field(default_factory=lambda: {name: Expected() for name in NAMES})
    left: set[Held] = field(default_factory=set)  # replaced while it was read or asked for again
    has_orphans: bool = False  # a failed pull was forgotten, and what it shared or began is still there
    counted: Counter[str] = field(default_factory=Counter)

    def forget_failure(self, name: str) -> None:
        """What a pull of the name left when it failed is nobody's from now on."""
        self.has_orphans |= self.names[name].failed is not None
        self.names[name].failed = None


class Machine(RuleBasedStateMachine):
    """One daemon over one root, one origin of two models, and the model of what must be true."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.revisions = dict.fromkeys(("a", "b"), 0)
        self.broken: set[str] = set()
        self.holds: dict[str, Hold] = {}
        self.readers: dict[str, int] = {}  # open descriptors of a file of a ready name's model
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.place = tempfile.TemporaryDirectory(dir=memory)
        self.origin = Origin().__enter__()
        options = {"streams": 4, "pulls": 4, "retries": 0, "keep_previous": 0, "keep_opened_seconds": 0}
        self.node = Node(Path(self.place.name) / "node", options)

    @initialize()
    def start(self) -> None:
        self.node.__enter__()
        for model in self.revisions:
            self.offer(model)

    def teardown(self) -> None:
        for reader in self.readers.values():
            os.close(reader)
        self.node.__exit__()
        self.origin.stop()
        self.place.cleanup()

    # --- the origin ---

    def offer(self, model: str) -> None:
        """Let the origin hold the model at its revision."""
        self.origin.add_model(model, Held(model, self.revisions[model]).files)

    def ref(self, model: str) -> str:
        return f"{self.origin.url}/{model}/"

    def now(self, model: str) -> Held:
        return Held(model, self.revisions[model])

    @rule(model=st.sampled_from("ab"))
    def move(self, model: str) -> None:
        """The source publishes another revision; nobody asked yet."""
        if not self.on_its_way(model):
            self.revisions[model] += 1
            self.offer(model)

    @rule(model=st.sampled_from("ab"))
    def hold(self, model: str) -> None:
        """From now on the model's pulls stop in the middle of its own file."""
        if model not in self.holds and model not in self.broken:
            self.holds[model] = self.origin.hold(f"/{model}/own.bin", after=1000)

    @precondition(lambda self: self.holds)
    @rule()
    def release(self) -> None:
        """What was held goes on, and becomes ready."""
        for hold in self.holds.values():
            hold.release()
        self.origin._holds.clear()
        self.holds = {}
        ended = {name: e.running for name, e in self.model.names.items() if e.running}
        for name, new in ended.items():
            self.become_ready(name, new)
        self.settle()
        if ended:
            self.sweep()

    @rule(model=st.sampled_from("ab"))
    def break_off(self, model: str) -> None:
        """The origin loses the model's own file; at the next time it has it again."""
        path = f"/{model}/own.bin"
        if model in self.broken:
            self.broken.discard(model)
            self.origin.clear()
            for other in self.broken:
                self.origin.fault(f"/{other}/own.bin", Status(404))
        elif model not in self.holds:
            self.broken.add(model)
            self.origin.fault(path, Status(404))

    # --- callers ---

    @rule(
        name=st.sampled_from(NAMES),
        model=st.sampled_from("ab"),
        refresh=st.booleans(),
        replace=st.booleans(),
    )
    def pull(self, name: str, model: str, refresh: bool, replace: bool) -> None:
        """Ask for a model under a name: one that has it, one that has another, one that has none."""
        answer = self.node.pull(self.ref(model), name=name, refresh=refresh, replace=replace)
        self.asked(name, model, [answer], refresh=refresh, replace=replace)

    @rule(name=st.sampled_from(NAMES), model=st.sampled_from("ab"))
    def crowd(self, name: str, model: str) -> None:
        """Several clients ask for the same at once."""
        with ThreadPoolExecutor(4) as clients:
            asking = [clients.submit(self.node.pull, self.ref(model), name=name) for _ in range(4)]
        self.asked(name, model, [answer.result() for answer in asking])

    def asked(
        self, name: str, model: str, answers: list[Answer], *, refresh: bool = False, replace: bool = False
    ) -> None:
        expected, count = self.model.names[name], self.model.counted
        codes = [answer.status for answer in answers]
        if expected.running and expected.running.model == model:
            assert codes == [202] * len(answers), answers
            count["joins"] += len(answers)
            return
        owner, stays = expected.owner, expected.pinned and expected.ready and refresh
        if owner and (owner.model != model or stays) and not replace:
            assert [answer.document.get("code") for answer in answers] == ["name_taken"] * len(answers)
            return
        if expected.running:  # it ends without what it was for
            self.model.has_orphans, expected.running = True, None
        if expected.ready and expected.ready.model == model and not refresh:
            assert codes == [200] * len(answers), answers
            count["hits"] += len(answers)
            self.model.forget_failure(name)
            self.settle()
            return
        assert 202 in codes, answers
        assert set(codes) <= {200, 202}, answers
        count["misses"] += 1
        count["joins or hits"] += len(answers) - 1
        new = self.now(model)
        self.model.forget_failure(name)
        fetched = not self.is_here(new)
        if fetched and model in self.broken:
            expected.failed = new
        elif fetched and model in self.holds:
            expected.running = new
            assert self.holds[model].reached.wait(PATIENCE_SECONDS)
            self.wait_until_downloading(name)
        else:
            self.become_ready(name, new)
        self.settle()
        if expected.ready == new:
            self.sweep()

    @rule(name=st.sampled_from(NAMES), force=st.booleans())
    def delete(self, name: str, force: bool) -> None:
        """Cancel, withdraw and free a name."""
        expected, is_read = self.model.names[name], self.is_read(name)
        answer = self.node.ask("DELETE", f"/v1/models/{name}?force={str(force).lower()}")
        if expected.state == "unknown":
            assert answer.status == 404, answer
        elif not force and (expected.pinned or is_read):
            assert answer.status == 409, answer
        else:
            assert answer.status == 200, answer
            self.model.names[name] = Expected()

    @rule(name=st.sampled_from(NAMES))
    def pin(self, name: str) -> None:
        expected = self.model.names[name]
        known = expected.state != "unknown"
        assert self.node.ask("PUT", f"/v1/models/{name}/pin").status == (204 if known else 404)
        expected.pinned |= known

    @rule(name=st.sampled_from(NAMES))
    def unpin(self, name: str) -> None:
        expected = self.model.names[name]
        known = expected.state != "unknown"
        assert self.node.ask("DELETE", f"/v1/models/{name}/pin").status == (204 if known else 404)
        expected.pinned &= not known

    @rule(name=st.sampled_from(NAMES))
    def read(self, name: str) -> None:
        """A pod opens a file of a ready model, or the one that has it open ends."""
        if name in self.readers:
            os.close(self.readers.pop(name))
            until(lambda: not self.trash())  # what was deleted meanwhile
        elif self.model.names[name].ready:
            self.readers[name] = os.open(self.node.root / f"models/{name}/own.bin", os.O_RDONLY)

    # Here come `verify`, `sweep` and `evict`, once the API has them.

    # --- the node ---

    @rule(how=st.sampled_from(["stop", "kill", "kill", "kill"]))
    def restart(self, how: str) -> None:
        """The daemon ends, in order or not, and starts again: pulls go on, failures are shown still."""
        if how == "stop":
            assert self.node.stop() == 0
            assert "Traceback" not in self.node.output
        else:
            self.node.kill()
        for hold in self.holds.values():
            hold.reached.clear()
        self.node.start()
        self.model.counted.clear()
        for name, expected in self.model.names.items():
            if expected.running:
                self.model.counted["misses"] += 1
                assert self.holds[expected.running.model].reached.wait(PATIENCE_SECONDS), name
                self.wait_until_downloading(name)
        self.sweep()

    # --- what follows from a step ---

    def on_its_way(self, model: str) -> bool:
        return any(e.running and e.running.model == model for e in self.model.names.values())

    def is_here(self, wanted: Held) -> bool:
        """Whether the file that its origin may hold or have lost is on the disk already."""
        return self.own(wanted).exists()

    def own(self, held: Held) -> Path:
        return self.node.root / ".cachd/blobs/sha256" / held.digests["own.bin"]

    def is_read(self, name: str) -> bool:
        """Whether the daemon must see that a pod has a file of the name's model open."""
        ready = self.model.names[name].ready
        shared = sum(e.ready == ready for e in self.model.names.values()) > 1
        return ready is not None and not shared and self.is_open(ready)

    def is_open(self, held: Held) -> bool:
        return self.is_held(self.own(held))

    def is_held(self, path: Path) -> bool:
        """Whether a pod has the file open."""
        with suppress(FileNotFoundError):
            there = path.stat()
            return any(os.path.samestat(os.fstat(reader), there) for reader in self.readers.values())
        return False

    def trash(self) -> list[Path]:
        """What was deleted and is still there, but for what a pod has open."""
        return [path for path in (self.node.root / ".cachd/trash").iterdir() if not self.is_held(path)]

    def wait_until_downloading(self, name: str) -> None:
        def state() -> object:
            pull = self.node.ask("GET", f"/v1/models/{name}").document["pull"]
            return pull and pull["state"]

        until(lambda: state() == "downloading")

    def become_ready(self, name: str, new: Held) -> None:
        expected = self.model.names[name]
        if expected.ready and expected.ready != new:
            self.model.left.add(expected.ready)
        expected.ready, expected.running, expected.failed = new, None, None

    def settle(self) -> None:
        """Wait until no more pulls are at work than are held."""
        running = sum(e.running is not None for e in self.model.names.values())

        def states() -> list[str]:
            shown = self.node.ask("GET", "/v1/models").document["models"]
            return [m["pull"]["state"] for m in shown if m["pull"]]

        until(lambda: len(set(states()) & {"queued", "resolving", "publishing"}) == 0)
        until(lambda: states().count("downloading") == running)
        until(lambda: self.node.metric("cachd_pulls_in_progress") == running)

    def sweep(self) -> None:
        """What the daemon does after each pull and at its start: remove what no name has and nobody reads."""
        named = {e.ready for e in self.model.names.values()}
        self.model.left = {
            held for held in self.model.left if (self.is_open(held) or self.on_its_way(held.model))
        } - named

    # --- what must be true ---

    @invariant()
    def the_api_says_what_is_true(self) -> None:
        told = {m["name"]: m for m in self.node.ask("GET", "/v1/models").document["models"]}
        known = {name: e for name, e in self.model.names.items() if e.state != "unknown"}
        assert told.keys() == known.keys()
        for name, expected in known.items():
            shown = told[name]
            assert shown["pinned"] == expected.pinned, name
            if expected.ready:
                assert shown["state"] == "ready"
                assert shown["ready"]["ref"] == self.ref(expected.ready.model)
                assert self.node.ready(name, wait=0).status == 200
            elif expected.running:
                assert shown["state"] == "downloading"
            else:
                assert (shown["state"], shown["pull"]["error"]["code"]) == ("failed", "file_not_found")

    @invariant()
    def what_is_ready_is_on_the_disk_byte_for_byte(self) -> None:
        root = self.node.root
        ready = {name: e.ready for name, e in self.model.names.items() if e.ready}
        assert {path.stem for path in (root / "ready").iterdir()} == set(ready)
        assert mount.names(root) == set(ready)
        assert mount.wrong(root) == mount.left_over(root) == []
        for name, held in ready.items():
            document = json.loads((root / f"ready/{name}.json").read_text())
            assert document["ref"] == self.ref(held.model)
            assert digests(root / f"models/{name}") == held.digests

    @invariant()
    def nothing_is_on_the_disk_that_nobody_wants(self) -> None:
        private = self.node.root / ".cachd"
        wanted = {e.running for e in self.model.names.values()} | {e.ready for e in self.model.names.values()}
        may_be = {held for held in wanted if held} | self.model.left
        may_be |= {e.failed for e in self.model.names.values() if e.failed}
        allowed = {digest for held in may_be for digest in held.digests.values()}
        if self.model.has_orphans:
            allowed |= {hashlib.sha256(content).hexdigest() for content in SHARED.values()}
        found = {path.name for path in (private / "blobs/sha256").glob("*")}
        hashes = {f"{digest}.parts" for digest in found & allowed}  # of a blob that came in several parts
        assert found <= allowed | hashes, "blobs that no model needs"
        assert {path.name for path in (private / "pins").iterdir()} == {
            name for name, e in self.model.names.items() if e.pinned
        }
        pending = list((private / "pending").iterdir())
        assert {path.stem for path in pending if path.suffix != ".failed"} == {
            name for name, e in self.model.names.items() if e.running
        }
        assert not self.trash()
        unfinished = any(e.running or e.failed for e in self.model.names.values())
        if not (unfinished or self.model.has_orphans):
            assert not list((private / "ingest").iterdir())
            assert not list((private / "staging").iterdir())

    @invariant()
    def what_a_pod_has_open_keeps_a_name_that_tells_its_bytes(self) -> None:
        assert all(os.fstat(reader).st_nlink for reader in self.readers.values())

    @invariant()
    def every_request_is_counted_once(self) -> None:
        told = {key: self.node.metric(f"cachd_{key}_total") for key in ("misses", "joins", "hits")}
        count = self.model.counted
        assert told["misses"] >= count["misses"]
        assert sum(told.values()) == sum(count.values())
        assert self.node.metric("cachd_models", state="ready") == sum(
            e.ready is not None for e in self.model.names.values()
        )


@pytest.mark.timeout(600 if EXAMPLES <= 10 else 0)
def test_whatever_is_asked_in_whatever_order_and_whoever_is_killed_what_is_ready_is_right() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize="CACHD_MACHINE_EXAMPLES" not in os.environ,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # to shrink what takes seconds takes hours
            suppress_health_check=list(HealthCheck),
        ),
    )
