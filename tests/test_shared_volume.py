"""The source of shared volumes: only regular files below an allowed prefix."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

from cachd.errors import Changed, Forbidden, Invalid
from cachd.model import Digest, Extent, File, Ref
from cachd.sources.cancel import CancelToken
from tests.conftest import Engine, spec_of
from tests.fetching import EXTENTS, HEX, KIB, read, refused, resolve, share
from tests.ground.models import digests, noise, safetensors_model, write_sha256sums
from tests.ground.users import as_another_user


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A share that holds a model with its sums."""
    safetensors_model(tmp_path / "share/model", shards=2, shard_bytes=20 * KIB, seed=1)
    write_sha256sums(tmp_path / "share/model")
    return tmp_path / "share"


def test_a_directory_of_a_share_is_all_its_files_with_their_sums(place: Path) -> None:
    expected = digests(place / "model")
    expected.pop("SHA256SUMS")
    manifest = resolve(share(place), f"file://{place}/model")
    assert {f.path: f.digest and f.digest.hex for f in manifest.files} == expected
    assert resolve(share(place), f"file://{place}/model/").revision == manifest.revision


@pytest.mark.parametrize("step", [1 << 20, 777])
def test_an_extent_of_a_share_is_exactly_its_bytes(place: Path, step: int) -> None:
    content = noise(100_000)
    (place / "x").write_bytes(content)
    file = resolve(share(place), f"file://{place}/x").files[0]
    for start, stop in EXTENTS:
        assert (
            read(share(place).open(file, Extent(start, stop), CancelToken()), stop - start, step)
            == content[start:stop]
        )


def test_one_file_of_a_share_has_the_digest_of_its_ref(place: Path) -> None:
    (place / "x").write_bytes(b"x")
    assert resolve(share(place), f"file://{place}/x").files[0].digest is None
    assert resolve(share(place), f"file://{place}/x#sha256={HEX}").files[0].digest == Digest("sha256", HEX)


def test_a_digest_for_a_directory_of_a_share_is_refused_because_nothing_would_check_it(place: Path) -> None:
    with pytest.raises(Invalid):
        resolve(share(place), f"file://{place}/model#sha256={HEX}")


def test_a_file_that_the_sums_of_a_share_list_must_be_there(place: Path) -> None:
    (place / "model/config.json").unlink()
    assert (
        "config.json"
        in refused(lambda: resolve(share(place), f"file://{place}/model"), "file_not_found").detail
    )


def test_what_a_share_does_not_hold_is_not_found(place: Path) -> None:
    assert (
        "mounted" in refused(lambda: resolve(share(place), f"file://{place}/absent"), "file_not_found").hint
    )
    (place / "empty").mkdir()
    refused(lambda: resolve(share(place), f"file://{place}/empty"), "no_files")


def test_links_within_a_share_are_followed(place: Path) -> None:
    (place / "linked").mkdir()
    (place / "linked/config.json").symlink_to("../model/config.json")
    (place / "latest").symlink_to("model")
    file = resolve(share(place), f"file://{place}/linked").files[0]
    assert (
        read(share(place).open(file, Extent(0, file.size), CancelToken()), file.size)
        == (place / "model/config.json").read_bytes()
    )
    assert len(resolve(share(place), f"file://{place}/latest").files) > 2


def test_a_link_that_leaves_a_share_is_refused(place: Path) -> None:
    (place.parent / "outside").mkdir()
    (place.parent / "outside/secret").write_bytes(b"secret")
    (place / "top").symlink_to("../outside")
    (place / "one").symlink_to("../outside/secret")
    (place / "within").mkdir()
    (place / "within/a").symlink_to(place.parent / "outside/secret")
    for name in ("top", "one", "within", "within/a"):
        refused(lambda name=name: resolve(share(place), f"file://{place}/{name}"), "path_refused")
    (place / "below").mkdir()
    (place / "below/dir").symlink_to("../../outside")
    with pytest.raises((Forbidden, Invalid)):
        resolve(share(place), f"file://{place}/below")


