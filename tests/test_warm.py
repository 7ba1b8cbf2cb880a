"""Memory as a tier: how much of a model is in it, bringing it there, and leaving pods their memory."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from cachd.errors import NoSpace
from cachd.kernel import calls
from cachd.upkeep.warms import Warming, Warms
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.meanwhile import meanwhile
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import MIB, PATIENCE_SECONDS, Ground

SIZE = 24 * MIB
MAP_LOCKED = 0x2000


def resident(path: Path) -> int:
    with path.open("rb") as opened:
        return calls.resident_bytes(opened.fileno(), 0, SIZE)


def chill(path: Path) -> None:
    """Let the kernel forget the file's pages."""
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("this directory is in memory itself (tmpfs): nothing there is ever cold")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep the file's pages in memory meanwhile: some kernels take back what nobody touched for seconds.

    Where the process may not lock so much memory (RLIMIT_MEMLOCK), it touches them again and again.
    """
    with path.open("rb") as opened, ExitStack() as undo:
        try:
            flags = mmap.MAP_SHARED | MAP_LOCKED
            undo.enter_context(mmap.mmap(opened.fileno(), 0, flags, mmap.PROT_READ))
        except (BlockingIOError, PermissionError):
            pages = undo.enter_context(mmap.mmap(opened.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ))
            undo.enter_context(touched(pages))
        yield


def touched(pages: mmap.mmap) -> AbstractContextManager[None]:
    """Read a byte of each page ten times a second meanwhile."""

    def touch(ended: threading.Event) -> None:
        while not ended.wait(0.1):
            pages[:: mmap.PAGESIZE]

    return meanwhile(touch)


def have(ground: Ground, name: str) -> Path:
    ground.have(name, SIZE)
    return ground.node.root / "models" / name / name


def test_a_cold_model_is_read_into_memory_once(ground: Ground) -> None:
    shown = have(ground, "cold")
    chill(shown)
    assert ground.show("cold")["resident_bytes"] == 0
    before = ground.node.metric("cachd_warmed_bytes_total")
    assert ground.node.ask("POST", "/v1/models/cold/warm").status == 202
    ground.node.wait_for("warmed", name="cold", state="warm", loaded_bytes=SIZE)
    told = ground.show("cold")
    assert told["warming"]["bytes"] == {"total": SIZE, "done": SIZE, "loaded": SIZE}
    assert told["resident_bytes"] == resident(shown) == SIZE
    assert ground.node.metric("cachd_warmed_bytes_total") - before == SIZE
    assert ground.node.metric("cachd_model_resident_bytes", model="cold") == SIZE
    with held(shown):
        ground.node.ask("POST", "/v1/models/cold/warm")
        ground.node.wait_for("warmed", name="cold", state="warm", loaded_bytes=0)


def test_only_what_is_not_in_memory_is_read(ground: Ground) -> None:
    shown = have(ground, "tepid")
    chill(shown)
    with shown.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        os.pread(opened.fileno(), 10 * MIB, 0)
    ground.node.ask("POST", "/v1/models/tepid/warm")
    assert ground.node.wait_for("warmed", name="tepid")["loaded_bytes"] == SIZE - 10 * MIB
    assert resident(shown) == SIZE


def test_a_model_that_the_configuration_wants_warm_is_warmed_when_it_is_ready(
    hub: Hub, node: Callable[..., Node]
) -> None:
    for name in ("hot", "plain"):
        hub.add(f"org/{name}", {"model.safetensors": noise(SIZE, len(name))})
    wanted = [
        {"ref": "hf://org/plain", "name": "plain"},
        {"ref": "hf://org/hot", "name": "hot", "warm": True},
    ]
    running = node(hf_endpoint=hub.url, models=wanted)
    assert running.wait_for("warmed", name="hot")["state"] == "warm"
    assert running.ready("plain").status == 200
    running.kill()
    for name in ("hot", "plain"):
        chill(running.root / f"models/{name}/model.safetensors")
    running.start()
    assert running.wait_for("warmed", name="hot")["loaded_bytes"] == SIZE
    assert resident(running.root / "models/hot/model.safetensors") == SIZE
    assert resident(running.root / "models/plain/model.safetensors") == 0


def warmed(opened: Engine, name: str, room: int) -> Warming:
    """Warm a model where memory has so much room, to the end."""
    warms = Warms(opened.store, opened.metrics, space=lambda: room)
    try:
        warming = warms.warm(name)
        warming.ended.wait(PATIENCE_SECONDS)
        return warming
    finally:
        warms.close()


def test_a_model_is_not_warmed_where_it_would_push_other_models_out(
    origin: Origin, engine: Callable[..., Engine]
) -> None:
    opened = engine()
    for name in ("here", "there"):
        opened.pull(origin.add(f"/{name}", noise(SIZE, len(name))))
    here, there = (opened.store.layout.root / f"models/{name}/{name}" for name in ("here", "there"))
    chill(here)
    assert there.read_bytes()
    refused = warmed(opened, "here", 2 * SIZE - 1)
    assert isinstance(refused.error, NoSpace)
    assert (refused.error.code, refused.error.facts["need"]) == ("no_memory", SIZE)
    assert resident(here) == 0
    assert warmed(opened, "here", 2 * SIZE).state == "warm"
    assert resident(here) == SIZE
    assert warmed(opened, "here", 0).state == "warm"  # it is there already


def test_the_command_warms_and_tells_what_it_read(ground: Ground) -> None:
    shown = have(ground, "commanded")
    chill(shown)
    ended = ground.node.cli("warm", "commanded")
    assert (ended.returncode, ended.stdout) == (
        0,
        "commanded: 25.2 MB in memory; 25.2 MB of them were read from the disk\n",
    )
    with held(shown):
        told = json.loads(ground.node.cli("warm", "commanded", "-o", "json").stdout)
    assert (told["state"], told["bytes"]["loaded"]) == ("warm", 0)
    assert ground.node.cli("warm", "unheard-of").returncode == 3


NO_CACHESTAT = """
import ctypes, errno, json, struct, sys
from cachd.kernel.calls import resident_bytes
LOAD, EQUAL, RETURN, REFUSED = 0x20, 0x15, 0x06, 0x00050000 | errno.ENOSYS  # man 2 seccomp
steps = [(LOAD, 0, 0, 0), (EQUAL, 0, 1, 451), (RETURN, 0, 0, REFUSED), (RETURN, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("HBBI", *step) for step in steps)
held = ctypes.create_string_buffer(program, len(program))
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]
libc, given = ctypes.CDLL(None, use_errno=True), Filter(len(steps), ctypes.addressof(held))
assert libc.prctl(38, 1, 0, 0, 0) == libc.prctl(22, 2, ctypes.byref(given)) == 0, ctypes.get_errno()
assert libc.syscall(451, 0, None, None, 0) == -1 and ctypes.get_errno() == errno.ENOSYS
with open(sys.argv[1], "rb") as opened:
    print(json.dumps([resident_bytes(opened.fileno(), *extent) for extent in json.loads(sys.argv[2])]))
"""


def test_mincore_tells_the_same_where_the_kernel_has_no_cachestat(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(SIZE - 100))
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
    chill(path)
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(opened.fileno(), MIB, 3 * MIB)
        extents = [(0, SIZE), (0, MIB), (3 * MIB + 5, 5 * MIB), (4 * MIB - 1, 4 * MIB), (SIZE, SIZE + 5)]
        extents.append((3 * MIB - 1, 3 * MIB + 1))  # two pages, the second in memory
        told = [calls.resident_bytes(opened.fileno(), *extent) for extent in extents]
        command = [sys.executable, "-c", NO_CACHESTAT, str(path), json.dumps(extents)]
        assert json.loads(subprocess.run(command, capture_output=True, check=True).stdout) == told
        assert told == [MIB, 0, MIB, 1, 0, 2]
