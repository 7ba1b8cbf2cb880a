"""What the tests share: origins, roots, and the engine or the whole daemon over them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import threading
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hypothesis
import pytest
import pytest_asyncio

from cachd.config import Config
from cachd.daemon.parts import Daemon, assembled
from cachd.kernel import durable
from cachd.model import Digest, ModelSpec, Snapshot
from cachd.store.disk_store import DiskStore
from cachd.store.withdrawals import Withdrawals
from cachd.transfer.request import Pull
from tests.ground.bucket import Bucket
from tests.ground.chance import examples
from tests.ground.hub import Hub
from tests.ground.needs import refuse, require
from tests.ground.node import Node, short_name
from tests.ground.origin import Origin
from tests.ground.pause import paused_before
from tests.ground.proxy import Listener, Proxy
from tests.ground.report import LONG_TESTS, Reporter
from tests.ground.s3 import S3Server
from tests.ground.site import Ground
from tests.ground.small import MIB, Small

if TYPE_CHECKING:
    from tests.ground.in_process import Api

T = TypeVar("T")
# What a user's own habits would change: the daemons of the tests hear of it from their tests alone.
HABITS = ("HF_", "HUGGING", "AWS_", "CACHD_", "SSL_CERT_", "REQUESTS_", "CURL_")
OWN = "CACHD_MACHINE_"  # how long test_machine.py goes on
for name in [*os.environ]:
    if name.lower().endswith("_proxy") or (name.startswith(HABITS) and not name.startswith(OWN)):
        del os.environ[name]
os.environ["HF_HOME"] = "/nonexistent"  # and not the token of their login
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"  # mkfs, nginx
os.umask(0o022)  # modes are part of what is promised
hypothesis.settings.register_profile("any machine", examples())
hypothesis.settings.load_profile("any machine")
signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored if a shell's background runs us

PATIENCE_SECONDS = 120.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tally", type=Path, help="write what became of each test there, and no summary of it")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker's tests are reported by whoever started it
        config.pluginmanager.register(Reporter(config.getoption("tally")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files with long tests come first: one that began last would keep the other processes waiting."""
    long = {name.partition("::")[0] for name in tomllib.loads(LONG_TESTS.read_text())}
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in long)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        require(*mark.args)


def paused_without_ready_file(work: Callable[[], T]) -> AbstractContextManager[Future[T]]:
    """Stop a withdrawal or an eviction when the ready file is gone, before cachd checks its users again."""
    return paused_before(durable.sync_directory, work, within=Withdrawals._remove_names)


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as started:
        yield started


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as started:
        yield started


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A scripted S3 server, whose keys are in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDSCRIPTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "said to nobody")
    with Bucket() as started:
        yield started


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as started:
        yield started


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty directory that a daemon may use."""
    made = tmp_path / "cache"
    made.mkdir(mode=0o755)
    return made


@pytest.fixture
def next_life(root: Path) -> Iterator[Callable[[], DiskStore]]:
    """Closes the store of the test's root and opens it as the next daemon does."""
    with ExitStack() as life:

        def opened() -> DiskStore:
            life.close()
            return life.enter_context(DiskStore(root))

        yield opened


@pytest.fixture
def store(next_life: Callable[[], DiskStore]) -> DiskStore:
    return next_life()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes empty file systems in memory: `small_disk(size_bytes, inodes=100)`."""
    require("mount")
    mounted: list[Path] = []

    def made(size: int, *, inodes: int = 10_000) -> Path:
        disk = tmp_path / f"disk-{len(mounted)}"
        disk.mkdir()
        options = f"size={size},nr_inodes={inodes},mode=0755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
        mounted.append(disk)
        return disk

    yield made
    for disk in mounted:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes small file systems, and an empty root on each: `disk(64 * MIB, kind="ext4")`."""
    with ExitStack() as stack:

        def made(size: int, *, kind: str = "tmpfs", inodes: int = 10_000) -> Path:
            require("mount", *(["root", "mkfs.ext4"] if kind == "ext4" else []))
            place = tmp_path / f"{kind}-{size}"
            place.mkdir()
            device, options = "tmpfs", f"size={size},nr_inodes={inodes},mode=0755"
            if kind == "ext4":
                device, options = str(place.with_suffix(".image")), "loop"
                Path(device).touch()
                os.truncate(device, size)
                subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", device], check=True)
            ended = subprocess.run(
                ["mount", "-t", kind, "-o", options, device, place], capture_output=True, text=True
            )
            if ended.returncode:
                refuse("loop", ended.stderr)
            stack.callback(partial(subprocess.run, ["umount", "--lazy", place], check=True))
            root = place / "root"
            root.mkdir(mode=0o755)
            return root

        yield made


