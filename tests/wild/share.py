"""Shared volumes with odd contents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.ground.models import noise, write_sha256sums
from tests.test_hub_cache import COMMIT, FILES, OLDER, add_snapshot, name_of
from tests.wild.field import Odd, World, wild

MODEL = {"config.json": b"{}", "deep/weights.bin": b"w" * 1000}


def laid(place: Path, files: Mapping[str, bytes]) -> None:
    for path, content in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)


@wild("plain-directory")
def plain_directory(world: World) -> Iterator[Odd]:
    laid(world.share, MODEL)
    write_sha256sums(world.share)
    yield Odd(f"file://{world.share}/", MODEL)


# --- a Hub cache ---


def cached(world: World) -> Path:
    """A repository in a Hub cache, at two revisions."""
    repository = world.share / "hub/models--org--m"
    add_snapshot(repository, {"config.json": b"older"}, OLDER, "v1")
    add_snapshot(repository, FILES, COMMIT, "main")
    return repository


@wild("hub-cache")
def hub_cache(world: World) -> Iterator[Odd]:
    yield Odd(f"file://{cached(world)}", FILES)


@wild("hub-cache-revision")
def hub_cache_revision(world: World) -> Iterator[Odd]:
    yield Odd(f"file://{cached(world)}@v1", {"config.json": b"older"})


@wild("hub-cache-commit")
def hub_cache_commit(world: World) -> Iterator[Odd]:
    yield Odd(f"file://{cached(world)}@{OLDER}", {"config.json": b"older"})


@wild("hub-cache-snapshot")
def hub_cache_snapshot(world: World) -> Iterator[Odd]:
    yield Odd(f"file://{cached(world)}/snapshots/{COMMIT}", FILES)


@wild("hub-cache-no-revision")
def hub_cache_no_revision(world: World) -> Iterator[Odd]:
    yield Odd(f"file://{cached(world)}@dev", {})


@wild("hub-cache-complete")
def hub_cache_complete(world: World) -> Iterator[Odd]:
    yield Odd(f"file://{cached(world).parent}/", {})


@wild("hub-cache-unfinished")
def hub_cache_unfinished(world: World) -> Iterator[Odd]:
    repository = cached(world)
    (repository / "blobs/1234.incomplete").write_bytes(b"x")
    yield Odd(f"file://{repository}", {})


@wild("hub-cache-lost-blob")
def hub_cache_lost_blob(world: World) -> Iterator[Odd]:
    repository = cached(world)
    (repository / "blobs" / name_of(FILES["config.json"])).unlink()
    yield Odd(f"file://{repository}", {})


@wild("hub-cache-lost-shard")
def hub_cache_lost_shard(world: World) -> Iterator[Odd]:
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    index = b'{"weight_map": {"a": "%s", "b": "%s"}}' % (first.encode(), second.encode())
    repository = world.share / "models--org--m"
    add_snapshot(repository, {first: noise(1000), "model.safetensors.index.json": index}, COMMIT, "main")
    yield Odd(f"file://{repository}", {})


@wild("hub-cache-damaged-blob")
def hub_cache_damaged_blob(world: World) -> Iterator[Odd]:
    repository = cached(world)
    content = FILES["model.safetensors"]
    (repository / "blobs" / name_of(content)).write_bytes(content[::-1])
    yield Odd(f"file://{repository}", {})


@wild("hub-cache-elsewhere")
def hub_cache_elsewhere(world: World) -> Iterator[Odd]:
    repository = cached(world)
    link = repository / "snapshots" / COMMIT / "config.json"
    link.unlink()
    link.symlink_to(f"/home/user/.cache/huggingface/hub/models--org--m/blobs/{name_of(FILES['config.json'])}")
    yield Odd(f"file://{repository}", {})


# --- links ---


@wild("kubernetes-volume")
def kubernetes_volume(world: World) -> Iterator[Odd]:
    laid(world.share / "..2026_01_31_10_00_00.123456789", MODEL)
    (world.share / "..data").symlink_to("..2026_01_31_10_00_00.123456789")
    for name in ("config.json", "deep"):
        (world.share / name).symlink_to(f"..data/{name}")
    yield Odd(f"file://{world.share}/", MODEL)


@wild("linked-directory")
def linked_directory(world: World) -> Iterator[Odd]:
    laid(world.share / "other", {"weights.bin": MODEL["deep/weights.bin"]})
    laid(world.share / "model", {"config.json": MODEL["config.json"]})
    (world.share / "model/deep").symlink_to("../other")
    yield Odd(f"file://{world.share}/model/", MODEL)


@wild("hard-links")
def hard_links(world: World) -> Iterator[Odd]:
    laid(world.share, MODEL)
    os.link(world.share / "deep/weights.bin", world.share / "again.bin")
    yield Odd(f"file://{world.share}/", {**MODEL, "again.bin": MODEL["deep/weights.bin"]})


@wild("link-loop")
def link_loop(world: World) -> Iterator[Odd]:
    laid(world.share, MODEL)
    (world.share / "deep/up").symlink_to("..")
    yield Odd(f"file://{world.share}/", {})


@wild("link-out")
def link_out(world: World) -> Iterator[Odd]:
    laid(world.share, MODEL)
    (world.share / "secret").symlink_to("/etc/hostname")
    yield Odd(f"file://{world.share}/", {})


# --- what else stands there ---


def leftover(row: str, path: str) -> None:
    """A row: something beside a model that is no part of it."""

    @wild(row)
    def beside(world: World) -> Iterator[Odd]:
        laid(world.share, {**MODEL, path: b"leftover"})
        yield Odd(f"file://{world.share}/", MODEL)


leftover("git-directory", ".git/config")
leftover("local-dir-notes", ".cache/huggingface/download/config.json.metadata")
leftover("lost-and-found", "lost+found/#12")
leftover("volume-snapshots", ".snapshot/hourly.0/config.json")
leftover("nfs-deleted", "deep/.nfs00000000034a1b2c00000001")


def odd_entry(row: str, make: Callable[[bytes], object], *, exclude: str = "") -> None:
    """A row: an entry that is no file of a model, with a name that is not UTF-8; or a pattern excludes it."""

    @wild(row)
    def beside(world: World) -> Iterator[Odd]:
        laid(world.share, MODEL)
        make(os.fsencode(world.share) + b"/odd\xff")
        asked = {"exclude": [exclude]} if exclude else {}
        yield Odd(f"file://{world.share}/", MODEL if exclude else {}, asked=asked)


odd_entry("pipe", os.mkfifo)
odd_entry("pipe-excluded", os.mkfifo, exclude="odd*")
odd_entry("not-utf8", lambda path: Path(os.fsdecode(path)).write_bytes(b"x"))
odd_entry("dangling-link-excluded", lambda path: os.symlink("nowhere", path), exclude="odd*")