def test_a_file_that_became_a_link_out_of_the_share_is_refused(place: Path) -> None:
    (place / "x").write_bytes(b"x")
    file = resolve(share(place), f"file://{place}/x").files[0]
    (place.parent / "secret").write_bytes(b"x")
    (place / "x").unlink()
    (place / "x").symlink_to("../secret")
    refused(lambda: share(place).open(file, Extent(0, 1), CancelToken()), "path_refused")


def test_a_path_beside_the_allowed_ones_is_refused(place: Path) -> None:
    (place.parent / "share-2").write_bytes(b"x")
    for path in (place.parent / "share-2", Path("/etc/hostname"), place.parent):
        refused(lambda path=path: resolve(share(place), f"file://{path}"), "path_refused")


# --- shares as people mount them ---


def listed(place: Path, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
    """The files of place/model that these patterns select."""
    manifest = share(place).resolve(Ref.parse(f"file://{place}/model"), CancelToken())
    return {file.path for file in manifest.select(include, exclude).files}


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound, chdir(path.parent):  # its address may have 108 bytes
        bound.bind(path.name)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "unsafe_path"),
    "a socket": (a_socket, "unsafe_path"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "path_refused"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "unsafe_path"),
    "a link to the directory above it": (lambda path: path.symlink_to("."), "unsafe_path"),
    "a link to a place above the model": (lambda path: path.symlink_to(".."), "unsafe_path"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "file_not_found"),
    "a link out of the share": (lambda path: path.symlink_to("/etc/hostname"), "path_refused"),
    "two links to each other": (
        lambda path: (path.symlink_to("odd-too"), path.with_name("odd-too").symlink_to("odd")),
        "unsafe_path",
    ),
}


@pytest.mark.parametrize(("make", "code"), ODD.values(), ids=ODD)
def test_what_is_no_file_is_refused_by_name_unless_a_pattern_excludes_it(
    place: Path, make: Callable[[Path], object], code: str
) -> None:
    usual = listed(place)
    make(place / "model/odd")
    error = refused(lambda: listed(place), code)
    assert str(place / "model/odd") in error.detail
    assert error.hint
    refused(lambda: listed(place, include=("o*", "c*")), code)
    assert listed(place, exclude=("odd*",)) == usual
    assert listed(place, include=("*.json",)) == {each for each in usual if each.endswith(".json")}


def test_a_pipe_that_a_ref_names_is_refused(place: Path) -> None:
    os.mkfifo(place / "model/pipe")
    refused(lambda: resolve(share(place), f"file://{place}/model/pipe"), "unsafe_path")


@pytest.mark.parametrize(
    "left",
    [
        ".git/config",
        "sub/.git/objects/ab",
        ".cache/huggingface/download/config.json.metadata",
        "lost+found/#1",
        ".snapshot/hourly/config.json",
        ".zfs/snapshot/x",
        ".nfs000000000a1b2c3d00000001",
    ],
)
def test_what_tools_leave_beside_a_model_is_left_out(place: Path, left: str) -> None:
    usual = listed(place)
    (place / "model" / left).parent.mkdir(parents=True, exist_ok=True)
    (place / "model" / left).write_bytes(b"left")
    assert listed(place) == usual
    with (place / "model/SHA256SUMS").open("a") as sums:
        sums.write(f"{HEX}  {left}\n")
    if ".git" not in left:  # such a path is refused wherever it stands
        assert listed(place) == usual


@pytest.mark.parametrize(
    "kept", [".gitattributes", ".cache/x", "huggingface/x", ".github/x", ".nfs", "found"]
)
def test_what_only_looks_like_it_is_part_of_the_model(place: Path, kept: str) -> None:
    (place / "model" / kept).parent.mkdir(parents=True, exist_ok=True)
    (place / "model" / kept).write_bytes(b"kept")
    assert kept in listed(place)