@pytest_asyncio.fixture
async def api(root: Path) -> AsyncIterator[Api]:
    """The API of a daemon in this process, which may pull from servers of the tests."""
    from tests.ground.in_process import running  # the API's libraries: few tests need them

    allow = ("127.0.0.0/8", "http://127.0.0.1/")
    async with running(root=root, allow=allow, retries=0, reserve_free=0, reserve_inodes=0) as made:
        yield made


@pytest.fixture
def stops() -> Iterator[None]:
    """Keeps a stop from ending this process: drops the alarm of `end_in_time`, and restores the handlers."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = [(number, signal.getsignal(number)) for number in numbers]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # it also discards one that came meanwhile
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as started:
        yield started


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as started:
        yield started


class Engine:
    """cachd without its API, in this process: opened over a root, asked for models, closed."""

    def __init__(self, parts: Daemon) -> None:
        self.store, self.pulls, self.metrics = parts.store, parts.pulls, parts.metrics
        self.bandwidth, self.scrubs, self.reclaim = parts.bandwidth, parts.scrubs, parts.reclaim

    def begin(self, spec: ModelSpec, **how: Any) -> Pull:
        """Start a pull of a model that is not ready."""
        running = self.pulls.start(spec, **how)
        assert running is not None
        return running

    def pull(self, ref: str, **asked: Any) -> Snapshot:
        """Pull and wait. Raises what the pull failed with."""
        replace = bool(asked.pop("replace", False))
        spec = spec_of(ref, **asked)
        running = self.pulls.start(spec, replace=replace)
        if running is not None:
            return running.done.result(PATIENCE_SECONDS)
        ready = self.store.names.get(spec.name)
        assert ready is not None
        return ready


def spec_of(ref: str, *, name: str | None = None, **patterns: Any) -> ModelSpec:
    """The spec of a model, under a short name if the test gives none."""
    return ModelSpec.asked(ref, name or short_name(ref), **patterns)


@pytest.fixture
def engine(root: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """Opens engines over the test's root: `engine()`, or with other options, `engine(streams=2)`."""
    before = set(threading.enumerate())
    with ExitStack() as stack:

        def opened(**options: object) -> Engine:
            plain: dict[str, Any] = {
                "root": root,
                "allow": ("127.0.0.0/8", "http://127.0.0.1/"),
                "retries": 3,
                "reserve_free": 0,
                **options,
            }
            return Engine(stack.enter_context(assembled(Config(**plain))))

        yield opened
    ours = ("stream", "pull", "hash", "commit", "verify", "scrub", "presence", "sweep")
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith(ours)]
    assert not left, f"threads left behind: {left}"


@pytest.fixture
def small(disk: Callable[..., Path], engine: Callable[..., Engine], origin: Origin) -> Small:
    """Room for four models of 8 MiB and something beside."""
    return Small(engine(root=disk(40 * MIB), reserve_free=4 * MIB), origin)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts daemons: `node()`, or with options of the configuration file, `node(streams=2)`."""
    with ExitStack() as stack:

        def started(root: str = "node", env: dict[str, str] | None = None, **options: object) -> Node:
            return stack.enter_context(Node(tmp_path / root, options, **(env or {})))

        yield started


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """One daemon for all tests of a file; each uses names of its own."""
    root = tmp_path_factory.mktemp("shared") / "node"
    with Origin() as origin, Hub() as hub:
        options = {"hf_endpoint": hub.url, "retries": 0, "streams": 4}
        with Node(root, options) as node:
            yield Ground(node, origin, hub)


@pytest.fixture
def alone(origin: Origin, hub: Hub, node: Callable[..., Node]) -> Callable[..., Ground]:
    """Starts a daemon that a test has to itself: `alone(pulls=1)`."""

    def started(**options: object) -> Ground:
        plain = {"hf_endpoint": hub.url, "retries": 0, "streams": 4}
        return Ground(node(**{**plain, **options}), origin, hub)

    return started


def sha256_of(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest_of(path: Path, algorithm: str) -> Digest:
    """The digest of a file computed here, by the standard library or a second implementation."""
    content = path.read_bytes()
    if algorithm == "git-sha1":
        return Digest(algorithm, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    return Digest(algorithm, hashlib.new(algorithm, content).hexdigest())
