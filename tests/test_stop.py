"""What a stop or a kill in mid-pull costs: bytes that the source sends twice, counted where they are sent."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.errors import Cancelled
from tests.conftest import Engine, spec_of
from tests.ground.bucket import Bucket
from tests.ground.checksums import sha256sums
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Hold, IgnoreRange, Origin, Server
from tests.ground.program import CACHD, Program, run
from tests.ground.site import until

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 60.0
FIRST_STREAMS = 4  # at work before throughput says anything
SIZE, HELD_AT = 24 * MIB, 3 * MIB + 512 * KIB  # in parts of 4 MiB
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDSCRIPTED",
    "AWS_SECRET_ACCESS_KEY": "said to nobody",
    "AWS_DEFAULT_REGION": "us-east-1",
}
Nodes = Callable[..., Node]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model named `it` comes from: the server that sends its bytes, its ref, options to reach it."""

    server: Server
    ref: str
    size: int
    options: dict[str, object]


@pytest.fixture(params=["http", "s3", "hf", "several files"])
def place(request: pytest.FixtureRequest, origin: Origin, hub: Hub) -> Iterator[Place]:
    match request.param:
        case "http":
            yield Place(origin, origin.add("/it", noise(SIZE)), SIZE, {})
        case "hf":
            hub.add("org/it", {"it.safetensors": noise(SIZE)})
            yield Place(hub.cdn, "hf://org/it", SIZE, {"hf_endpoint": hub.url})
        case "s3":
            with Bucket() as bucket:
                bucket.put("it/model.safetensors", noise(SIZE))
                yield Place(bucket, "s3://models/it/", SIZE, {"s3_endpoint_url": bucket.url})
        case _:
            files = {f"{number}.bin": noise(SIZE // 6, number) for number in range(6)}
            for name, content in files.items():
                origin.add(f"/it/{name}", content)
            origin.add("/it/SHA256SUMS", sha256sums(files))
            yield Place(origin, f"{origin.url}/it/", SIZE, {})


def sent(server: Server) -> int:
    """Bytes of files that the server has sent."""
    told = (seen for seen in server.requests if seen.method == "GET")
    return sum(seen.sent for seen in told if not seen.path.endswith(("/SHA256SUMS", "/models")))


def unread(server: Server) -> int:
    """Bytes of the server's connections that are on their way, or wait in the kernel for their reader."""
    port = f"{urlsplit(server.url).port:04X}"
    total = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if port in (local.partition(":")[2], remote.partition(":")[2]) and not local.startswith("00000000:"):
            total += sum(int(queue, 16) for queue in queues.split(":"))
    return total


def kept(root: Path) -> int:
    """Bytes that a line tells of, in any ingest of a root."""
    total = 0
    for ingest in (root / ".cachd/ingest").iterdir():
        reached: dict[str, int] = {}
        for name in ("received", "journal"):
            path = ingest / name
            for start, stop, _ in map(str.split, path.read_text().splitlines() if path.exists() else ()):
                reached[start] = max(reached.get(start, 0), int(stop))
        total += sum(stop - int(start) for start, stop in reached.items())
    return total


def lines(root: Path) -> int:
    """How often any ingest of a root has recorded bytes."""
    return sum(path.read_text().count("\n") for path in (root / ".cachd/ingest").glob("*/received"))


@dataclass(slots=True)
class Held:
    """A daemon of whose pull each stream waits in the middle of a part, with every byte that was sent."""

    node: Node
    place: Place
    hold: Hold

    def sent_twice(self) -> int:
        """Let the next life of the daemon end the pull; the bytes that both received.

        The origin may send more to the next life: another connection may take over the part of a slow one.
        """
        before = sent(self.place.server)
        self.hold.release()
        self.node.start()
        assert self.node.ready("it").status == 200
        return before + int(self.node.metric("cachd_download_bytes_total")) - self.place.size


@pytest.fixture
def held(node: Nodes) -> Iterator[Callable[..., Held]]:
    """Starts a daemon and its pull of a place: `held(place, streams=2)`."""
    with ExitStack() as stack:

        def pulling(place: Place, after: int = HELD_AT, **options: object) -> Held:
            hold = place.server.hold("*", after)
            stack.callback(hold.release)
            running = node(env=S3_KEYS, allow=["127.0.0.0/8"], **place.options, **options)
            running.pull(place.ref, name="it")
            until(lambda: sent(place.server) == FIRST_STREAMS * after)
            until(lambda: not unread(place.server))
            return Held(running, place, hold)

        yield pulling


@pytest.mark.parametrize("streams", [FIRST_STREAMS, 32, 256])
def test_a_kill_costs_a_stream_2_mib(place: Place, held: Callable[..., Held], streams: int) -> None:
    """Promised: kill -9 costs at most 2 MiB a connection, and 64 MiB in all."""
    bound = FIRST_STREAMS * 2 * MIB  # of more that are allowed, no more are at work
    running = held(place, streams=streams)
    until(lambda: kept(running.node.root) >= sent(place.server) - bound)
    assert lines(running.node.root) <= sent(place.server) / MIB, "a record costs as much as a read"
    running.node.kill()
    assert running.sent_twice() <= bound


def test_after_a_stop_no_byte_is_sent_again(place: Place, held: Callable[..., Held]) -> None:
    """Promised: A stop costs nothing: no byte that was received is fetched again."""
    running = held(place)
    assert running.node.stop() == 0
    assert running.sent_twice() == 0


@pytest.fixture
def middle(origin: Origin) -> Iterator[Hold]:
    """Holds what the origin sends of `/it`, 200 KiB or 6 MiB long, after 100 KiB."""
    hold = origin.hold("/it", after=100 * KIB)
    yield hold
    hold.release()


def test_after_a_stop_no_byte_of_a_small_file_is_sent_again(
    origin: Origin, node: Nodes, middle: Hold
) -> None:
    """One that would be published from memory, had it come."""
    content = noise(200 * KIB)
    ref = f"{origin.add('/it', content)}#sha256={hashlib.sha256(content).hexdigest()}"
    running = node(allow=[f"{origin.url}/"])
    running.pull(ref)
    assert middle.reached.wait(PATIENCE_SECONDS)
    until(lambda: not unread(origin))
    assert running.stop() == 0
    middle.release()
    running.start()
    assert running.ready("it").status == 200
    assert sent(origin) == len(content)


def test_after_a_cancel_no_byte_is_sent_again(
    origin: Origin, engine: Callable[..., Engine], middle: Hold
) -> None:
    ref = origin.add("/it", noise(6 * MIB))
    running = engine(streams=2)
    pulled = running.pulls.start(spec_of(ref))
    assert pulled is not None
    until(lambda: sent(origin) == 200 * KIB and not unread(origin))
    running.pulls.cancel("it")
    with pytest.raises(Cancelled):
        pulled.done.result(PATIENCE_SECONDS)
    middle.release()
    running.pull(ref)
    assert sent(origin) == 6 * MIB


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, None], ids=["Ctrl-C", "SIGTERM", "timeout"])
def test_after_the_end_of_a_direct_pull_no_byte_is_sent_again(
    origin: Origin, root: Path, middle: Hold, end: signal.Signals | None
) -> None:
    content = noise(6 * MIB)
    command = [*CACHD, "pull", origin.add("/it", content), "--direct"]
    options = ["--name", "it", "--root", str(root), "--allow", "127.0.0.0/8"]
    env = {**os.environ, "CACHD_RESERVE_FREE": "0"}
    limited = [] if end else ["--timeout", "5"]
    with Program([*command, *options, *limited], env=env) as running:
        until(lambda: sent(origin) == 200 * KIB and not unread(origin))
        if end:
            running.send_signal(end)
        assert running.wait(PATIENCE_SECONDS) == (130 if end else 4)
    middle.release()
    assert run([*command, *options], env=env, timeout=PATIENCE_SECONDS).returncode == 0
    assert sent(origin) == len(content)
    assert (root / "models/it/it").read_bytes() == content


