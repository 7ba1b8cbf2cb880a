"""Somebody else on the node, or in a group of the volume, who could change what the daemon trusts."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.errors import CachdError, Forbidden
from cachd.store.disk_store import DiskStore
from tests.conftest import Engine
from tests.ground import mount
from tests.ground.models import noise
from tests.ground.needs import needs
from tests.ground.origin import Origin
from tests.ground.stored import SMALL, publish

Spoil = Callable[[Path], object]
STRANGER = 12345


def replaced_by_link(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.real"))
    path.symlink_to(f"{path.name}.real")


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def given_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER)


def with_mode(mode: int) -> Spoil:
    return lambda path: path.chmod(mode)


OPENED: dict[str, tuple[str, int]] = {
    "the root to its group": (".", 0o775),
    "the root to everybody": (".", 0o777),
    "the private part to everybody": (".cachd", 0o777),
    "the private part to readers": (".cachd", 0o755),
    "blobs to a group": (".cachd/blobs", 0o770),
    "blobs of one algorithm to a group": (".cachd/blobs/sha256", 0o770),
    "the format to everybody": (".cachd/format", 0o666),
    "the lock to a group": (".cachd/lock", 0o660),
    "the names to a group": ("models", 0o775),
    "the trees to everybody": ("models/.trees", 0o777),
    "the hold files to everybody": ("models/.holds", 0o777),
    "the Hub view to a group": ("hub", 0o775),
    "ready files to everybody": ("ready", 0o777),
    "status files to a group": ("status", 0o775),
}
REPLACED: dict[str, tuple[str, Spoil]] = {
    "a pipe for the format": (".cachd/format", replaced_by_pipe),
    "a pipe for the lock": (".cachd/lock", replaced_by_pipe),
    "a link for the format": (".cachd/format", replaced_by_link),
    "a link for the lock": (".cachd/lock", replaced_by_link),
    "a link for the private part": (".cachd", replaced_by_link),
    "a link for the blobs": (".cachd/blobs", replaced_by_link),
    "a link for the blobs of one algorithm": (".cachd/blobs/sha256", replaced_by_link),
    "a link for the names": ("models", replaced_by_link),
    "a link for the ready files": ("ready", replaced_by_link),
}
GIVEN = (
    ".",
    ".cachd",
    ".cachd/blobs",
    ".cachd/blobs/sha256",
    ".cachd/format",
    ".cachd/lock",
    "models",
    "hub",
)


@pytest.fixture
def used(root: Path) -> Path:
    """A root as cachd leaves it, with a model."""
    with DiskStore(root) as store:
        publish(store, SMALL)
    return root


def refused(root: Path) -> CachdError:
    """The refusal of an unsafe root, in which nothing is changed."""
    before = listing(root)
    with pytest.raises(Forbidden) as refusal:
        DiskStore(root)
    assert refusal.value.code == "unsafe_root"
    assert listing(root) == before
    return refusal.value


def listing(root: Path) -> list[tuple[str, int, int]]:
    """Every file with its mode, and when something was changed there."""
    found = ((str(path), path.lstat()) for path in (root, *sorted(root.rglob("*"))))
    return [(path, status.st_mode, status.st_mtime_ns) for path, status in found]


@pytest.mark.parametrize(("place", "mode"), OPENED.values(), ids=OPENED)
def test_a_root_that_others_may_write_to_is_refused_with_the_command_that_corrects_it(
    used: Path, place: str, mode: int
) -> None:
    """Promised: A root in which others could change what pods load is refused, and nothing in it is read."""
    (used / place).chmod(mode)
    error = refused(used)
    assert f"{mode:04o}" in error.detail
    assert error.facts["mode"] == f"{mode:04o}"
    assert str(used / place) in error.detail
    command = error.hint[error.hint.index("chmod") :].partition(";")[0]
    subprocess.run(shlex.split(command), check=True)
    with DiskStore(used) as store:
        assert store.names.get("org--model")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("place", "spoil"), REPLACED.values(), ids=REPLACED)
def test_what_is_no_plain_file_or_directory_is_refused_at_once(used: Path, place: str, spoil: Spoil) -> None:
    """Promised: A root in which others could change what pods load is refused, and nothing in it is read."""
    spoil(used / place)
    assert str(used / place) in refused(used).detail


@needs("root")
@pytest.mark.parametrize("place", GIVEN)
def test_what_another_user_owns_is_refused_with_its_owner(used: Path, place: str) -> None:
    given_away(used / place)
    error = refused(used)
    assert f"belongs to {STRANGER}:{STRANGER}" in error.detail
    assert "chown" in error.hint


def test_a_directory_above_the_root_in_which_everybody_may_rename_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "above"
    (above / "below/root").mkdir(parents=True)
    above.chmod(0o777)
    config = Config(root=above / "below/root")
    with pytest.raises(Forbidden) as refusal, assembled(config):
        pass
    assert refusal.value.code == "unsafe_root"
    assert f"chmod o-w {above}" in refusal.value.hint
    above.chmod(0o1777)
    with assembled(config):
        pass


# --- volumes that the kubelet hands out open ---


@pytest.fixture(params=[0o777, 0o2775], ids=["emptyDir", "fsGroup"])
def volume(root: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    root.chmod(request.param)
    yield root
    root.chmod(0o755)


def as_the_kubelet_does(volume: Path) -> None:
    """Give everything in a volume to its group, as on each start of a pod with an fsGroup."""
    for path in (volume, *volume.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if not path.is_symlink():
            path.chmod(mode | (0o2770 if path.is_dir() else 0o660))


def test_in_an_open_volume_the_daemon_has_a_directory_of_its_own(
    engine: Callable[..., Engine], volume: Path, origin: Origin
) -> None:
    assert "own_directory" in refused(volume).hint
    running = engine(own_directory=True)
    content = noise(1000)
    running.pull(origin.add("/model.bin", content))
    assert [path.name for path in volume.iterdir()] == ["cachd"]
    own = volume / "cachd"
    assert stat.S_IMODE(own.stat().st_mode) & 0o777 == 0o755
    assert (own / "models/model.bin/model.bin").read_bytes() == content
    assert mount.wrong(own) == []


def test_rights_that_the_kubelet_gave_to_the_group_are_taken_back(volume: Path) -> None:
    config = Config(root=volume, own_directory=True)
    with assembled(config) as parts:
        publish(parts.store, SMALL)
    as_the_kubelet_does(volume)
    with assembled(config) as parts:
        assert parts.store.names.get("org--model")
    own = volume / "cachd"
    for place in (".", ".cachd", ".cachd/blobs", ".cachd/format", ".cachd/lock", "models", "ready"):
        assert not (own / place).stat().st_mode & 0o022, place
    assert not (own / ".cachd").stat().st_mode & 0o077


def test_a_directory_that_somebody_else_made_in_an_open_volume_is_refused(
    volume: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (volume / "cachd").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CachdError), assembled(Config(root=volume, own_directory=True)):
        pass
    (volume / "cachd").unlink()
    (volume / "cachd").mkdir()
    (volume / "cachd").chmod(0o777)
    with pytest.raises(Forbidden) as refusal, assembled(Config(root=volume, own_directory=True)):
        pass
    assert refusal.value.code == "unsafe_root"
    assert list((tmp_path / "elsewhere").iterdir()) == []
