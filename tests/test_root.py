"""Which directory may be a root, and what happens to all others."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import (
    CachdError,
    DiskFailed,
    Forbidden,
    InUse,
    Invalid,
    UnsafeRoot,
)
from cachd.store.disk_store import DiskStore
from cachd.store.layout import PRIVATE
from cachd.store.root import check_above, check_root, make_directories, own_directory, own_place
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


# --- the checks by themselves ---


@pytest.mark.parametrize(
    ("mode", "is_refused"),
    [(0o755, False), (0o775, True), (0o757, True), (0o1777, False), (0o1775, False), (0o700, False)],
)
def test_nobody_else_may_rename_the_entries_of_a_root(root: Path, mode: int, is_refused: bool) -> None:
    root.chmod(mode)
    with capture_logs() as logs, pytest.raises(UnsafeRoot) if is_refused else nullcontext() as refusal:
        check_root(root)
    told = [each["hint"] for each in logs if each["log_level"] == "warning"]
    assert told == ([f"chmod 0755 {root}"] if mode == 0o700 else []), "pods cannot read it"
    if refusal:
        error = refusal.value
        assert (error.path, error.mode) == (str(root), f"{mode:04o}")
        assert (error.uid, error.gid) == (root.stat().st_uid, root.stat().st_gid)
        assert f"{root} is a directory of mode" in error.detail
        assert error.hint.startswith(f"chmod 0755 {root}; for a volume")


@pytest.mark.parametrize(
    ("mode", "is_refused"), [(0o755, False), (0o775, False), (0o777, True), (0o757, True), (0o1777, False)]
)
def test_not_everybody_may_replace_a_root(root: Path, mode: int, is_refused: bool) -> None:
    check_above(root)
    root.parent.chmod(mode)
    try:
        with pytest.raises(UnsafeRoot, match="users other") if is_refused else nullcontext():
            check_above(root)
    finally:
        root.parent.chmod(0o755)


def test_a_link_that_leads_to_a_root_is_checked_as_far_as_both_lead(root: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open/link").symlink_to(root)
    (tmp_path / "open").chmod(0o777)
    check_above(root)
    with pytest.raises(UnsafeRoot):
        check_above(tmp_path / "open/link")
    (tmp_path / "open/real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "open/real")
    with pytest.raises(UnsafeRoot):
        check_above(tmp_path / "link")


@pytest.mark.parametrize(
    ("name", "mode", "kept"),
    [
        ("models", 0o775, 0o755),
        ("models/.trees", 0o757, 0o755),
        ("hub/.locks", 0o775, 0o755),
        ("models", 0o711, None),
        (".cachd", 0o750, 0o700),
        (".cachd", 0o701, 0o700),
        (".cachd/leases", 0o740, 0o700),
        (".cachd/blobs/sha256", 0o750, 0o700),
        (".cachd/blobs/sha256", 0o700, None),
        (".cachd/lock", 0o664, 0o644),
        (".cachd/format", 0o646, 0o644),
        (".cachd/format", 0o644, None),
        (".cachd/format", 0o755, None),
    ],
)
def test_what_the_daemon_trusts_may_be_changed_by_nobody_else(
    made: Path, name: str, mode: int, kept: int | None
) -> None:
    check_root(made)
    path = made / name
    path.chmod(mode)
    with pytest.raises(UnsafeRoot) if kept else nullcontext() as refusal:
        check_root(made)
    if refusal:
        assert (refusal.value.path, refusal.value.mode) == (str(path), f"{mode:04o}")
        assert refusal.value.hint.endswith(f"chmod {kept:04o} {path}")


@pytest.fixture
def made(root: Path) -> Path:
    """A root with its directories, a directory of blobs and two files."""
    make_directories(root)
    (root / ".cachd/blobs/sha256").mkdir(mode=0o700)
    for name in ("lock", "format"):
        (root / ".cachd" / name).touch(mode=0o644)
    return root


@pytest.mark.parametrize(
    ("name", "put", "kind"),
    [
        ("models", Path.touch, "a file"),
        ("ready", os.mkfifo, "a pipe"),
        (".cachd/blobs/sha256", lambda path: path.symlink_to("/"), "a link"),
        (".cachd/lock", os.mkfifo, "a pipe"),
        (".cachd/format", lambda path: path.symlink_to("lock"), "a link"),
        (".cachd/format", lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "a device or socket"),
    ],
)
def test_what_is_of_another_kind_than_it_should_be_is_refused(
    made: Path, name: str, put: Callable[[Path], object], kind: str
) -> None:
    path = made / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    put(path)
    with pytest.raises(UnsafeRoot, match=f"{path} is {kind} of mode") as refusal:
        check_root(made)
    assert refusal.value.hint.endswith(f"remove {path}")


@pytest.mark.needs("root")
@pytest.mark.parametrize("name", ["", "models", ".cachd/format"])
def test_what_belongs_to_another_user_is_refused(made: Path, name: str) -> None:
    os.chown(made / name, 4242, -1)
    with pytest.raises(UnsafeRoot, match="belongs to 4242:") as refusal:
        check_root(made)
    assert f"chown {'-hR ' if name else ''}{os.getuid()}:{os.getgid()} {made / name}" in refusal.value.hint


def test_a_directory_that_somebody_made_meanwhile_is_checked(root: Path) -> None:
    (root / "models").mkdir()
    (root / "models").chmod(0o777)
    with pytest.raises(UnsafeRoot):
        make_directories(root)
    (root / "models").chmod(0o755)
    make_directories(root)
    make_directories(root)
    modes = {stat.S_IMODE((root / name).stat().st_mode) for name in PRIVATE}
    assert (modes, stat.S_IMODE((root / "hub").stat().st_mode)) == ({0o700}, 0o755)
    with pytest.raises(DiskFailed):
        make_directories(root / "absent")


# --- a directory of the daemon's own ---


def test_in_a_volume_the_daemon_has_a_directory_of_its_own(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o2777)
    own = own_directory(volume)
    assert (own, own.is_dir(), own.stat().st_mode & 0o777) == (own_place(volume), True, 0o755)
    make_directories(own)
    (own / ".cachd/lock").touch(mode=0o644)
    modes = {"": 0o755, "models": 0o755, ".cachd": 0o700, ".cachd/leases": 0o700, ".cachd/lock": 0o644}
    for name, mode in modes.items():
        (own / name).chmod(mode | 0o2070 if name else 0o775)  # as the kubelet does for an fsGroup
    with capture_logs() as logs:
        assert own_directory(volume) == own
    assert {name: stat.S_IMODE((own / name).stat().st_mode) & 0o777 for name in modes} == {
        **modes,
        "models": 0o775 & ~0o020,
        ".cachd/lock": 0o654,
    }
    assert sorted(each["path"] for each in logs) == sorted(str(own / name).rstrip("/") for name in modes)
    with capture_logs() as logs:
        own_directory(volume)
    assert logs == []


def test_what_others_may_do_in_the_daemons_own_directory_is_refused(tmp_path: Path) -> None:
    own = own_directory(tmp_path)
    make_directories(own)
    for name in ("", "models"):
        (own / name).chmod(0o777)
        with pytest.raises(UnsafeRoot) as refusal:
            own_directory(tmp_path)
        assert refusal.value.mode == "0757", "the rights of the group are gone, and no others"
        (own / name).chmod(0o755)
    own_directory(tmp_path)


@pytest.mark.parametrize("name", ["absent", "file", "taken"])
def test_no_directory_is_made_where_there_is_no_volume(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/cachd").touch()
    with pytest.raises(Invalid) as refusal:
        own_directory(tmp_path / name)
    assert (refusal.value.code, "install -d" in refusal.value.hint) == ("bad_root", True)


@pytest.mark.needs("root")
def test_what_another_user_owns_in_the_daemons_own_directory_is_not_changed(tmp_path: Path) -> None:
    own = own_directory(tmp_path)
    own.chmod(0o775)
    os.chown(own, 4242, -1)
    with pytest.raises(UnsafeRoot):
        own_directory(tmp_path)
    assert own.stat().st_mode & 0o777 == 0o775