def test_a_kubernetes_volume_is_the_files_that_it_shows(place: Path) -> None:
    volume = place / "model/volume"
    data = volume / "..2026_01_31_10_00_00.123456789"
    (data / "sub").mkdir(parents=True)
    (data / "config.json").write_bytes(b"{}")
    (data / "sub/x").write_bytes(b"x")
    (volume / "..data").symlink_to(data.name)
    for name in ("config.json", "sub"):
        (volume / name).symlink_to(f"..data/{name}")
    manifest = resolve(share(place), f"file://{volume}")
    assert [file.path for file in manifest.files] == ["config.json", "sub/x"]
    assert {"volume/config.json", "volume/sub/x"} == {path for path in listed(place) if "volume" in path}

    newer = volume / "..2026_01_31_11_00_00.987654321"
    shutil.copytree(data, newer)
    (newer / "config.json").write_bytes(b"[]")
    (volume / "..data_tmp").symlink_to(newer.name)
    (volume / "..data_tmp").rename(volume / "..data")  # as the kubelet swaps it
    with pytest.raises(Changed):
        share(place).open(manifest.files[0], Extent(0, 2), CancelToken())
    file = resolve(share(place), f"file://{volume}").files[0]
    assert read(share(place).open(file, Extent(0, 2), CancelToken()), 2) == b"[]"


def test_links_to_directories_are_followed_while_they_stay_in_the_share(place: Path) -> None:
    (place / "elsewhere/deep").mkdir(parents=True)
    (place / "elsewhere/deep/x").write_bytes(b"x")
    (place / "elsewhere/back").symlink_to("deep")
    (place / "model/linked").symlink_to("../elsewhere")
    assert {"linked/deep/x", "linked/back/x"} <= listed(place)
    (place / "elsewhere/deep/up").symlink_to("../../model")
    refused(lambda: listed(place), "unsafe_path")
    assert "linked/deep/x" in listed(place, exclude=("linked/*/up*",))


def test_a_file_with_several_names_is_read_once(
    place: Path, root: Path, engine: Callable[..., Engine]
) -> None:
    (place / "model/SHA256SUMS").unlink()
    content = noise(100_000)
    (place / "model/a.bin").write_bytes(content)
    os.link(place / "model/a.bin", place / "model/b.bin")
    (place / "model/c.bin").symlink_to("a.bin")
    (place / "model/d.bin").write_bytes(content)  # another file, of which nothing says that it is equal
    files = resolve(share(place), f"file://{place}/model").files
    origins = {file.path: file.origin.rpartition("/")[2] for file in files if file.path.endswith(".bin")}
    assert origins == {"a.bin": "a.bin", "b.bin": "a.bin", "c.bin": "a.bin", "d.bin": "d.bin"}
    running = engine(allow=[f"file://{place}/"])
    pull = running.pulls.start(spec_of(f"file://{place}/model", name="m", include=("*.bin",)))
    assert pull is not None
    pull.done.result(60)
    assert pull.progress.fetched == 2 * len(content)
    assert {(root / "models/m" / f"{letter}.bin").read_bytes() for letter in "abcd"} == {content}


@pytest.mark.parametrize("name", [b"\xff.bin", b"a\nb", b"a\\b", "a\u202eb".encode()], ids=ascii)
def test_a_name_that_no_model_may_hold_is_refused(place: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(place) + b"/model/" + name)).write_bytes(b"x")
    refused(lambda: resolve(share(place), f"file://{place}/model"), "unsafe_path")
    assert "config.json" in listed(place, exclude=("*.bin", "a*"))


@pytest.mark.parametrize("target", ["gone", "config.json", "..", "/etc"])
def test_a_link_or_directory_with_a_name_that_no_model_may_hold_is_refused(place: Path, target: str) -> None:
    usual = listed(place)
    os.symlink(target, os.fsencode(place) + b"/model/odd\xff")
    Path(os.fsdecode(os.fsencode(place) + b"/model/odd\xfe")).mkdir()
    refused(lambda: listed(place), "unsafe_path")
    assert listed(place, exclude=("odd*",)) == usual


