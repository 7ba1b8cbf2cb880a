"""A shared volume that fails, hangs or changes holds up nobody but those who ask for it (C21, C22)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from cachd.errors import Unavailable
from cachd.model import Extent, Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.cancel import CancelToken
from cachd.sources.shared_volume import MAX_LEFT, SharedVolumeSource
from tests.conftest import Engine, spec_of
from tests.ground.disks import FuseDisk
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import until
from tests.ground.strace import injected, needs_strace

MIB = 1 << 20
PATIENCE_SECONDS = 120.0
SOON_SECONDS = 0.2
Engines = Callable[..., Engine]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A file of a shared volume."""
    (tmp_path / "share").mkdir()
    (tmp_path / "share/it").write_bytes(noise(6 * MIB))
    return tmp_path / "share/it"


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[FuseDisk, Path]]:
    """A shared volume whose calls can hang, and a file of it."""
    place = tmp_path / "hanging"
    place.mkdir()
    with FuseDisk(place) as disk:
        (disk.path / "it").write_bytes(noise(6 * MIB))
        yield disk, disk.path / "it"


@contextmanager
def hung(disk: FuseDisk) -> Iterator[Callable[[], bool]]:
    """Whoever opens a file inside waits until the end of the block, as for a server that is gone.

    Gives whether somebody waits.
    """
    answers = disk.path.parent / "answers"
    disk.fail("open", match="/it", until=str(answers))
    try:
        yield answers.with_suffix(".met").exists
    finally:
        disk.heal()
        answers.touch()


def left_behind() -> int:
    return sum(thread.name == "detached" for thread in threading.enumerate())


def published(root: Path) -> bytes:
    return (root / "models/it/it").read_bytes()


def test_a_share_that_hangs_ends_its_own_pull_and_holds_up_no_other(
    hanging: tuple[FuseDisk, Path], origin: Origin, root: Path, engine: Engines
) -> None:
    disk, shared = hanging
    allow = [f"file://{shared.parent}/", "127.0.0.0/8"]
    running = engine(allow=allow, streams=1, retries=1, stall_seconds=SOON_SECONDS)
    with hung(disk) as is_met:
        pulled = running.pulls.start(spec_of(f"file://{shared}"))
        assert pulled is not None
        until(is_met)
        running.pull(origin.add("/other", noise(6 * MIB)))
        with pytest.raises(Unavailable) as refusal:
            pulled.done.result(PATIENCE_SECONDS)
        assert refusal.value.code == "stalled"
        assert str(shared) in refusal.value.detail
    until(lambda: not left_behind())
    until(partial(pulled_at_last, running, shared))
    assert published(root) == noise(6 * MIB)


def pulled_at_last(running: Engine, shared: Path) -> bool:
    """Pull once more. A sound share, too, may be late for so short a wait."""
    with suppress(Unavailable):
        return running.pull(f"file://{shared}").files == 1
    return False


def test_a_share_that_answers_late_is_waited_for(
    hanging: tuple[FuseDisk, Path], root: Path, engine: Engines
) -> None:
    disk, shared = hanging
    running = engine(allow=[f"file://{shared.parent}/"], stall_seconds=PATIENCE_SECONDS, retries=0)
    disk.fail("open", match="/it", delay=1.0)
    running.pull(f"file://{shared}")
    assert published(root) == noise(6 * MIB)


def test_a_pull_from_a_share_that_hangs_is_deleted_at_once(
    hanging: tuple[FuseDisk, Path], engine: Engines
) -> None:
    disk, shared = hanging
    running = engine(allow=[f"file://{shared.parent}/"], stall_seconds=4 * PATIENCE_SECONDS)
    with hung(disk) as is_met, ThreadPoolExecutor(1) as other:
        running.pulls.start(spec_of(f"file://{shared}"))
        until(is_met)
        other.submit(running.pulls.delete, "it").result(PATIENCE_SECONDS)
        assert running.pulls.get("it") is None
        assert left_behind(), "the share still hangs"
    until(lambda: not left_behind())


def test_a_mount_that_numbers_its_files_anew_at_each_look_is_as_good_as_any(
    hanging: tuple[FuseDisk, Path], root: Path, engine: Engines
) -> None:
    disk, shared = hanging
    (disk.path / "again").mkdir()
    os.link(shared, disk.path / "again/it")
    disk.fail("renumber")
    assert shared.stat().st_ino != shared.stat().st_ino
    running = engine(allow=[f"file://{shared.parent}/"], retries=0)
    running.pull(f"file://{shared}")
    assert published(root) == noise(6 * MIB)
    running.pull(f"file://{disk.path}", name="all")
    assert (root / "models/all/again/it").read_bytes() == noise(6 * MIB)


def test_a_share_whose_disk_fails_is_told_with_its_path(hanging: tuple[FuseDisk, Path]) -> None:
    disk, shared = hanging
    source = SharedVolumeSource(AddressPolicy([f"file://{shared.parent}/"]), stall_seconds=PATIENCE_SECONDS)
    (file,) = source.resolve(Ref.parse(f"file://{shared}"), CancelToken()).files
    disk.fail("open", "EIO")
    with pytest.raises(Unavailable) as refusal:
        source.open(file, Extent(0, file.size), CancelToken())
    assert refusal.value.code == "share_failed"
    assert str(shared) in refusal.value.detail


def test_a_share_that_hangs_takes_so_many_threads_and_no_more(hanging: tuple[FuseDisk, Path]) -> None:
    disk, shared = hanging
    source = SharedVolumeSource(AddressPolicy([f"file://{shared.parent}/"]), stall_seconds=0.001)
    (file,) = (
        SharedVolumeSource(AddressPolicy([f"file://{shared.parent}/"]), stall_seconds=PATIENCE_SECONDS)
        .resolve(Ref.parse(f"file://{shared}"), CancelToken())
        .files
    )
    with hung(disk):
        for _ in range(20 * MAX_LEFT):  # on a busy machine a call before the hanging one may be late, too
            with pytest.raises(Unavailable) as refusal:
                source.open(file, Extent(0, file.size), CancelToken())
            if "earlier calls" in refusal.value.detail:
                break
        assert f"{MAX_LEFT} earlier calls" in refusal.value.detail
        assert left_behind() == MAX_LEFT
    until(lambda: not left_behind())


@needs_strace
@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO], ids=errno.errorcode.get)
def test_a_share_that_fails_in_mid_file_is_asked_again_for_the_rest(
    shared: Path, root: Path, code: int
) -> None:
    allowed = f"file://{shared.parent}/"
    env = {**os.environ, "CACHD_ALLOW": allowed, "CACHD_STREAMS": "1", "CACHD_RESERVE_FREE": "0"}
    command = [sys.executable, "-m", "cachd", "pull", f"file://{shared}", "--name", "it", "--direct"]
    command += ["--root", str(root)]
    fault = f"/^preadv:error={errno.errorcode[code]}:when=3"  # in each thread, and each asking has its own
    ended = subprocess.run(
        injected(command, fault, on=shared), env=env, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert published(root) == noise(6 * MIB)
