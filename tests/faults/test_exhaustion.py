"""Descriptors and threads run out: cachd does less at once, says so, and leaks nothing."""

from __future__ import annotations

import gc
import hashlib
import http.client
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.errors import Unavailable
from cachd.store import catalog
from cachd.store.disk_store import DiskStore
from tests.faults.test_crowd import opened
from tests.ground.models import digests, noise, write_sha256sums
from tests.ground.needs import needs
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import files_left, until

MIB = 1 << 20
PATIENCE_SECONDS = 120
OTHER_USER = 10007
FILES = {f"shard-{number:02}.bin": noise(300_000 + number, number) for number in range(24)}
SUMS = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def descriptors_at_rest(node: Node) -> int:
    """Counted once a new connection was answered, and with it: those closed before are closed there, too."""
    url = urlsplit(node.url)
    connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=PATIENCE_SECONDS)
    with closing(connection):
        connection.request("GET", "/livez")
        assert connection.getresponse().read()
        return descriptors(node.pid)


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@contextmanager
def limited(pid: int, kind: int, soft: int) -> Iterator[None]:
    """A process whose limit of a resource is this low meanwhile."""
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, before)


@contextmanager
def crowded(left: int) -> Iterator[None]:
    """This process with so many descriptors left."""
    with ExitStack() as stack, open(os.devnull) as null:
        most = max(map(int, os.listdir("/proc/self/fd"))) + 2 + left
        stack.enter_context(limited(os.getpid(), resource.RLIMIT_NOFILE, most))
        gc.collect()  # what an earlier test left behind may hold descriptors, and give one back in mid-test
        taken = []
        with suppress(OSError):
            while True:
                taken.append(os.dup(null.fileno()))
        for descriptor in taken[:left]:
            os.close(descriptor)
        for descriptor in taken[left:]:
            stack.callback(os.close, descriptor)
        yield


# --- descriptors ---


def test_a_daemon_of_few_descriptors_pulls_a_model_of_many_files(origin: Origin, tmp_path: Path) -> None:
    """Thirty-two streams would have three open each; how many are at work decides whether there are too few.

    That a stream waits for them and goes on shows the next test. A pull that ends for want of them, when it
    publishes, is asked for again, as its answer says.
    """
    ref = origin.add_model("model", FILES)
    with Node(tmp_path / "node", before=("prlimit", "--nofile=40")) as node:
        node.pull(ref)
        while (answer := node.ready("model")).status == 503:
            assert answer.document["code"] == "too_many_files", answer.document
            node.pull(ref)
        assert answer.status == 200
        assert digests(node.root / "models/model") == SUMS
        assert "Traceback" not in node.output


