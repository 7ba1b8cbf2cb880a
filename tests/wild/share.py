"""Shared volumes with odd contents."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.ground.models import noise, write_sha256sums
from tests.ground.weights import gguf, lfs_pointer, link_as_text, safetensors, torch_archive
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
    link.symlink_to(f"/elsewhere/hub/models--org--m/blobs/{name_of(FILES['config.json'])}")
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
leftover("fuse-deleted", "deep/.fuse_hidden0000012300000001")
leftover("apple-double", "deep/._weights.bin")
leftover("finder-notes", ".DS_Store")
leftover("zip-of-macos", "__MACOSX/deep/._weights.bin")
leftover("explorer-notes", "deep/Thumbs.db")
leftover("recycle-bin", "$RECYCLE.BIN/S-1-5-21/$R0.safetensors")
leftover("synology-index", "deep/@eaDir/weights.bin@SynoEAStream")
leftover("modelscope-notes", ".msc")


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


# --- copies and downloads that have not ended, and what is not the file ---


def holding(world: World, files: Mapping[str, bytes], wanted: Mapping[str, bytes], **asked: object) -> Odd:
    """A directory with these files, of which these are wanted."""
    laid(world.share, files)
    return Odd(f"file://{world.share}/", wanted, asked=asked)


def held(row: str, files: Mapping[str, bytes], wanted: Mapping[str, bytes] | None = None) -> None:
    """A row: a directory that has these files; none of them is wanted, or those of `wanted`."""

    @wild(row)
    def directory(world: World) -> Iterator[Odd]:
        yield holding(world, files, wanted or {})


CONFIG = {"config.json": b"{}"}
NOTES = ".cache/huggingface/download"
held("lfs-pointer", {**CONFIG, "model.safetensors": lfs_pointer(safetensors())})
held("lfs-pointer-of-a-text", {**MODEL, "tokenizer.json": lfs_pointer(noise(9))})
held("link-as-text", {**CONFIG, "model.safetensors": link_as_text("../../blobs/0123")})
held("broken-off-safetensors", {**CONFIG, "model.safetensors": safetensors()[:2000]})
held("broken-off-header", {**CONFIG, "model.safetensors": safetensors()[:50]})
held("broken-off-gguf", {"model.gguf": gguf()[:2000]})
held("broken-off-archive", {**CONFIG, "pytorch_model.bin": torch_archive()[:2000]})
held("empty-weights", {**CONFIG, "model.safetensors": b""})
held("aria2-goes-on", {"model.gguf": gguf(), "model.gguf.aria2": b"\0\1"})
held("browser-goes-on", {**CONFIG, "model.safetensors.crdownload": b"half"})
held("rsync-goes-on", {**CONFIG, ".model.safetensors.a1B2c3": b"half"})
held("modelscope-goes-on", {**CONFIG, "._____temp/model.safetensors": b"half"})
held("icloud-placeholder", {**CONFIG, ".model.safetensors.icloud": b"bplist00"})
held("hf-download-goes-on", {**CONFIG, f"{NOTES}/9aYx=.0123.1a2b.incomplete": b"half"})
held(
    "hf-download-left-over",
    {
        **MODEL,
        f"{NOTES}/config.json.metadata": b"%b\n0123\n1.5\n" % COMMIT.encode(),
        f"{NOTES}/9aYx=.0123.1a2b.incomplete": b"half",
    },
    MODEL,
)
held(
    "complete-weights",
    formats := {
        "a.safetensors": safetensors(),
        "b.gguf": gguf(),
        "c.bin": torch_archive(),
        "d.safetensors": noise(999),
    },
    formats,
)


held("aws-cli-goes-on", {**CONFIG, "model.safetensors.6eF5b5da": b"half"})
held("minio-client-goes-on", {**CONFIG, "model.safetensors.part.minio": b"half"})
held(
    "azcopy-goes-on",
    {**CONFIG, ".azDownload-0e7b3f6e-5c1d-4a77-9a80-3f2b1c0d9e8f-model.safetensors": b"half"},
)
held("syncthing-goes-on", {**CONFIG, ".syncthing.model.safetensors.tmp": b"half"})
held("ollama-goes-on", {**CONFIG, f"blobs/sha256-{'0a' * 32}-partial-0": b"{}"})
held("script-goes-on", {**CONFIG, "model.safetensors.tmp": b"half"})
held("lftp-goes-on", {"model.gguf": gguf(), "model.gguf.lftp-pget-status": b"size=1"})


@wild("axel-goes-on-beside-a-file")
def axel_goes_on_beside_a_file(world: World) -> Iterator[Odd]:
    laid(world.share, {"model.gguf": gguf(), "model.gguf.st": b"\1"})
    yield Odd(f"file://{world.share}/model.gguf", {})


@wild("date-after-the-suffix")
def date_after_the_suffix(world: World) -> Iterator[Odd]:
    files = {**CONFIG, "model.bin.20260131": noise(900)}
    yield holding(world, files, files)


@wild("aria2-goes-on-excluded")
def aria2_goes_on_excluded(world: World) -> Iterator[Odd]:
    files = {**MODEL, "other.gguf": gguf(), "other.gguf.aria2": b"\0\1"}
    yield holding(world, files, MODEL, exclude=["other*"])


@wild("aria2-goes-on-beside-a-file")
def aria2_goes_on_beside_a_file(world: World) -> Iterator[Odd]:
    laid(world.share, {"model.gguf": gguf(), "model.gguf.aria2": b"\0\1"})
    yield Odd(f"file://{world.share}/model.gguf", {})


# --- names ---


@wild("decomposed-names")
def decomposed_names(world: World) -> Iterator[Odd]:
    name = "modèle/poids é.bin"
    decomposed = unicodedata.normalize("NFD", name)
    laid(world.share, {decomposed: noise(1000)})
    digest = hashlib.sha256(noise(1000)).hexdigest()
    (world.share / "SHA256SUMS").write_text(f"{digest}  {unicodedata.normalize('NFC', name)}\n")
    yield Odd(f"file://{world.share}/", {decomposed: noise(1000)})


held(
    "names-of-windows",
    windows := {"config.json ": b"{}", "README.md": b"a", "readme.md": b"b", "a.": b"c", "con.json": b"d"},
    windows,
)

# --- more of Hub caches ---


@wild("hub-cache-without-links")
def hub_cache_without_links(world: World) -> Iterator[Odd]:
    repository = world.share / "models--org--m"
    laid(repository / "snapshots" / COMMIT, FILES)
    laid(repository, {"refs/main": COMMIT.encode()})
    yield Odd(f"file://{repository}", FILES)


def tree(repository: Path, commit: str, files: Mapping[str, bytes]) -> None:
    """Note which files a revision has, as huggingface_hub does."""
    shown = {path: {"size": len(said), "blob_id": name_of(said)} for path, said in files.items()}
    text = json.dumps({"format_version": 1, "files": shown})
    laid(repository, {f"trees/{commit}.json": text.encode()})


@wild("hub-cache-other-revision")
def hub_cache_other_revision(world: World) -> Iterator[Odd]:
    repository, newer = cached(world), {**FILES, "model.safetensors": noise(70_000)}
    tree(repository, COMMIT, FILES)
    tree(repository, "c3" * 20, newer)
    laid(repository, {f"blobs/{name_of(noise(70_000))}.1a2b3c4d.incomplete": b"half"})
    yield Odd(f"file://{repository}", FILES)


@wild("hub-cache-newer-revision")
def hub_cache_newer_revision(world: World) -> Iterator[Odd]:
    repository = cached(world)
    newer = add_snapshot(repository, {"config.json": FILES["config.json"]}, "c3" * 20, "main")
    os.utime(newer, (2e9, 2e9))
    laid(repository, {f"blobs/{name_of(noise(70_000))}.1a2b3c4d.incomplete": b"half"})
    yield Odd(f"file://{repository}@{COMMIT}", FILES)


@wild("hub-cache-own-revision")
def hub_cache_own_revision(world: World) -> Iterator[Odd]:
    repository = cached(world)
    tree(repository, COMMIT, {**FILES, "more.safetensors": noise(70_000)})
    laid(repository, {f"blobs/{name_of(noise(70_000))}.1a2b3c4d.incomplete": b"half"})
    yield Odd(f"file://{repository}", {})


@wild("hub-cache-store-of-all")
def hub_cache_store_of_all(world: World) -> Iterator[Odd]:
    """As huggingface_hub 2 keeps what came by Xet."""
    repository, xet = cached(world), "e4" * 32
    blob = repository / "blobs" / name_of(FILES["model.safetensors"])
    laid(
        world.share,
        {f"hub/blobs/e4/{xet}": FILES["model.safetensors"], "hub/.huggingface-shared-blobs": b"1"},
    )
    blob.unlink()
    blob.symlink_to(f"../../blobs/e4/{xet}")
    yield Odd(f"file://{repository}", FILES)


@wild("hub-cache-left-over")
def hub_cache_left_over(world: World) -> Iterator[Odd]:
    repository = cached(world)
    laid(repository, {f"blobs/{name_of(FILES['config.json'])}.1a2b3c4d.incomplete": b"half"})
    yield Odd(f"file://{repository}", FILES)