CHANGES: dict[str, Callable[[Path], object]] = {
    "longer": lambda path: path.write_bytes(noise(101)),
    "shorter": lambda path: os.truncate(path, 50),
    "as long, written again": lambda path: (path.write_bytes(noise(100, 2)), os.utime(path, (1e9, 1e9))),
    "another file under its name": lambda path: (
        path.with_name("new").write_bytes(noise(100, 2)),
        path.with_name("new").rename(path),
    ),
    "another file with its size and time": (
        lambda path: (
            path.with_name("new").write_bytes(noise(100, 2)),
            shutil.copystat(path, path.with_name("new")),
            path.with_name("new").rename(path),
        )
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_shared_file_that_is_not_what_was_listed_is_changed(
    place: Path, change: Callable[[Path], object]
) -> None:
    (place / "x").write_bytes(noise(100))
    file = resolve(share(place), f"file://{place}/x").files[0]
    change(place / "x")
    with pytest.raises(Changed):
        share(place).open(file, Extent(0, 50), CancelToken())


@pytest.mark.parametrize("change", ["longer", "shorter", "as long, written again"])
def test_a_shared_file_that_changes_while_it_is_read_is_changed(place: Path, change: str) -> None:
    (place / "x").write_bytes(noise(100))
    file = resolve(share(place), f"file://{place}/x").files[0]
    body = share(place).open(file, Extent(0, 100), CancelToken())
    assert body.readinto(memoryview(bytearray(50))) == 50
    CHANGES[change](place / "x")
    with pytest.raises(Changed):
        read(body, 50)


def test_a_shared_file_that_vanished_is_not_found(place: Path) -> None:
    (place / "x").write_bytes(b"x")
    file = resolve(share(place), f"file://{place}/x").files[0]
    (place / "x").unlink()
    refused(lambda: share(place).open(file, Extent(0, 1), CancelToken()), "file_not_found")


def test_a_directory_that_may_not_be_listed_ends_the_resolve_and_is_not_left_out() -> None:
    with as_another_user() as place:
        (place / "model/closed").mkdir(parents=True)
        (place / "model/a.bin").write_bytes(b"a")
        (place / "model/closed/b.bin").write_bytes(b"b")
        (place / "model/closed").chmod(0)
        try:
            error = refused(lambda: listed(place), "source_forbidden")
            assert str(place / "model/closed") in error.detail
            for include in (("*.bin",), ("closed/b.bin",), ("closed/",), ("c*",)):
                refused(lambda include=include: listed(place, include=include), "source_forbidden")
            for exclude in (("closed/",), ("closed*",), ("c*",)):
                assert listed(place, exclude=exclude) == {"a.bin"}
            assert listed(place, include=("a*",)) == {"a.bin"}
        finally:
            (place / "model/closed").chmod(0o755)


def test_a_file_that_may_not_be_read_is_forbidden() -> None:
    with as_another_user() as place:
        (place / "x").write_bytes(b"x")
        file: File = resolve(share(place), f"file://{place}/x").files[0]
        (place / "x").chmod(0)
        refused(lambda: share(place).open(file, Extent(0, 1), CancelToken()), "source_forbidden")


def test_a_file_that_has_bytes_though_its_file_system_says_none_is_refused() -> None:
    """Some FUSE mounts do not know sizes, as /proc does not."""
    for ref in ("file:///proc/version", "file:///proc/sys/kernel/random/"):
        error = refused(lambda ref=ref: resolve(share(Path("/proc")), ref), "size_unknown")
        assert "has bytes" in error.detail


def test_a_name_in_another_form_of_unicode_has_the_digest_that_is_listed(place: Path) -> None:
    composed, decomposed = "caf\u00e9.bin", "cafe\u0301.bin"
    for name, listed in ((decomposed, composed), (composed, decomposed)):
        shutil.rmtree(place / "model")
        (place / "model").mkdir()
        (place / "model" / name).write_bytes(b"x")
        (place / "model/SHA256SUMS").write_text(f"{HEX}  {listed}\n")
        (file,) = resolve(share(place), f"file://{place}/model").files
        assert (file.path, file.digest) == (name, Digest("sha256", HEX))
