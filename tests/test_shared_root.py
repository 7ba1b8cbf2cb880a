"""Pulls without a daemon by many pods at once into one shared volume; some are killed, or stand still.

Each mount of the volume stands for a node. Two FUSE mounts of one directory do not know each other's locks.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachd.kernel.file_systems import shared_file_system
from tests.conftest import PATIENCE_SECONDS
from tests.ground.disks import FuseDisk, unmount
from tests.ground.models import noise
from tests.ground.needs import require
from tests.ground.node import Node
from tests.ground.origin import Origin, Seen, Stall
from tests.ground.program import CACHD, Program
from tests.ground.small import MIB
from tests.ground.strace import injected, needs_strace

FILES = {
    "a.bin": noise(24 * MIB, seed=1),
    "b.bin": noise(5 * MIB, seed=2),
    "config.json": b'{"model_type": "it"}',
}
SIZE = sum(map(len, FILES.values()))
IN_FLIGHT = 2 * 4 * MIB  # two connections; each may have a part of 4 MiB in the kernel


@dataclass
class Pod:
    """A pull that runs, and what it has logged."""

    process: subprocess.Popen[str]
    log: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""
    logged: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.logged:
                self.output += line
                if line.startswith('{"'):  # and no error, which has several lines
                    self.log.append(json.loads(line))
                self.logged.notify_all()
        with self.logged:
            self.logged.notify_all()

    def wait_for(self, event: str, **facts: Any) -> dict[str, Any]:
        """The first line with this event and these facts."""

        def found() -> list[dict[str, Any]]:
            return [e for e in self.log if e.get("event") == event and facts.items() <= e.items()]

        with self.logged:
            self.logged.wait_for(lambda: found() or not self._reader.is_alive(), PATIENCE_SECONDS)
            assert found(), f"no {event!r} {facts}:\n{self.output[-3000:]}"
            return found()[0]

    def has(self, event: str) -> bool:
        return any(entry.get("event") == event for entry in self.log)

    def ended(self) -> tuple[int, str]:
        """Its exit code and standard output, waited for."""
        assert self.process.stdout is not None
        stdout = self.process.stdout.read()
        status = self.process.wait(PATIENCE_SECONDS)
        self._reader.join()
        return status, stdout

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


class Cluster:
    """Pods that pull from one origin into one volume, which they see at these mounts, one after the other."""

    def __init__(self, origin: Origin, mounts: Sequence[Path], options: Path) -> None:
        self.origin, self.mounts, self.options = origin, mounts, options
        self.ref = origin.add_model("it", FILES)
        self.disks: list[FuseDisk] = []
        self._stack = ExitStack()
        self._count = 0

    def pod(self, *words: str, ref: str = "", start: type[subprocess.Popen[str]] = Program) -> Pod:
        """Start a pull. `start`: Popen for a real process, which can execute itself again."""
        root = self.mounts[self._count % len(self.mounts)]
        self._count += 1
        command = [*CACHD, "pull", ref or self.ref, "--name", "it", "--direct", "--root", str(root)]
        command += ["--config", str(self.options), "-o", "json", *words]
        how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if start is Program:
            del how["text"]
        process = start(command, env={**os.environ, "CACHD_LOG_FORMAT": "json"}, **how)
        self._stack.enter_context(process)
        self._stack.callback(self._end, process)
        return Pod(process)

    def fetcher(self, **how: Any) -> Pod:
        """Start a pull, and wait until it may write."""
        pod = self.pod(**how)
        pod.wait_for("taking the shared volume")
        return pod

    def waiters(self, count: int, *words: str) -> list[Pod]:
        """Start pulls, and wait until each of them shows how far the fetcher is."""
        pods = [self.pod(*words) for _ in range(count)]
        for pod in pods:
            pod.wait_for("another process pulls")
        return pods

    def stall(self, start: int) -> threading.Event:
        """Let each response about a.bin from `start` on stop after a MiB. Set when one is asked for."""
        asked = threading.Event()

        def is_beyond(seen: Seen) -> bool:
            is_it = seen.extent is not None and seen.extent[0] >= start
            if is_it:
                asked.set()
            return is_it

        self.origin.fault("/it/a.bin", Stall(at=MIB), times=None, when=is_beyond)
        return asked

    def check(self, *, fetched_twice: int = 0) -> None:
        """The model is ready, each byte right, and the origin served nothing twice but for so many bytes."""
        root = self.mounts[0]
        assert {n: (root / "models/it" / n).read_bytes() for n in FILES} == FILES
        sent = sum(self.origin.bytes_sent(f"/it/{name}") for name in FILES)
        assert SIZE <= sent <= SIZE + fetched_twice

    def close(self) -> None:
        self._stack.close()

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGCONT)
        process.kill()


def bind_mounts(place: Path, stack: ExitStack) -> tuple[list[Path], list[FuseDisk]]:
    require("mount")
    (place / "volume").mkdir()
    mounts = [place / "node-1", place / "node-2"]
    for mount in mounts:
        mount.mkdir()
        subprocess.run(["mount", "--bind", place / "volume", mount], check=True)
        stack.callback(unmount, mount)
    return mounts, []


def fuse_mounts(place: Path, stack: ExitStack) -> tuple[list[Path], list[FuseDisk]]:
    (place / "volume").mkdir()
    disks = []
    for name in ("node-1", "node-2"):
        (place / name).mkdir()
        disks.append(stack.enter_context(FuseDisk(place / name, backing=place / "volume")))
    return [disk.path for disk in disks], disks


VOLUMES: dict[str, Callable[[Path, ExitStack], tuple[list[Path], list[FuseDisk]]]] = {
    "bind": bind_mounts,
    "fuse": fuse_mounts,
}


@contextmanager
def made(kind: str, place: Path, origin: Origin) -> Iterator[Cluster]:
    options = {"allow": ["127.0.0.0/8"], "reserve_free": 0, "streams": 2}
    if kind == "bind":  # two mounts of FUSE are noticed
        options["shared"] = True
    (place / "options.yaml").write_text(yaml.safe_dump(options))
    with ExitStack() as stack:
        mounts, disks = VOLUMES[kind](place, stack)
        cluster = Cluster(origin, mounts, place / "options.yaml")
        cluster.disks = disks
        stack.callback(cluster.close)
        yield cluster


@pytest.fixture(params=VOLUMES)
def cluster(request: pytest.FixtureRequest, tmp_path: Path, origin: Origin) -> Iterator[Cluster]:
    """Nodes that share a volume by bind mounts, and by FUSE mounts without common locks."""
    with made(request.param, tmp_path, origin) as found:
        yield found


@pytest.fixture
def bound(tmp_path: Path, origin: Origin) -> Iterator[Cluster]:
    """Nodes that share a volume by bind mounts."""
    with made("bind", tmp_path, origin) as found:
        yield found


@pytest.fixture
def fused(tmp_path: Path, origin: Origin) -> Iterator[Cluster]:
    """Nodes that share a volume by FUSE mounts without common locks."""
    with made("fuse", tmp_path, origin) as found:
        yield found


def test_ten_pods_that_pull_at_once_fetch_a_model_once(cluster: Cluster) -> None:
    """Promised: Of pods that pull a model into one shared volume at once, one fetches it, and the others get
    it."""
    hold = cluster.origin.hold("/it/a.bin", after=MIB)
    pods = [cluster.pod() for _ in range(10)]
    assert hold.reached.wait(PATIENCE_SECONDS)
    waiting = [pod for pod in pods if not pod.has("taking the shared volume")]
    assert len(waiting) == 9
    for pod in waiting:
        shown = pod.wait_for("another process pulls", name="it", size_bytes=SIZE)
        assert shown["done_bytes"] <= SIZE
        assert shown["by"].startswith("pid ")
    hold.release()
    answers = [pod.ended() for pod in pods]
    assert [status for status, _ in answers] == [0] * 10
    documents = [json.loads(stdout) for _, stdout in answers]
    assert {document["ready"]["manifest"] for document in documents} == {documents[0]["ready"]["manifest"]}
    assert {document["path"] for document in documents} == {f"{m}/models/it" for m in cluster.mounts}
    cluster.check()


@pytest.mark.parametrize("after", [0, 8 * MIB, 20 * MIB])
def test_when_the_fetcher_is_killed_another_one_goes_on_within_seconds(cluster: Cluster, after: int) -> None:
    """Promised: If the pod that fetches for a shared volume dies, another one goes on within seconds, and
    fetches again only what was in flight."""
    reached = cluster.stall(after)
    killed = cluster.fetcher()
    waiting = cluster.waiters(3)
    assert reached.wait(PATIENCE_SECONDS)
    killed.signal(signal.SIGKILL)
    killed.ended()
    cluster.origin.clear()
    assert [pod.ended()[0] for pod in waiting] == [0, 0, 0]
    assert sum(pod.has("taking the shared volume") for pod in waiting) == 1
    cluster.check(fetched_twice=IN_FLIGHT)


def test_three_fetchers_that_are_killed_one_after_the_other_lose_only_what_was_in_flight(
    bound: Cluster,
) -> None:
    reached = bound.stall(4 * MIB)
    pods = [bound.fetcher(), *bound.waiters(3)]
    for next_after in (8 * MIB, 16 * MIB, SIZE):
        assert reached.wait(PATIENCE_SECONDS)
        (fetcher,) = [p for p in pods if p.has("taking the shared volume")]
        fetcher.signal(signal.SIGKILL)
        pods.remove(fetcher)
        bound.origin.clear()  # before the next one asks: a request that stalls waits for `stall_seconds`
        reached = bound.stall(next_after)
    assert [pod.ended()[0] for pod in pods] == [0]
    bound.check(fetched_twice=3 * IN_FLIGHT)


@pytest.mark.parametrize("match", ["/models/.trees/*", "/models/it", "/ready/it.json"])
def test_when_the_fetcher_is_killed_while_it_publishes_the_model_is_ready_for_all(
    fused: Cluster, match: str, tmp_path: Path
) -> None:
    """The file system carries out the last step of the dead process after all, as a file server does.

    Until then, its directory is locked in the kernel of that node: the other pod is on another one.
    """
    fused.disks[0].fail("rename_to", match=match, until=str(tmp_path / "late"), times=1)
    killed = fused.fetcher()
    (waiting,) = fused.waiters(1)
    waiting.wait_for("another process pulls", state="publishing")
    killed.signal(signal.SIGKILL)
    assert waiting.ended()[0] == 0
    assert waiting.has("taking the shared volume")
    (tmp_path / "late").touch()
    killed.ended()
    assert fused.pod("--refresh").ended()[0] == 0
    fused.check()


def test_a_file_system_in_user_space_counts_as_shared_and_the_log_says_so(fused: Cluster) -> None:
    pod = fused.pod()
    assert pod.ended()[0] == 0
    assert pod.wait_for("shared volume: one process at a time pulls")["shared_by"] == "FUSE"
    alone = fused.pod("--not-shared", "--refresh")
    assert alone.ended()[0] == 0
    assert not alone.has("shared volume: one process at a time pulls")


def test_a_local_file_system_does_not_count_as_shared(root: Path) -> None:
    assert shared_file_system(root) is None
    assert shared_file_system(Path("/proc")) is None
    with pytest.raises(FileNotFoundError):
        shared_file_system(root / "absent")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_waiter_that_ends_disturbs_nobody(bound: Cluster, number: signal.Signals) -> None:
    hold = bound.origin.hold("/it/a.bin", after=MIB)
    fetcher, (waiter, other) = bound.fetcher(), bound.waiters(2)
    waiter.signal(number)
    assert waiter.ended() == (-9 if number == signal.SIGKILL else 130, "")
    hold.release()
    assert [pod.ended()[0] for pod in (fetcher, other)] == [0, 0]
    bound.check()


def test_a_fetcher_that_is_interrupted_is_followed_without_delay(bound: Cluster) -> None:
    reached = bound.stall(8 * MIB)
    fetcher, (waiter,) = bound.fetcher(), bound.waiters(1)
    assert reached.wait(PATIENCE_SECONDS)
    fetcher.signal(signal.SIGTERM)
    assert fetcher.ended()[0] == 130
    ended = json.loads((bound.mounts[0] / ".cachd/nodes/1.ended").read_text())
    assert ended == {"error": None}
    bound.origin.clear()
    assert waiter.ended()[0] == 0
    bound.check(fetched_twice=IN_FLIGHT)


def test_a_fetcher_that_stood_still_finds_itself_fenced_and_harms_nothing(cluster: Cluster) -> None:
    """Promised: A pod that stood still while another one took over its pull changes nothing that pods see."""
    reached = cluster.stall(8 * MIB)
    fetcher = cluster.fetcher(start=subprocess.Popen)
    waiting = cluster.waiters(2)
    assert reached.wait(PATIENCE_SECONDS)
    fetcher.signal(signal.SIGSTOP)
    cluster.origin.clear()
    assert [pod.ended()[0] for pod in waiting] == [0, 0]
    before = published(cluster.mounts[0])
    fetcher.signal(signal.SIGCONT)
    status, stdout = fetcher.ended()
    assert status == 0, fetcher.output[-3000:]
    assert json.loads(stdout)["ready"]["name"] == "it"
    assert fetcher.has("another process took over"), "it noticed"
    assert published(cluster.mounts[0]) == before
    assert os.listdir(cluster.mounts[0] / ".cachd/ingest") == []
    cluster.check(fetched_twice=IN_FLIGHT)


def test_a_fetcher_that_stood_still_while_the_next_one_fetches_waits_for_it(bound: Cluster) -> None:
    reached = bound.stall(8 * MIB)
    fetcher = bound.fetcher(start=subprocess.Popen)
    waiting = bound.waiters(1)
    assert reached.wait(PATIENCE_SECONDS)
    fetcher.signal(signal.SIGSTOP)
    bound.origin.clear()
    again = bound.stall(16 * MIB)
    assert again.wait(PATIENCE_SECONDS), "the next one fetches"
    fetcher.signal(signal.SIGCONT)
    fetcher.wait_for("another process pulls", number=2)
    waiting[0].signal(signal.SIGKILL)
    bound.origin.clear()
    assert fetcher.ended()[0] == 0
    bound.check(fetched_twice=3 * IN_FLIGHT)


def test_a_waiter_whose_time_is_up_is_4_and_says_how_far_the_fetcher_is(bound: Cluster) -> None:
    hold = bound.origin.hold("/it/a.bin", after=MIB)
    fetcher = bound.fetcher()
    waiter = bound.pod("--timeout", "5s")
    status, stdout = waiter.ended()
    assert (status, stdout) == (4, "")
    assert '"code": "wait_timeout"' in waiter.output
    assert "are here after 5" in waiter.output
    hold.release()
    assert fetcher.ended()[0] == 0


def test_a_final_error_is_the_answer_to_all_that_waited_for_the_same_model(bound: Cluster) -> None:
    asked = threading.Event()
    go_on = threading.Event()
    bound.origin.remove("/it/a.bin")

    def is_asked(_: Seen) -> bool:
        asked.set()
        go_on.wait(PATIENCE_SECONDS)
        return False

    bound.origin.fault("/it/SHA256SUMS", Stall(at=0), times=None, when=is_asked)
    fetcher = bound.fetcher()
    assert asked.wait(PATIENCE_SECONDS)
    waiting = bound.waiters(2)
    go_on.set()
    codes = [pod.ended()[0] for pod in (fetcher, *waiting)]
    assert codes == [3, 3, 3]
    for pod in waiting:
        assert '"code": "file_not_found"' in pod.output
        assert not pod.has("taking the shared volume"), "the origin is not asked again"


def test_pulls_of_other_models_wait_for_each_other(bound: Cluster) -> None:
    other = bound.origin.add("/other", noise(MIB))
    hold = bound.origin.hold("/it/a.bin", after=MIB)
    fetcher = bound.fetcher()
    waiter = bound.pod("--name", "other", ref=other)
    assert waiter.wait_for("another process pulls")["name"] == "it"
    hold.release()
    assert [pod.ended()[0] for pod in (fetcher, waiter)] == [0, 0]
    assert (bound.mounts[0] / "models/other/other").read_bytes() == noise(MIB)


def test_a_model_that_is_ready_is_the_answer_while_another_one_is_pulled(bound: Cluster) -> None:
    assert bound.pod().ended()[0] == 0
    other = bound.origin.add("/other", noise(6 * MIB))
    hold = bound.origin.hold("/other", after=MIB)
    fetcher = bound.pod("--name", "other", ref=other)
    fetcher.wait_for("taking the shared volume")
    assert bound.pod().ended()[0] == 0
    assert fetcher.process.poll() is None
    hold.release()
    assert fetcher.ended()[0] == 0


# --- what is in use cannot be known ---

NFS, SHARED = 0x6969, "shared volume: nothing is evicted or deleted without force"


def on_file_system(number: int, root: Path, *command: str) -> list[str]:
    """A command to which the kernel says that `root` is on the file system with this number."""
    kind = struct.pack("@l", number).hex()  # f_type, the first field of struct statfs
    strace, *words = injected(command, f"statfs:poke_exit=@arg2={kind}", on=root)
    return [strace, "-D", *words]  # the process that is started is the command, and gets its signals


@needs_strace
def test_a_daemon_on_a_network_file_system_warns_and_deletes_nothing(root: Path, origin: Origin) -> None:
    ref = origin.add("/it", noise(MIB))
    with Node(root, before=on_file_system(NFS, root)) as node:
        said = node.wait_for(SHARED)
        assert (said["level"], said["shared_by"]) == ("warning", "NFS")
        assert said["hint"] == "set shared: false if no other node uses this root"
        node.pull(ref)
        assert node.ready("it").status == 200
        refused = node.cli("rm", "it")
        assert (refused.returncode, "code: shared_volume" in refused.stderr) == (9, True)
        assert node.stop() == 0


@needs_strace
def test_shared_false_silences_the_warning_and_the_daemon_deletes(root: Path, origin: Origin) -> None:
    ref = origin.add("/it", noise(MIB))
    with Node(root, {"shared": False}, before=on_file_system(NFS, root)) as node:
        node.pull(ref)
        assert node.ready("it").status == 200
        assert node.cli("rm", "it").returncode == 0
        assert node.stop() == 0
        assert not any(entry.get("event") == SHARED for entry in node.log)


@needs_strace
@pytest.mark.parametrize(("kind", "number"), {"FUSE": 0x65735546, "9P": 0x01021997}.items())
def test_a_daemon_on_a_file_system_that_may_be_local_evicts_as_ever(
    root: Path, kind: str, number: int
) -> None:
    with Node(root, before=on_file_system(number, root)) as node:
        assert node.stop() == 0
        assert not any(entry.get("event") == SHARED for entry in node.log)
    assert found_by(number, root) == f"{kind} False"


@needs_strace
@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("NFS", NFS),
        ("CephFS", 0x00C36400),
        ("Lustre", 0x0BD00BD0),
        ("SMB", 0xFF534D42),
        ("SMB", 0xFE534D42),
        ("SMB", 0x517B),
        ("AFS", 0x5346414F),
        ("AFS", 0x6B414653),
        ("GPFS", 0x47504653),
        ("BeeGFS", 0x19830326),
        ("OCFS2", 0x7461636F),
        ("GFS2", 0x01161970),
    ],
)
def test_a_network_file_system_is_known_by_the_number_that_the_kernel_states(
    root: Path, kind: str, number: int
) -> None:
    assert found_by(number, root) == f"{kind} True"


def found_by(number: int, root: Path) -> str:
    """What a process finds out about the file system of `root`, and whether that is certain."""
    text = (
        "import sys, pathlib; from cachd.kernel.file_systems import shared_file_system as shared\n"
        "found = shared(pathlib.Path(sys.argv[1])); print(found.name, found.is_certain)"
    )
    command = on_file_system(number, root, sys.executable, "-c", text, str(root))
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def test_a_pull_evicts_nothing_on_a_shared_volume_unless_it_is_forced(bound: Cluster) -> None:
    assert bound.pod().ended()[0] == 0
    limit = {**yaml.safe_load(bound.options.read_text()), "limit_bytes": SIZE + 2 * MIB}
    bound.options.write_text(yaml.safe_dump(limit))
    other = bound.origin.add("/other", noise(20 * MIB))
    refused = bound.pod("--name", "other", ref=other)
    assert refused.ended()[0] == 7
    assert "nobody can tell whether another node uses it" in refused.output
    assert (bound.mounts[0] / "ready/it.json").exists()
    forced = bound.pod("--name", "other", "--force", ref=other)
    assert forced.ended()[0] == 0, forced.output[-3000:]
    assert not (bound.mounts[0] / "ready/it.json").exists()


def test_a_replaced_snapshot_stays_on_a_shared_volume(bound: Cluster) -> None:
    options = {**yaml.safe_load(bound.options.read_text()), "keep_previous": 0}
    bound.options.write_text(yaml.safe_dump(options))
    assert bound.pod().ended()[0] == 0
    bound.origin.add_model("it", {**FILES, "config.json": b"{}"})
    assert bound.pod("--refresh").ended()[0] == 0
    assert len(list((bound.mounts[0] / "models/.trees").iterdir())) == 2
    assert bound.pod("--refresh", "--force").ended()[0] == 0
    assert len(list((bound.mounts[0] / "models/.trees").iterdir())) == 1


def test_rm_on_a_shared_volume_must_be_forced(root: Path, origin: Origin) -> None:
    ref = origin.add("/it", noise(MIB))
    with Node(root, {"shared": True}) as node:
        node.pull(ref)
        assert node.ready("it").status == 200
        refused = node.cli("rm", "it")
        assert (refused.returncode, "code: shared_volume" in refused.stderr) == (9, True)
        assert "--force" in refused.stderr
        assert node.ready("it").status == 200
        assert node.cli("rm", "it", "--force").returncode == 0
        assert node.ready("it").status == 404
        assert list((root / ".cachd/blobs").glob("*/*")) == []


# --- small things of the tests ---


def published(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of everything that pods see, and of the blobs, but for the status.

    A late writer may replace the part hashes beside a blob, by others that are as right.
    """
    found = {}
    for top in ("models", "hub", "ready", ".cachd/blobs", ".cachd/manifests"):
        for at, directories, names in os.walk(root / top):
            for name in (*directories, *names):
                if top == ".cachd/blobs" and (name.endswith(".parts") or name in directories):
                    continue
                status = Path(at, name).lstat()
                found[str(Path(at, name).relative_to(root))] = (status.st_ino, status.st_mtime_ns)
    return found
