"""The source of shared volumes: only regular files below an allowed prefix."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import Changed, Forbidden, Invalid
from cachd.model import Digest, Extent, File
from cachd.sources.cancel import CancelToken
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


def test_neither_file_nor_directory_is_refused(place: Path) -> None:
    os.mkfifo(place / "model/pipe")
    refused(lambda: resolve(share(place), f"file://{place}/model"), "unsafe_path")
    refused(lambda: resolve(share(place), f"file://{place}/model/pipe"), "unsafe_path")


@pytest.mark.parametrize("name", [b"\xff.bin", b"a\nb", b"a\\b", "a\u202eb".encode()], ids=ascii)
def test_a_name_that_no_model_may_hold_is_refused(place: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(place) + b"/model/" + name)).write_bytes(b"x")
    refused(lambda: resolve(share(place), f"file://{place}/model"), "unsafe_path")


CHANGES: dict[str, Callable[[Path], object]] = {
    "longer": lambda path: path.write_bytes(noise(101)),
    "shorter": lambda path: os.truncate(path, 50),
    "as long, written again": lambda path: (path.write_bytes(noise(100, 2)), os.utime(path, (1e9, 1e9))),
    "another file under its name": lambda path: (
        path.with_name("new").write_bytes(noise(100, 2)),
        path.with_name("new").rename(path),
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
            refused(lambda: resolve(share(place), f"file://{place}/model"), "source_forbidden")
        finally:
            (place / "model/closed").chmod(0o755)


def test_a_file_that_may_not_be_read_is_forbidden() -> None:
    with as_another_user() as place:
        (place / "x").write_bytes(b"x")
        file: File = resolve(share(place), f"file://{place}/x").files[0]
        (place / "x").chmod(0)
        refused(lambda: share(place).open(file, Extent(0, 1), CancelToken()), "source_forbidden")
