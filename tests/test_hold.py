"""What a pod holds, it keeps; what it began with, it ends with: with the mount alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ground import mount
from tests.ground import pod as pods
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.needs import needs, require
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.program import CACHD, Program, run
from tests.ground.site import Ground, assert_problem, until

PROJECT = Path(__file__).parent.parent
KIB = 1 << 10
SHELLS = {
    "sh": ["sh"],
    "bash": ["bash"],
    "busybox": ["busybox", "sh"],
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def revision(number: int) -> dict[str, bytes]:
    """A model whose files all differ from those of its other revisions."""
    return {
        "config.json": b'{"model_type": "revision %d"}' % number,
        "model.safetensors": noise(300 * KIB, number),
    }


def published(ground: Ground, name: str, number: int = 1) -> str:
    """Publish a revision under a name; the snapshot's id."""
    return pulled(ground, name, ground.hub.add(f"org/{name}", revision(number)))


def pulled(ground: Ground, name: str, commit: str) -> str:
    """Pull the commit that a branch leads to, and wait; the snapshot's id."""
    ground.node.pull(f"hf://org/{name}", name=name, refresh=True)
    until(lambda: told(ground.node, name).get("revision") == commit)
    return str(told(ground.node, name)["manifest"])


def told(node: Node, name: str) -> dict[str, Any]:
    """The ready file; empty when there is none."""
    try:
        return dict(json.loads((node.root / f"ready/{name}.json").read_bytes()))
    except FileNotFoundError:
        return {}


def protection(node: Node, manifest: str) -> str | None:
    """By what a snapshot is protected; None when it is not here."""
    snapshots = node.ask("GET", "/v1/capacity").document["snapshots"]
    return next((s["protected_by"] or "nothing" for s in snapshots if s["manifest"] == manifest), None)


def write_status(root: Path, name: str, **status: object) -> None:
    """What the daemon writes of a model that is not ready: `state`, `final`, `error`, `bytes`."""
    (root / "status").mkdir(exist_ok=True)
    document = {"state": "downloading", "final": False, "error": None, "bytes": {"total": 9, "done": 4}}
    beside = root / f"status/.{name}.new"
    beside.write_text(json.dumps(document | status, indent=1))
    beside.rename(root / f"status/{name}.json")


