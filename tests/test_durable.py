"""The file operations of the kernel package on a real disk: what they leave, and what they sync."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from structlog.testing import capture_logs

from cachd.errors import Busy, DiskFailed, Leased, NoSpace
from cachd.files import TooLong
from cachd.kernel import durable
from cachd.kernel.content_time import content_time
from tests.ground.disks import FuseDisk

DURABLE = ("fsync", "fdatasync", "rename", "unlink", "mkdir", "write", "pwrite", "fchmod", "utime")


def os_calls(work: Callable[[], object]) -> list[str]:
    """The functions of `os` that change or sync something, in the order in which `work` calls them."""
    called: list[str] = []

    def note(_: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in DURABLE:
            called.append(function.__name__)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return called


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    def regular() -> set[str]:
        paths = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        return {path for path in paths if "test_" in path}

    before = regular()
    yield
    assert regular() == before


# --- errors ---

ERRORS: list[tuple[OSError, type[Exception], str, str]] = [
    (OSError(errno.ENOSPC, "", "/f"), NoSpace, "no_space", "/f: No space"),
    (OSError(errno.EDQUOT, "", "/f"), NoSpace, "no_space", "/f: "),
    (OSError(errno.EMFILE, "", "/f"), Busy, "too_many_files", "/f: too many open files"),
    (OSError(errno.ENFILE, ""), Busy, "too_many_files", "/asked: too many open files"),
    (OSError(errno.EROFS, "", "/f"), DiskFailed, "read_only", "/f: Read-only"),
    (OSError(errno.EIO, "", "/f"), DiskFailed, "disk_failed", "/f: Input/output error"),
    (OSError(errno.EIO, "", "/f", None, "/g"), DiskFailed, "disk_failed", "/f -> /g: "),
    (OSError(errno.EIO, ""), DiskFailed, "disk_failed", "/asked: "),
    (OSError("odd"), DiskFailed, "disk_failed", "/asked: odd"),
]


@pytest.mark.parametrize(("error", "kind", "code", "detail"), ERRORS)
def test_an_error_of_the_disk_becomes_one_that_says_what_to_do(
    error: OSError, kind: type[Exception], code: str, detail: str
) -> None:
    with pytest.raises(kind) as raised, durable.disk_errors("/asked"):
        raise error
    assert raised.value.__cause__ is error
    told: Any = raised.value
    assert (type(told), told.code) == (kind, code)
    assert told.detail.startswith(detail)
    assert told.hint
    if kind is DiskFailed:
        assert told.facts.get("errno") == error.errno
    if kind is Busy:
        assert told.retry_after == 0.5


def test_another_error_passes_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), durable.disk_errors("/asked"):
        raise ZeroDivisionError
    with durable.disk_errors("/asked"):
        pass


# --- opening and reading ---

HOLD = """
import fcntl, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
with open(sys.argv[1]) as held:
    fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Another process holds a lease on the file meanwhile."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield
        holder.communicate()


def test_a_file_with_a_lease_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "test_file"
    path.write_bytes(b"x")
    with leased(path):
        with pytest.raises(Leased) as refused:
            durable.open_file(path, os.O_RDONLY)
        assert refused.value.retry_after == 45
    assert durable.read_file(path) == b"x"


def test_only_a_regular_file_is_opened_and_its_descriptor_is_not_inherited(tmp_path: Path) -> None:
    path, link, pipe = tmp_path / "test_file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(path)
    os.mkfifo(pipe)
    for wrong in (path, link, pipe, tmp_path):
        with pytest.raises(OSError, match=r"test_file|link|pipe|regular|irectory"):
            durable.open_file(wrong, os.O_RDONLY)
    fd = durable.open_file(path, os.O_WRONLY | os.O_CREAT)
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert mode(path) == 0o600


def test_a_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "test_file"
    path.write_text('{"a": 1}')
    assert durable.read_file(path, at_most=8) == b'{"a": 1}'
    assert durable.read_document(path, at_most=8) == {"a": 1}
    for read in (durable.read_file, durable.read_document):
        with pytest.raises(TooLong):
            read(path, at_most=7)
    path.write_text("{")
    with pytest.raises(json.JSONDecodeError):
        durable.read_document(path)


# --- writing ---


def test_a_new_file_replaces_what_a_crash_left(tmp_path: Path) -> None:
    path = tmp_path / "test_file"
    for content in (b"longer", b"short"):
        with durable.new_file(path) as fd:
            assert os.fstat(fd).st_size == 0
            durable.write_at(fd, memoryview(content), 0)
        assert (path.read_bytes(), mode(path)) == (content, 0o600)


