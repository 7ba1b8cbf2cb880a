"""Which directory may be a root, and what happens to all others."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import (
    CachdError,
    DiskFailed,
    Forbidden,
    InUse,
    Invalid,
)
from cachd.store.disk_store import DiskStore
from cachd.store.space import Space
from tests.ground.disks import remount
from tests.ground.needs import require
from tests.ground.stored import MIB, ONE, SMALL, TWO, A, B, assert_whole, hub, publish
from tests.ground.users import as_another_user


def refused(root: Path, kind: type[CachdError], code: str) -> CachdError:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(kind) as refusal:
        DiskStore(root)
    assert refusal.value.code == code
    assert sorted(os.listdir("/proc/self/fd")) == before
    return refusal.value


def test_a_root_that_does_not_exist_is_refused_and_not_made(tmp_path: Path) -> None:
    root = tmp_path / "absent"
    assert "install -d" in refused(root, Invalid, "bad_root").hint
    assert not root.exists()


def test_a_root_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "link", "dangling"):
        refused(tmp_path / name, Invalid, "bad_root")
    assert list((tmp_path / "real").iterdir()) == []


def test_a_root_that_everybody_may_write_to_is_refused(root: Path) -> None:
    root.chmod(0o777)
    assert "chmod 0755" in refused(root, Forbidden, "unsafe_root").hint
    assert list(root.iterdir()) == []


def test_a_root_of_another_user_is_refused_with_the_command_that_corrects_it(root: Path) -> None:
    with as_another_user() as place:
        (place / "root").mkdir(mode=0o555)
        (place / "root").chmod(0o555)
        assert "chown" in refused(place / "root", Forbidden, "bad_root").hint


def test_a_directory_of_the_root_that_somebody_else_made_is_refused() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root"
        root.mkdir()
        root.chmod(0o1777)
        (root / "models").mkdir()
        require("root")
        os.chown(root / "models", os.getuid() + 1, -1)
        refused(root, Forbidden, "unsafe_root")


@pytest.mark.parametrize("name", ["models", "hub", "ready", ".cachd", "models/.trees", "models/.holds"])
def test_a_link_in_place_of_a_directory_of_the_root_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CachdError):
        DiskStore(root)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_root_has_one_store(store: DiskStore, root: Path, next_life: Callable[[], DiskStore]) -> None:
    error = refused(root, InUse, "root_locked")
    assert str(os.getpid()) in error.detail
    assert socket.gethostname() in error.detail
    with pytest.raises(InUse):
        DiskStore(root)
    assert next_life()


def test_a_root_that_another_process_holds_is_refused_until_that_process_ends(root: Path) -> None:
    script = "import sys; from pathlib import Path; from cachd.store.disk_store import DiskStore\n"
    script += "DiskStore(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert str(holder.pid) in refused(root, InUse, "root_locked").detail
        finally:
            holder.kill()
    DiskStore(root).close()


@pytest.mark.parametrize(
    "content", [b"cachd 2\n", b"cachd 10\n", b"", b"something else", b"\xff\xfe"], ids=ascii
)
def test_a_root_of_another_format_is_refused_and_left_alone(root: Path, content: bytes) -> None:
    with DiskStore(root) as store:
        publish(store, SMALL)
    (root / ".cachd/format").write_bytes(content)
    refused(root, Invalid, "bad_format")
    (root / ".cachd/format").write_bytes(b"cachd 1\n")
    with DiskStore(root) as store:
        assert store.names.get("org--model")
    assert_whole(root, "org--model", SMALL, commit=A)


def test_a_root_of_two_file_systems_is_refused(small_disk: Callable[..., Path], root: Path) -> None:
    disk = small_disk(MIB)
    (root / "ready").mkdir()
    subprocess.run(["mount", "--bind", disk, root / "ready"], check=True)
    try:
        refused(root, DiskFailed, "no_hard_links")
    finally:
        subprocess.run(["umount", root / "ready"], check=True)


def test_a_root_that_became_read_only_says_so(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    space = Space(root, reserve_free=0)
    with DiskStore(root) as store:
        publish(store, SMALL)
    assert not space.is_read_only()
    remount(root, "ro")
    assert space.is_read_only()
    with pytest.raises(CachdError) as refusal:
        DiskStore(root)
    assert_whole(root, "org--model", SMALL, commit=A)
    assert "read-only" in str(refusal.value).lower()
    assert "chown" not in refusal.value.hint


def test_what_does_not_belong_to_cachd_is_left_alone(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    foreign = [
        "notes.txt",
        "models/readme",
        "hub/version.txt",
        "hub/models--other--model/refs/main",
        "ready/x.txt",
    ]
    foreign += ["cache/torch/kernel", "ready/.keep"]
    for name in foreign:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    publish(store, ONE)
    store = next_life()
    publish(store, TWO, revision=B)
    store.sweep_snapshots()
    store.withdraw("org--model")
    assert [(root / name).read_text() for name in foreign] == ["mine"] * len(foreign)


def test_the_private_part_is_private_and_the_views_are_not(store: DiskStore, root: Path) -> None:
    publish(store, ONE)
    assert stat.S_IMODE((root / ".cachd").stat().st_mode) == 0o700
    for path in [root / "models", root / "hub", root / "ready", *hub(root).rglob("*")]:
        if path.is_dir():
            assert path.stat().st_mode & 0o005 == 0o005, path
        else:
            assert path.stat().st_mode & 0o004, path
    assert (root / "ready/org--model.json").stat().st_mode & 0o004
    assert (root / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
