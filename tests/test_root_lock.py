"""The lock of a root, and the note in it that says who has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachd.errors import DiskFailed, InUse
from cachd.store.root_lock import holder, take_lock, take_shared_lock, wait_until_free
from tests.ground.site import until

HOLD = """
import sys
from pathlib import Path
from cachd.store.root_lock import take_lock
take_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "root/.cachd").mkdir(parents=True)
    return tmp_path / "root/.cachd/lock"


@pytest.fixture
def other(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def free_again(lock: Path) -> None:
    os.close(take_lock(lock))


def test_a_lock_is_had_once_and_says_by_whom(lock: Path) -> None:
    fd = take_lock(lock)
    who, own = lock.read_text().splitlines()
    assert who.startswith(f"pid {os.getpid()} on ")
    assert own.split(" ")[:2] == [str(os.getpid()), str(lock.stat().st_ino)]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert own.split(" ", 2)[2] == f"{boot} {os.readlink('/proc/self/ns/pid')} {started}"
    os.utime(lock, (1e9, 1e9))
    assert holder(lock) == "", "this process is no other"
    for take in (take_lock, take_shared_lock):
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(InUse) as refusal:
            take(lock)
        assert refusal.value.code == "root_locked"
        assert who in refusal.value.detail
        assert str(lock.parent.parent) in refusal.value.detail
        assert ("since 2001-09-09T01:46:40Z" in refusal.value.detail) == (take is take_lock)
        assert sorted(os.listdir("/proc/self/fd")) == before
    os.close(fd)
    free_again(lock)


def test_a_shared_lock_is_had_by_many_and_keeps_out_who_wants_the_root_alone(lock: Path) -> None:
    shared = [take_shared_lock(lock) for _ in range(2)]
    with pytest.raises(InUse) as refusal:
        take_lock(lock)
    assert (refusal.value.code, "(unknown, since" in refusal.value.detail) == ("root_locked", True)
    assert holder(lock) == ""
    for fd in shared:
        os.close(fd)
    free_again(lock)


def test_the_holder_is_known_while_it_runs(lock: Path, other: subprocess.Popen[str]) -> None:
    note = lock.read_text()
    assert holder(lock).startswith(f"pid {other.pid} on ")
    copied = lock.with_name("copied")  # with another root, by a backup
    copied.write_text(note)
    assert holder(copied) == ""
    free_again(copied)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert holder(lock) == "", "it has ended, though nobody has asked how"
    other.wait()
    assert holder(lock) == ""
    wait_until_free(lock)
    free_again(lock)


def test_a_process_that_runs_keeps_the_root_even_if_its_lock_was_lost(
    lock: Path, other: subprocess.Popen[str]
) -> None:
    """Some network file systems grant the same lock to several nodes."""
    note, again = lock.read_text(), lock.with_name("again")
    again.touch()
    who, own = note.splitlines()
    pid, inode, identity = own.split(" ", 2)
    for noted, is_held in (
        (f"{pid} {again.stat().st_ino} {identity}", True),
        (f"{pid} {again.stat().st_ino} {identity}0", False),
        (f"{pid} {again.stat().st_ino} ", False),
        (f"{pid} {inode} {identity}", False),
        (f"{os.getpid()} {again.stat().st_ino} {identity}", False),
        (f"x {again.stat().st_ino} {identity}", False),
        ("", False),
    ):
        again.write_text(f"{who}\n{noted}\n")
        assert holder(again) == (who if is_held else "")
        for take in (take_shared_lock, take_lock):
            again.write_text(f"{who}\n{noted}\n")
            if is_held:
                with pytest.raises(InUse, match=f"pid {pid} on "):
                    take(again)
            else:
                os.close(take(again))


def waits(lock: Path) -> bool:
    """Whether the kernel lets somebody wait for the lock (man 5 proc: locks)."""
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(f":{lock.stat().st_ino} " in line for line in waiting)


def test_who_waits_for_a_root_waits_for_every_process_that_has_a_lock(lock: Path) -> None:
    fd = take_shared_lock(lock)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(wait_until_free, lock)
        try:
            until(lambda: waits(lock) or waiting.done())
            assert not waiting.done()
        finally:
            os.close(fd)
        waiting.result()
    free_again(lock)


def test_nobody_waits_for_a_root_that_nobody_made(lock: Path) -> None:
    for take in (take_lock, take_shared_lock):
        with pytest.raises(DiskFailed):
            take(lock.with_name("absent") / "lock")
    with pytest.raises(DiskFailed):
        wait_until_free(lock)