def kept_alive(node: Node, origin: Origin) -> int:
    """The daemon's connections to an origin: idle ones are kept for the next pull."""
    port = f":{urlsplit(origin.url).port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    theirs = {f"socket:[{fields[9]}]" for fields in lines if fields[2].endswith(port)}
    held = []
    for link in Path(f"/proc/{node.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            held.append(os.readlink(link))
    return sum(link in theirs for link in held)


def test_a_pull_without_descriptors_waits_for_them_and_leaves_none_behind(
    origin: Origin, tmp_path: Path
) -> None:
    """But idle connections to its origin, of which there are never more than streams and those that ask."""
    held, running = [], []
    with Node(tmp_path / "node", {"streams": 4, "pulls": 1, "retries": 20}) as node:
        until(lambda: node.metric("cachd_view_watches") > 0)  # what watches has its descriptors
        for name in ("first", "second"):
            ref = origin.add_model(name, FILES)
            hold = origin.hold("*", after=200_000)  # a stream in its first file: most come later
            assert node.pull(ref).status == 202
            assert hold.reached.wait(PATIENCE_SECONDS)
            with limited(node.pid, resource.RLIMIT_NOFILE, 8):
                hold.release()
                node.wait_for("part will be retried", code="too_many_files")
            assert node.ready(name).status == 200
            assert digests(node.root / "models" / name) == SUMS
            assert node.ask("DELETE", f"/v1/models/{name}").status == 200
            held.append(descriptors_at_rest(node) - kept_alive(node, origin))
            running.append(threads(node.pid))
            node.log.clear()
        assert kept_alive(node, origin) <= 4 + 16
        assert files_left(node.root) == []
        assert "Traceback" not in node.output
    assert held[1] <= held[0], "no more than after the first"
    assert running[1] <= running[0]


def test_idle_connections_take_a_part_of_the_descriptors_and_give_way_to_a_request(tmp_path: Path) -> None:
    with Node(tmp_path / "node", before=("prlimit", "--nofile=128")) as node:
        assert node.ask("GET", "/livez").status == 200
        before, url = descriptors(node.pid), urlsplit(node.url)
        with ExitStack() as crowd:
            for _ in range(400):
                crowd.enter_context(socket.create_connection((url.hostname, url.port), PATIENCE_SECONDS))
            assert node.ask("GET", "/livez").status == 200
            until(lambda: descriptors(node.pid) <= before + 128 // 4)
        until(lambda: descriptors(node.pid) <= before + 8)  # the daemon itself may have opened some
        assert node.ask("GET", "/livez").status == 200
        assert "Traceback" not in node.output


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A model on a share: no socket of an origin comes or goes while descriptors are counted."""
    place = tmp_path / "model"
    place.mkdir()
    for path, content in FILES.items():
        (place / path).write_bytes(content)
    return write_sha256sums(place).parent


def test_a_record_that_cannot_be_opened_for_want_of_a_descriptor_is_not_given_up(
    shared: Path, root: Path
) -> None:
    """One that is no record is given up: a ready file is withdrawn, a manifest's blobs are left behind."""
    with opened(root, allow=(f"file://{shared.parent}/",)) as running:
        snapshot = running.pull(f"file://{shared}")
        layout = running.store.layout
        for read in (
            lambda: catalog.read_manifest(layout, snapshot.manifest),
            lambda: catalog.read_shown(layout.manifest(snapshot.manifest)),
            lambda: running.store.protection.is_in_use(running.store.manifests.of(snapshot)),
        ):
            with crowded(0), pytest.raises(Unavailable) as refusal:
                read()
            assert refusal.value.code == "too_many_files"
    for left in range(20):
        with crowded(left):
            try:
                DiskStore(root).close()
                break
            except Unavailable as error:
                if error.code != "too_many_files":
                    raise
    assert left > 0
    with DiskStore(root) as store:
        assert [kept.manifest for kept in store.names.all()] == [snapshot.manifest]


def test_however_few_descriptors_a_delete_finds_it_frees_all_in_the_end(shared: Path, root: Path) -> None:
    with opened(root, allow=(f"file://{shared.parent}/",)) as running:
        running.pull(f"file://{shared}")
        until(lambda: not any(thread.name == "detached" for thread in threading.enumerate()))  # all is closed
        for left in range(20):
            with crowded(left):
                try:
                    running.pulls.delete("model")
                    break
                except Unavailable as error:
                    if error.code != "too_many_files":
                        raise
        assert left > 0
        assert files_left(root) == []


# --- threads ---


def as_another_user() -> tuple[str, ...]:
    """The words before a command that run it as a user who has nothing else: root's threads are unlimited."""
    if os.geteuid() != 0:
        return ()
    return ("setpriv", f"--reuid={OTHER_USER}", "--inh-caps=+dac_override", "--ambient-caps=+dac_override")


@contextmanager
def no_more_threads(pid: int) -> Iterator[None]:
    """A process of that user that gets no thread beside those it has."""
    limit = [*as_another_user(), "prlimit", f"--pid={pid}"]
    subprocess.run([*limit, "--nproc=1:"], check=True)
    try:
        yield
    finally:
        subprocess.run([*limit, "--nproc=1000:"], capture_output=True)  # it may have ended


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory for a root, where any user gets to."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        made = Path(directory, "node")
        made.mkdir(mode=0o755)
        if os.geteuid() == 0:
            os.chown(made, OTHER_USER, -1)
        yield made


@needs("root")
@pytest.mark.parametrize("most", [1, 33, 50, 74], ids=["streams", "hashing", "the API", "the last"])
def test_a_start_that_gets_too_few_threads_says_so_and_ends(place: Path, most: int) -> None:
    refused = subprocess.run(
        [
            *(*as_another_user(), "prlimit", f"--nproc={most}"),
            *(sys.executable, "-m", "cachd", "serve", "--root", place, "--listen", "127.0.0.1:0"),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert refused.returncode == 9, refused.stderr
    assert "code: no_threads" in refused.stderr
    assert "ulimit -u" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_daemon_needs_no_thread_more_than_it_started_with(origin: Origin, place: Path) -> None:
    with Node(place, before=as_another_user()) as node:
        ref, single = origin.add_model("model", FILES), origin.add("/single.bin", noise(6 * MIB))
        with no_more_threads(node.pid):
            assert node.pull(single, pin=True).status == 202
            assert node.ready("single.bin").status == 200
            assert node.ask("GET", "/readyz").status == 200
            assert node.ask("DELETE", "/v1/models/single.bin?force=true").status == 200
            node.pull(ref)
            node.wait_for("resolve will be retried", name="model", code="no_threads")
        assert node.ready("model").status == 200
        assert digests(node.root / "models/model") == SUMS
        with no_more_threads(node.pid):
            assert node.stop() == 0
        assert "Traceback" not in node.output