def test_of_an_origin_without_ranges_what_was_received_is_kept_and_the_whole_is_sent_again(
    origin: Origin, node: Nodes
) -> None:
    content = noise(6 * MIB)
    origin.fault("/it", IgnoreRange())
    hold = origin.hold("/it", after=5 * MIB)
    running = node(allow=[f"{origin.url}/"])
    running.pull(origin.add("/it", content))
    assert hold.reached.wait(PATIENCE_SECONDS)
    until(lambda: not unread(origin))
    assert running.stop() == 0
    assert kept(running.root) == 5 * MIB
    hold.release()
    origin.forget()
    running.start()
    assert running.ready("it").status == 200
    assert running.metric("cachd_resumed_bytes_total") == 5 * MIB
    assert sent(origin) >= len(content)
    assert (running.root / "models/it/it").read_bytes() == content


HANGING = """
import os, runpy, sys, time
os.fdatasync = lambda fd: time.sleep(600)  # one that hangs in the kernel holds up even a kill
sys.argv = sys.argv[3:]
runpy.run_module("cachd", run_name="__main__")
"""


def test_a_stop_ends_in_time_though_a_sync_hangs_and_costs_nothing(origin: Origin, tmp_path: Path) -> None:
    ref = origin.add("/it", noise(12 * MIB))
    with Node(tmp_path / "node", before=(sys.executable, "-c", HANGING)) as stuck:
        stuck.pull(ref)
        until(lambda: kept(stuck.root) == 12 * MIB)
        began = time.monotonic()
        assert stuck.stop() == -signal.SIGALRM
        assert time.monotonic() - began < 30, "as long as a kubelet waits"
    with Node(tmp_path / "node") as running:
        assert running.ready("it").status == 200
        assert sent(origin) == 12 * MIB


SIGNALLED = """
import gc, os, runpy, signal, sys
set_threshold = gc.set_threshold  # called after the log line `listening`, before the server runs
gc.set_threshold = lambda *counts: (set_threshold(*counts), os.kill(os.getpid(), signal.{}))
sys.argv = sys.argv[3:]
runpy.run_module("cachd", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_stop_signal_before_the_server_runs_is_a_clean_stop(
    origin: Origin, tmp_path: Path, number: signal.Signals
) -> None:
    hold = origin.hold("/it", after=MIB)
    ref = origin.add("/it", noise(6 * MIB))
    with Node(tmp_path / "node", {"models": [{"ref": ref, "name": "it"}]}) as first:
        assert hold.reached.wait(PATIENCE_SECONDS)
        first.kill()
    pending = tmp_path / "node/.cachd/pending"
    assert (pending / "it.began").read_text() == "1"
    command = [sys.executable, "-c", SIGNALLED.format(number.name), *CACHD, "serve"]
    options = ["--root", str(first.root), "--config", str(first.config)]
    ended = run(
        [*command, *options], env={**os.environ, "CACHD_LOG_FORMAT": "json"}, timeout=PATIENCE_SECONDS
    )
    assert ended.returncode == 0, ended.stderr
    log = [json.loads(line) for line in ended.stderr.splitlines()]
    assert log[-1]["event"] == "stopped"
    assert {each["state"] for each in log if each["event"] == "pull ended"} <= {"interrupted"}
    hold.release()
    assert (pending / "it.json").exists(), "the next start goes on with it"
    assert not (pending / "it.began").exists(), "it was no death"