def cachd(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run([*CACHD, *arguments], env={**os.environ, **env}, cwd=PROJECT, timeout=60)


class Holder:
    """`cachd hold` in a process of its own, until its link stands. Ends with the test."""

    def __init__(self, root: Path, name: str, folder: Path, *command: str) -> None:
        self.link = folder / name
        words = [*CACHD, "hold", name, "--cache", root, "--link", folder]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = Program([*words, *(("--", *command) if command else ())], cwd=PROJECT, **pipes)

    def said(self, words: str) -> str:
        """The first line of its log with these words, waited for."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if words in line:
                return line
        raise AssertionError(f"it never said {words!r}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """One daemon for all tests of the file. What was opened lately counts for nothing: a hold decides."""
    options = {"retries": 0, "streams": 4, "keep_opened_seconds": 0}
    with Origin() as origin, Hub() as hub:
        root = tmp_path_factory.mktemp("shared") / "node"
        with Node(root, {**options, "hf_endpoint": hub.url}) as node:
            yield Ground(node, origin, hub)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    """Starts holders; each has a snapshot when it is returned."""
    started: list[Holder] = []
    (tmp_path / "model").mkdir()

    def start(root: Path, name: str, *command: str) -> Holder:
        started.append(Holder(root, name, tmp_path / "model", *command))
        started[-1].said("is held")
        return started[-1]

    yield start
    for each in started:
        with each.process:
            each.process.kill()


# --- a pod ---

# Told a line at a time: `hold NAME` starts a holder and waits for its link, `restart` ends it and starts
# another, `read PATH` opens a file, reads it, closes it and prints its sha256, as an engine that loads.
ENGINE = """
import ctypes, hashlib, os, signal, subprocess, sys, time
folder, cache = os.environ["TMPDIR"] + "/model", os.environ["CACHE"]
os.mkdir(folder)
holder = None

def hold(name):
    dies_with_us = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    words = [sys.executable, "-m", "cachd", "hold", name, "--cache", cache, "--link", folder]
    process = subprocess.Popen(words, preexec_fn=dies_with_us, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "is held" in line:
            return process
    raise SystemExit("the holder ended")

for line in sys.stdin:
    verb, _, what = line.strip().partition(" ")
    if verb == "hold":
        name, holder = what, hold(what)
    elif verb == "restart":
        holder.terminate()
        print(holder.wait(), end=" ")
        holder = hold(name)
    elif verb == "read":
        with open(what.replace("CACHE", cache).replace("MODEL", folder), "rb") as file:
            print(hashlib.sha256(file.read()).hexdigest(), end="")
    print(flush=True)
"""


class Pod:
    """A pod that runs ENGINE: read-only mount, another user, its own mount namespace."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer.endswith("\n"):
            _, errors = self._process.communicate()
            raise AssertionError(errors)
        return answer.strip()


@pytest.fixture(scope="module")
def package() -> Iterator[Path]:
    """A copy of cachd that other users may read."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o755)
        shutil.copytree(PROJECT / "cachd", place / "cachd", ignore=shutil.ignore_patterns("__pycache__"))
        yield place


@contextmanager
def running_pod(root: Path, package: Path) -> Iterator[Pod]:
    with pods.pod(root, ENGINE, env={"PYTHONPATH": str(package)}) as process:
        yield Pod(process)


@needs("pods")
def test_a_pod_that_closed_its_files_after_loading_keeps_the_model_that_it_holds(
    ground: Ground, package: Path
) -> None:
    """Promised: A model that a pod holds is not removed, evicted or swept until the pod ends, even if all
    its files are closed."""
    node, manifest = ground.node, published(ground, "kept")
    with running_pod(node.root, package) as pod:
        pod.ask("hold kept")
        assert pod.ask("read MODEL/kept/model.safetensors") == sha256(revision(1)["model.safetensors"])
        refused = node.ask("DELETE", "/v1/models/kept")
        assert_problem(refused, 409, "in_use")
        assert refused.document["detail"] == "kept is held by a pod"
        assert node.ask("GET", "/v1/models/kept").document["in_use"] is True
        assert protection(node, manifest) == "held by a pod"
        plan = node.ask("POST", "/v1/evictions?dry_run=true", {"bytes": "100TB"}).document
        assert manifest not in {s["manifest"] for s in plan["evictions"]}
        assert manifest in {s["manifest"] for s in plan["protected"]}
        assert pod.ask("read MODEL/kept/config.json") == sha256(revision(1)["config.json"])
    until(lambda: protection(node, manifest) == "nothing")
    assert node.ask("DELETE", "/v1/models/kept").status == 200


@needs("pods")
def test_a_pod_that_only_read_its_model_and_closed_it_protects_nothing(ground: Ground, package: Path) -> None:
    published(ground, "read")
    with running_pod(ground.node.root, package) as pod:
        assert pod.ask("read CACHE/models/read/config.json") == sha256(revision(1)["config.json"])
        assert ground.node.ask("DELETE", "/v1/models/read").status == 200


@needs("pods")
def test_a_name_that_moves_while_a_pod_loads_gives_it_files_of_one_revision(
    ground: Ground, package: Path
) -> None:
    """Promised: A pod reads one revision through its link, even if the name moves while it loads."""
    published(ground, "moves")
    address = told(ground.node, "moves")["immutable_path"]
    with running_pod(ground.node.root, package) as pod:
        pod.ask("hold moves")
        first = sha256(revision(1)["config.json"]), sha256(revision(1)["model.safetensors"])
        read = [pod.ask(f"read {place}/config.json") for place in ("MODEL/moves", f"CACHE/{address}")]
        published(ground, "moves", 2)
        read += [pod.ask(f"read {place}/model.safetensors") for place in ("MODEL/moves", f"CACHE/{address}")]
        assert read == [first[0], first[0], first[1], first[1]]
        by_name = pod.ask("read CACHE/models/moves/model.safetensors")
        assert by_name == sha256(revision(2)["model.safetensors"])


@needs("pods")
def test_a_holder_that_starts_again_holds_the_same_snapshot_though_the_name_has_moved(
    ground: Ground, package: Path
) -> None:
    node, before = ground.node, published(ground, "again")
    with running_pod(node.root, package) as pod:
        pod.ask("hold again")
        after = published(ground, "again", 2)
        assert pod.ask("restart") == "0"
        assert pod.ask("read MODEL/again/config.json") == sha256(revision(1)["config.json"])
        assert protection(node, before) == "held by a pod"
        assert protection(node, after) == "nothing"
    until(lambda: protection(node, before) == "nothing")


# --- what holds, and until when ---


def test_a_replaced_snapshot_that_is_held_is_neither_swept_nor_evicted_until_it_is_let_go(
    alone: Callable[..., Ground], holder: Callable[..., Holder]
) -> None:
    ground = alone(keep_previous=0, keep_opened_seconds=0)
    node, before = ground.node, published(ground, "m")
    address = told(node, "m")["immutable_path"]
    held = holder(node.root, "m")
    published(ground, "m", 2)
    sweep = {"everything": True}
    assert node.ask("POST", "/v1/sweeps", sweep).document["swept"] == []
    assert protection(node, before) == "held by a pod"
    assert (node.root / address / "config.json").read_bytes() == revision(1)["config.json"]
    assert held.stop() == 0
    until(lambda: node.ask("POST", "/v1/sweeps", sweep).document["swept"] or protection(node, before) is None)
    assert before not in mount.holds(node.root)
    assert not (node.root / address).is_symlink()
    assert mount.wrong(node.root) == mount.left_over(node.root) == []


def test_a_hold_outlives_a_killed_daemon(alone: Callable[..., Ground], holder: Callable[..., Holder]) -> None:
    ground = alone(keep_opened_seconds=0)
    manifest = published(ground, "m")
    holder(ground.node.root, "m")
    ground.node.kill()
    ground.node.start()
    assert protection(ground.node, manifest) == "held by a pod"
    assert_problem(ground.node.ask("DELETE", "/v1/models/m"), 409, "in_use")


def test_what_is_held_goes_by_force_and_is_held_again_when_it_comes_back(
    ground: Ground, holder: Callable[..., Holder]
) -> None:
    node, manifest = ground.node, published(ground, "forced")
    commit = told(node, "forced")["revision"]
    held = holder(node.root, "forced")
    assert node.ask("DELETE", "/v1/models/forced?force=true").status == 200
    assert manifest not in mount.holds(node.root)
    assert not held.link.exists()
    assert pulled(ground, "forced", commit) == manifest
    held.said("is held again")
    assert_problem(node.ask("DELETE", "/v1/models/forced"), 409, "in_use")
    assert held.stop() == 0


def test_a_link_that_dangles_after_a_reboot_is_made_anew_and_that_is_logged(
    ground: Ground, holder: Callable[..., Holder]
) -> None:
    node = ground.node
    published(ground, "reboot")
    held = holder(node.root, "reboot")
    before = held.link.readlink()
    assert held.stop(signal.SIGKILL) == -signal.SIGKILL
    assert node.ask("DELETE", "/v1/models/reboot").status == 200
    after = published(ground, "reboot", 2)
    again = Holder(node.root, "reboot", held.link.parent)
    with again.process:
        assert str(before) in again.said("which no longer exists")
        again.said("is held")
        assert again.link.readlink() == node.root / "models/.trees" / after
        assert again.stop() == 0


def test_the_text_of_the_link_s_path_stays_and_its_target_is_absolute(
    ground: Ground, holder: Callable[..., Holder], tmp_path: Path
) -> None:
    manifest = published(ground, "text")
    held = holder(ground.node.root, "text")
    assert held.link == tmp_path / "model/text"
    assert held.link.readlink() == ground.node.root / "models/.trees" / manifest
    assert os.listdir(held.link.parent) == ["text"]


def test_a_holder_leaves_alone_what_is_no_link_of_its_own(ground: Ground, tmp_path: Path) -> None:
    published(ground, "taken")
    (tmp_path / "taken").mkdir()
    ended = cachd("hold", "taken", "--cache", ground.node.root, "--link", tmp_path)
    assert (ended.returncode, "link_taken" in ended.stderr) == (2, True)
    assert (tmp_path / "taken").is_dir()


def test_the_engine_s_own_process_holds_where_cachd_becomes_it(
    ground: Ground, holder: Callable[..., Holder]
) -> None:
    node, manifest = ground.node, published(ground, "wrapped")
    held = holder(node.root, "wrapped", "sh", "-c", "echo serving; read line; exit 7")
    assert held.process.stdout is not None
    assert held.process.stdout.readline() == "serving\n"
    assert protection(node, manifest) == "held by a pod"
    held.process.communicate("end\n")
    assert held.process.returncode == 7
    until(lambda: protection(node, manifest) == "nothing")


def test_a_holder_that_comes_while_its_model_goes_has_it_whole_or_not_at_all(
    alone: Callable[..., Ground], tmp_path: Path
) -> None:
    """Pods open the hold file over and over while the model is removed and published again."""
    ground = alone(keep_previous=0, keep_opened_seconds=0)
    node, manifest = ground.node, published(ground, "m")
    commit = told(node, "m")["revision"]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(node.root), manifest],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    removed = refused = 0
    while removed < 12 or refused < 12:
        status = node.ask("DELETE", "/v1/models/m").status
        removed, refused = removed + (status == 200), refused + (status == 409)
        if status == 200:
            assert pulled(ground, "m", commit) == manifest
    for racer in racers:
        output, _ = racer.communicate("enough\n", timeout=60)
        outcome = json.loads(output)
        assert outcome["violations"] == []
        assert outcome["held"] > 10


# Holds the snapshot a while, lets it go, and so on; while it holds, every file must be there.
RACER = """
import json, os, random, select, sys, time
from pathlib import Path
from cachd.pod.mount import Mount
mount, manifest = Mount(Path(sys.argv[1])), sys.argv[2]
tree, held, violations = mount.layout.tree(manifest), 0, []
while not select.select([sys.stdin], [], [], random.random() / 50)[0]:
    fd = mount.open_hold(manifest)
    if fd is None:
        continue
    held += 1
    ends = time.monotonic() + random.random() / 50
    while time.monotonic() < ends:
        if not ((tree / "config.json").exists() and (tree / "model.safetensors").exists()):
            violations.append(held)
            break
    os.close(fd)
print(json.dumps({"held": held, "violations": violations}))
"""


# --- waiting, and what ends it ---


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A cache in which nothing is ready."""
    for name in ("models/.trees", "models/.holds", "ready", "status"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    return tmp_path / "cache"


FAILURES = {
    "NotFound": 3,
    "Forbidden": 5,
    "Unauthorized": 5,
    "TooBig": 7,
    "Corrupt": 8,
    "Changed": 10,
    "Invalid": 2,
    "DiskFailed": 1,
    "what no class is called": 1,
}


def test_the_wait_ends_with_the_path_when_the_model_is_ready(ground: Ground) -> None:
    published(ground, "waited")
    ended = cachd("wait", "waited", "--cache", ground.node.root, CACHD_SERVER="http://127.0.0.1:9")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{ground.node.root}/models/waited\n"


@pytest.mark.parametrize("command", ["wait", "hold"])
def test_a_wait_that_runs_out_of_time_is_told_from_a_model_that_nobody_knows(
    empty: Path, tmp_path: Path, command: str
) -> None:
    words = [command, "m", "--cache", str(empty), "--timeout", "0.3"]
    words += ["--link", str(tmp_path)] if command == "hold" else []
    ended = cachd(*words)
    assert (ended.returncode, "code: not_known" in ended.stderr) == (11, True)
    write_status(empty, "m")
    ended = cachd(*words)
    assert (ended.returncode, "downloading, 4 of 9 bytes" in ended.stderr) == (4, True)


def test_a_model_that_nobody_knows_is_given_up_sooner_where_that_is_asked(empty: Path) -> None:
    ended = cachd("wait", "m", "--cache", empty, "--unknown-timeout", "0.2")
    assert ended.returncode == 11


@pytest.mark.parametrize(("kind", "code"), FAILURES.items())
def test_a_pull_that_failed_for_good_ends_the_wait_with_the_code_of_its_error(
    empty: Path, kind: str, code: int
) -> None:
    error = {"code": "no_such_repo", "detail": "org/m: no", "hint": "look there", "error_class": kind}
    write_status(empty, "m", state="failed", final=True, error=error)
    ended = cachd("wait", "m", "--cache", empty)
    assert ended.returncode == code
    assert "error: org/m: no" in ended.stderr
    assert "code: no_such_repo" in ended.stderr


def test_a_failure_that_is_not_final_is_waited_for(empty: Path) -> None:
    write_status(empty, "m", state="failed", error={"error_class": "Unavailable", "detail": "it is away"})
    ended = cachd("wait", "m", "--cache", empty, "--timeout", "0.6")
    assert (ended.returncode, "failed, 4 of 9 bytes (it is away)" in ended.stderr) == (4, True)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"error": 3, "final": true}']
)
def test_a_status_that_makes_no_sense_is_no_failure(empty: Path, content: bytes) -> None:
    (empty / "status/m.json").write_bytes(content)
    assert cachd("wait", "m", "--cache", empty, "--timeout", "0.6").returncode in (4, 11)


def test_the_holder_needs_no_configuration_and_little_memory(
    ground: Ground, holder: Callable[..., Holder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published(ground, "light")
    (tmp_path / "bad.yaml").write_text("no: such: thing")
    monkeypatch.setenv("CACHD_CONFIG", str(tmp_path / "bad.yaml"))
    monkeypatch.setenv("CACHD_SERVER", "http://127.0.0.1:9")
    pid = holder(ground.node.root, "light").process.pid
    place = Path(f"/proc/{pid}")
    until(lambda: b"cachd.pod" in (place / "cmdline").read_bytes())
    until(lambda: "(sleeping)" in (place / "status").read_text())
    (anonymous,) = re.findall(r"RssAnon:\s+(\d+) kB", (place / "status").read_text())
    assert int(anonymous) < 16 << 10
    assert not re.search(r"pydantic|_ssl|uvloop", (place / "maps").read_text())


# --- the same in a shell ---


def script(first: str) -> str:
    """The shell script of docs/pods.md whose first line begins so."""
    blocks = re.findall(r"```shell\n(.*?)```", (PROJECT / "docs/pods.md").read_text(), flags=re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# {first}:")]
    return str(found)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> list[str]:
    if request.param != "sh":
        require(request.param)
    words: list[str] = SHELLS[request.param]
    return words


@pytest.mark.parametrize(
    ("status", "timeout", "code"),
    [
        ({"state": "ready"}, 60, 0),
        ({"final": True, "error": {"status": 404, "code": "no_such_repo"}}, 60, 1),
        ({"state": "downloading"}, 0, 4),
        (None, 0, 11),
    ],
    ids=["ready", "failed for good", "not in time", "not known"],
)
def test_the_wait_in_a_shell_ends_with_its_codes(
    empty: Path, shell: list[str], status: dict[str, object] | None, timeout: int, code: int
) -> None:
    if status is not None:
        write_status(empty, "m", **status)
    if status == {"state": "ready"}:
        (empty / "ready/m.json").write_text("{}")
    env = {**os.environ, "CACHE": str(empty), "MODEL": "m", "TIMEOUT": str(timeout)}
    ended = subprocess.run(
        [*shell, "-c", script("wait")], env=env, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr if code != 1 else "") == (code, "")


def test_the_wait_in_a_shell_takes_ten_lines() -> None:
    assert len(script("wait").splitlines()) <= 10


@contextmanager
def engine_in(shell: list[str], root: Path, name: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The script of docs/pods.md that holds and becomes the engine, here one that says where its model is."""
    (folder / "bin").mkdir(exist_ok=True)
    vllm = folder / "bin/vllm"
    vllm.write_text('#!/bin/sh\ncat "$2/config.json"\necho\nread line\n')
    vllm.chmod(0o755)
    env = {
        **os.environ,
        "CACHE": str(root),
        "MODEL": name,
        "LINK": str(folder),
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
    }
    with subprocess.Popen(
        [*shell, "-c", script("hold")], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_holder_in_a_shell_holds_the_same_snapshot_again_and_a_new_one_when_that_has_gone(
    alone: Callable[..., Ground], shell: list[str], tmp_path: Path
) -> None:
    ground = alone(keep_previous=0, keep_opened_seconds=0)
    node, before = ground.node, published(ground, "m")

    def serves(process: subprocess.Popen[str]) -> bytes:
        assert process.stdout is not None
        return process.stdout.readline().strip().encode()

    with engine_in(shell, node.root, "m", tmp_path) as engine:
        assert serves(engine) == revision(1)["config.json"]
        assert protection(node, before) == "held by a pod"
        after = published(ground, "m", 2)
        with engine_in(shell, node.root, "m", tmp_path) as restarted:
            assert serves(restarted) == revision(1)["config.json"]
    until(lambda: protection(node, before) == "nothing")
    node.ask("POST", "/v1/sweeps", {"everything": True})
    assert protection(node, before) is None
    with engine_in(shell, node.root, "m", tmp_path) as rebooted:
        assert serves(rebooted) == revision(2)["config.json"]
        assert protection(node, after) == "held by a pod"