def test_bytes_are_written_where_they_belong_and_a_content_is_replaced(tmp_path: Path) -> None:
    with durable.new_file(tmp_path / "test_file") as fd:
        durable.write_at(fd, memoryview(b"cd"), 2)
        durable.write_at(fd, memoryview(b"ab"), 0)
        durable.write_at(fd, memoryview(b""), 9)
        assert (tmp_path / "test_file").read_bytes() == b"abcd"
        durable.overwrite(fd, b"xy")
        assert (tmp_path / "test_file").read_bytes() == b"xy"
        durable.set_size(fd, 5)
        assert (tmp_path / "test_file").read_bytes() == b"xy\0\0\0"
        durable.set_size(fd, 1)
        assert (tmp_path / "test_file").read_bytes() == b"x"


def test_a_note_is_replaced_and_lines_are_appended(tmp_path: Path) -> None:
    note, lines = tmp_path / "test_note", tmp_path / "test_lines"
    for content in (b"longer", b"short"):
        durable.write_note(note, content)
        assert (note.read_bytes(), mode(note)) == (content, 0o600)
    for number in range(2):
        durable.append_note(lines, f"{number}\n")
    notes = durable.Notes(lines)
    notes.close()
    notes.append("2\n")
    lines.rename(tmp_path / "test_moved")
    notes.append("3\n")
    notes.close()
    notes.append("4\n")
    notes.close()
    assert (tmp_path / "test_moved").read_text() == "0\n1\n2\n3\n"
    assert lines.read_text() == "4\n"


def test_blocks_are_allocated_ahead(tmp_path: Path) -> None:
    with durable.new_file(tmp_path / "test_file") as fd:
        durable.preallocate(fd, 0, 1 << 20)
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20
        with pytest.raises(OSError, match=r"File too large|No space"):
            durable.preallocate(fd, 0, 1 << 62)
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Illegal seek"):
        durable.preallocate(writer, 0, 1)
    os.close(reader)
    os.close(writer)


def test_a_sealed_file_is_read_only_has_its_time_and_is_synced_last(tmp_path: Path) -> None:
    path = tmp_path / "test_file"
    with durable.new_file(path) as fd:
        assert os_calls(lambda: durable.seal(fd, 5_000_000_007)) == ["fchmod", "utime", "fsync"]
    assert (mode(path), path.stat().st_mtime_ns) == (0o444, 5_000_000_007)
    durable.set_time(tmp_path, 77)
    assert tmp_path.stat().st_mtime == 77


def test_a_new_sealed_file_has_the_time_of_its_content_and_replaces_nothing(tmp_path: Path) -> None:
    path, content = tmp_path / "test_file", b"content"
    calls = os_calls(lambda: durable.write_sealed(str(path), memoryview(content)))
    assert calls == ["pwrite", "fchmod", "utime", "fsync"]
    expected = content_time(len(content), lambda at, count: content[at : at + count])
    assert (path.read_bytes(), mode(path), path.stat().st_mtime) == (content, 0o444, expected)
    with pytest.raises(FileExistsError):
        durable.write_sealed(str(path), memoryview(b"other"))
    assert path.read_bytes() == content


def test_what_is_to_survive_a_crash_is_synced(tmp_path: Path) -> None:
    path = tmp_path / "test_file"
    with durable.new_file(path) as fd:
        assert os_calls(lambda: durable.append(fd, "line\n")) == ["write", "fdatasync"]
        assert os_calls(lambda: durable.sync(fd)) == ["fdatasync"]
    assert path.read_text() == "line\n"
    assert os_calls(lambda: durable.sync_directory(tmp_path)) == ["fsync"]
    assert os_calls(lambda: durable.make_directories(tmp_path / "a/b")) == ["mkdir", "fsync"] * 2
    assert os_calls(lambda: durable.make_directories(tmp_path / "a/b")) == []
    assert os_calls(lambda: durable.remove(path)) == ["unlink", "fsync"]
    assert os_calls(lambda: durable.remove(path)) == ["unlink"]
    durable.remove(tmp_path / "absent/file")
    for wrong in (path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError):
            durable.sync_directory(wrong)


def test_a_file_is_replaced_at_once_and_durably_only_if_it_is_to_be(tmp_path: Path) -> None:
    path = tmp_path / "test_file"
    durably = os_calls(lambda: durable.write_file(path, b"one"))
    assert durably == ["fchmod", "pwrite", "fsync", "rename", "fsync"]
    assert (path.read_bytes(), mode(path)) == (b"one", 0o644)
    (tmp_path / ".test_file.new").write_bytes(b"what a crash left")
    assert os_calls(lambda: durable.replace_file(path, b"two", mode=0o666)) == [
        "unlink",
        "fchmod",
        "pwrite",
        "rename",
    ]
    assert (path.read_bytes(), mode(path)) == (b"two", 0o666)
    assert os.listdir(tmp_path) == ["test_file"]


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "test_file").mkdir()
    for write in (durable.write_file, durable.replace_file):
        with pytest.raises(IsADirectoryError):
            write(tmp_path / "test_file", b"x")
        assert os.listdir(tmp_path) == ["test_file"]


