"""What cachd asks of the kernel directly: I/O priority, leases, inotify, pages in memory, file systems."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cachd.errors import DiskFailed
from cachd.kernel import calls, file_systems, inotify, leases
from tests.test_durable import leased

PAGE = mmap.PAGESIZE


def io_class(*change: str) -> str:
    """The I/O class of this thread, as another program sees it."""
    thread = str(threading.get_native_id())
    if change:
        subprocess.run(["ionice", *change, "-p", thread], check=True)
    shown = subprocess.run(["ionice", "-p", thread], check=True, capture_output=True, text=True)
    return shown.stdout.partition(":")[0].strip()


def test_a_thread_that_reads_when_idle_has_the_idle_class_and_no_other_has() -> None:
    seen: list[object] = []

    def modest() -> None:
        seen.append(io_class("-c", "2", "-n", "4"))
        seen.append(calls.read_when_idle())
        seen.append(io_class())

    before = io_class()
    thread = threading.Thread(target=modest)
    thread.start()
    thread.join()
    assert seen == ["best-effort", True, "idle"]
    assert io_class() == before


def test_bytes_in_memory_are_counted_by_pages_within_the_extent_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE + 5))
    with path.open("rb") as opened:
        opened.read()
        fd = opened.fileno()
        for (start, stop), expected in {
            (0, 3 * PAGE + 5): 3 * PAGE + 5,
            (0, 10 * PAGE): 3 * PAGE + 5,
            (PAGE, 2 * PAGE): PAGE,
            (PAGE + 1, PAGE + 2): 1,
            (PAGE, PAGE): 0,
            (2 * PAGE, PAGE): 0,
            (3 * PAGE + 5, 4 * PAGE): 0,
        }.items():
            assert calls.resident_bytes(fd, start, stop) == expected
            if start < min(stop, 3 * PAGE + 5):
                assert calls._mincore(fd, start, min(stop, 3 * PAGE + 5) - start) * PAGE >= expected
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="No such device"):
        calls._mincore(reader, 0, 1)
    os.close(reader)
    os.close(writer)


# --- leases ---


def has_leases(probe: Path) -> bool:
    """Whether this file system knows leases (man 2 fcntl, F_SETLEASE)."""
    with probe.open("w") as opened:
        try:
            fcntl.fcntl(opened, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            return False
    return True


def test_a_file_is_open_as_long_as_anybody_has_it_open(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"x")
    other.touch()
    if not has_leases(tmp_path / "probe"):
        pytest.skip("this file system has no leases")
    descriptors = os.listdir("/proc/self/fd")
    assert leases.reports_open_files(tmp_path / "probe")
    assert not (tmp_path / "probe").exists()
    assert not leases.is_open([path, other])
    assert not leases.is_open([])
    with path.open("rb"):
        assert leases.is_open([path])
        assert leases.is_open([other, path])
        assert not leases.is_open([other])
        assert not leases.unlinked_unless_open(path)
        assert path.exists()
    assert not leases.is_open([path])
    with leased(path):
        assert leases.is_open([path])
        assert not leases.unlinked_unless_open(path)
    assert leases.unlinked_unless_open(path)
    assert not path.exists()
    assert leases.unlinked_unless_open(path)
    assert not leases.is_open([path])
    assert os.listdir("/proc/self/fd") == descriptors


def test_what_is_no_file_is_an_error_of_the_disk(tmp_path: Path) -> None:
    for ask in (leases.unlinked_unless_open, lambda path: leases.is_open([path])):
        with pytest.raises(DiskFailed):
            ask(tmp_path)


def test_open_files_are_not_reported_where_no_probe_can_be_made(tmp_path: Path) -> None:
    assert not leases.reports_open_files(tmp_path / "absent/probe")
    (tmp_path / "link").symlink_to(tmp_path / "probe")
    assert not leases.reports_open_files(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


# --- inotify ---


@pytest.fixture
def queue() -> Iterator[inotify.Inotify]:
    with closing(inotify.Inotify()) as made:
        yield made


def test_events_come_once_in_order_with_their_names(queue: inotify.Inotify, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    one = queue.add(str(first), inotify.MODIFY | inotify.DELETE)
    two = queue.add(str(second), inotify.MOVED_TO)
    assert one != two
    assert queue.add(str(first), inotify.MODIFY | inotify.DELETE) == one
    assert list(queue.read()) == []
    for _ in range(3):
        (first / "a").write_text("x")
        (first / "with a long name, and \udcff").write_text("x")
    (first / "a").rename(second / "b")
    (second / "b").unlink()
    (first / "with a long name, and \udcff").unlink()
    assert list(queue.read()) == [
        inotify.Event(one, inotify.MODIFY, "a"),
        inotify.Event(one, inotify.MODIFY, "with a long name, and \udcff"),
        inotify.Event(two, inotify.MOVED_TO, "b"),
        inotify.Event(one, inotify.DELETE, "with a long name, and \udcff"),
    ]
    assert list(queue.read()) == []


def test_the_end_of_a_watch_is_told_and_a_second_end_is_none(queue: inotify.Inotify, tmp_path: Path) -> None:
    watch = queue.add(str(tmp_path), inotify.DELETE)
    for _ in range(2):
        queue.remove(watch)
    assert list(queue.read()) == [inotify.Event(watch, inotify.IGNORED, "")]


def test_only_a_directory_is_watched(queue: inotify.Inotify, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for wrong in ("file", "link", "absent"):
        with pytest.raises((NotADirectoryError, FileNotFoundError)):
            queue.add(str(tmp_path / wrong), inotify.DELETE)


def test_a_closed_queue_is_closed_and_is_not_inherited(tmp_path: Path) -> None:
    queue = inotify.Inotify()
    assert not os.get_inheritable(queue._fd)
    queue.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        queue.add(str(tmp_path), inotify.DELETE)


def test_the_kernel_says_how_many_directories_may_be_watched() -> None:
    stated = Path("/proc/sys/fs/inotify/max_user_watches").read_text()
    assert inotify.most_watches() == int(stated)


# --- file systems ---


def test_a_disk_of_this_machine_is_shared_with_none_and_a_missing_path_is_an_error(tmp_path: Path) -> None:
    assert file_systems.shared_file_system(Path("/proc")) is None
    assert file_systems._kind(Path("/proc")) == 0x9FA0  # PROC_SUPER_MAGIC
    with pytest.raises(FileNotFoundError) as missing:
        file_systems.shared_file_system(tmp_path / "absent")
    assert missing.value.filename == str(tmp_path / "absent")