# --- modes and directories ---


def test_a_mode_that_somebody_changed_is_restored_and_logged_once(tmp_path: Path) -> None:
    path, link = tmp_path / "test_file", tmp_path / "link"
    path.touch(0o600)
    link.symlink_to(path)
    with capture_logs() as logs:
        durable.keep_mode(str(link), 0o640)
        durable.keep_mode(str(tmp_path / "absent"), 0o640)
        durable.keep_mode(str(path), 0o640, link.lstat())
        assert mode(path) == 0o600
        for _ in range(2):
            durable.keep_mode(str(path), 0o640)
        assert mode(path) == 0o640
        durable.keep_mode(str(path), 0o600, path.lstat())
    assert mode(path) == 0o600
    assert [(each["was"], each["mode"]) for each in logs] == [("0600", "0640"), ("0640", "0600")]


def test_a_directory_that_somebody_deleted_is_made_again(tmp_path: Path) -> None:
    with capture_logs() as logs:
        for _ in range(2):
            durable.keep_directory(tmp_path / "d", 0o711)
    assert mode(tmp_path / "d") == 0o711
    assert [each["event"] for each in logs] == ["directory recreated", "mode restored"]


# --- names ---


def test_a_symbolic_link_is_replaced_and_a_missing_file_may_be_unlinked(tmp_path: Path) -> None:
    link = tmp_path / "link"
    for target in ("one", "two"):
        durable.make_link(link, target)
        assert os.readlink(link) == target
    for _ in range(2):
        durable.unlink(str(link))
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").touch()
    durable.move(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["b"]


def test_a_hard_link_is_made_once_and_never_to_what_a_link_points_to(tmp_path: Path) -> None:
    source, target, link = tmp_path / "source", tmp_path / "target", tmp_path / "link"
    source.write_text("x")
    durable.link_new(source, target)
    assert target.samefile(source)
    with pytest.raises(FileExistsError):
        durable.link_new(source, target)
    link.symlink_to(source)
    durable.link_new(link, tmp_path / "other")
    assert (tmp_path / "other").is_symlink()


def test_a_hard_link_replaces_another_file_and_leaves_its_own(tmp_path: Path) -> None:
    source, target, beside = tmp_path / "source", tmp_path / "target", tmp_path / "beside"
    source.write_text("x")
    assert os_calls(lambda: durable.link(source, target, beside=beside)) == []
    assert os_calls(lambda: durable.link(source, target, beside=beside)) == []
    assert target.samefile(source)
    target.unlink()
    target.write_text("of somebody")
    beside.write_text("of a crash")
    durable.link(source, target, beside=beside)
    assert target.samefile(source)
    assert not beside.exists()


def test_what_is_taken_away_is_moved_and_an_error_is_raised(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    durable.take_away(tmp_path / "d", tmp_path / "trash")
    assert os.listdir(tmp_path) == ["trash"]
    with pytest.raises(FileNotFoundError):
        durable.take_away(tmp_path / "d", tmp_path / "trash2")


def test_on_a_disk_too_full_for_a_rename_what_is_taken_away_is_deleted(tmp_path: Path) -> None:
    with FuseDisk(tmp_path) as full:
        (full.path / "tree").mkdir()
        for name in ("tree/below", "file", "kept"):
            (full.path / name).touch()
        full.fail("rename_to", "ENOSPC", "/trash*")
        for name in ("tree", "file"):
            durable.take_away(full.path / name, full.path / "trash")
        full.heal()
        full.fail("rename_to", "EIO", "/trash*")
        with pytest.raises(OSError, match="Input/output error"):
            durable.take_away(full.path / "kept", full.path / "trash")
        assert os.listdir(full.path) == ["kept"]


def test_a_tree_is_deleted_whatever_its_modes_and_links_in_it_are_not_followed(tmp_path: Path) -> None:
    outside, tree = tmp_path / "outside", tmp_path / "tree"
    outside.mkdir()
    (outside / "kept").touch()
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/file").touch()
    (tree / "link").symlink_to(outside)
    for path in (tree / "a/b", tree / "a", tree):
        path.chmod(0)
    for _ in range(2):
        durable.remove_tree(tree)
    durable.remove_tree(outside / "kept/below")
    assert [path.name for path in (tmp_path / "outside", *outside.iterdir())] == ["outside", "kept"]
    assert not tree.exists()
