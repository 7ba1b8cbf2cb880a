"""Models in a store: made without a source, and what must hold of their views and their blobs."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from cachd.model import Digest, Extent, File, Manifest, ModelSpec, Ref, Snapshot
from cachd.store.disk_store import DiskStore
from cachd.store.ingest import Ingest
from cachd.store.store import Store
from tests.ground import mount
from tests.ground.models import digests, noise
from tests.ground.node import short_name

KIB, MIB = 1 << 10, 1 << 20
Files = Mapping[str, bytes]
A, B, C = "a" * 40, "b" * 40, "c" * 40


def sha256(content: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(content).hexdigest())


def file_of(content: bytes, path: str = "model.bin") -> File:
    return File(path, len(content), f"https://host/{path}", sha256(content))


def manifest_of(files: Files, *, base: str = "hf://org/model", revision: str = A) -> Manifest:
    return Manifest(base, revision, tuple(file_of(content, path) for path, content in files.items()))


def write(ingest: Ingest, content: bytes, *parts: Extent) -> None:
    """Write and finish these parts of the content as streams do; without any, the whole as one part."""
    for part in parts or (Extent(0, len(content)),):
        piece = content[part.start : part.stop]
        ingest.write(part.start, memoryview(piece))
        ingest.received(part)
        hashed = ingest.part_hash()
        hashed.update(memoryview(piece))
        ingest.keep(part, hashed)
        ingest.finish(part)


def commit(store: Store, file: File, content: bytes) -> None:
    """Take the content in as the file's blob."""
    with closing(store.content.begin(file)) as ingest:
        for gap in ingest.gaps():
            write(ingest, content, gap)
        ingest.follow(memoryview(bytearray(64 * KIB)))
        store.content.commit(ingest)


def keep(store: Store, files: Files) -> None:
    """Take every blob in that is not here."""
    for path, content in files.items():
        if not store.content.has(file_of(content, path)):
            commit(store, file_of(content, path), content)


def publish(
    store: Store,
    files: Files,
    ref: str = "hf://org/model",
    name: str | None = None,
    *,
    revision: str = A,
    now: float = 1.0,
) -> Snapshot:
    """Take the files in and publish them as what the ref resolved to."""
    parsed = Ref.parse(ref)
    keep(store, files)
    manifest = manifest_of(files, base=parsed.base, revision=revision)
    return store.publish(ModelSpec(parsed, name or short_name(ref) or ""), manifest, now=now)


def shown(files: Files) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in sorted(files.items())}


def hub(root: Path, repo: str = "org/model") -> Path:
    return root / "hub" / ("models--" + repo.replace("/", "--"))


def refs_of(root: Path, repo: str = "org/model") -> dict[str, str]:
    top = hub(root, repo) / "refs"
    return {p.relative_to(top).as_posix(): p.read_text() for p in top.rglob("*") if p.is_file()}


def names_below(directory: Path) -> set[str]:
    """What a directory holds, a tag of backup tools left out."""
    return {path.name for path in directory.iterdir()} - {"CACHEDIR.TAG"} if directory.exists() else set()


def blobs_of(root: Path) -> set[str]:
    return {path.name for path in (root / ".cachd/blobs").glob("*/*")}


def hexes(*several: Files) -> set[str]:
    return {sha256(content).hex for files in several for content in files.values()}


def assert_whole(root: Path, name: str, files: Files, *, commit: str, repo: str = "org/model") -> None:
    """A ready model's views show exactly its files: right bytes, read-only, in directories nobody may write
    to; and its branch names a commit that is here."""
    plain = root / "models" / name
    told = json.loads((root / "ready" / f"{name}.json").read_text())
    assert plain.readlink() == Path(".trees") / told["manifest"]
    assert told["revision"] == commit
    assert mount.wrong(root) == []
    if branch := told["hub"]["revision"]:
        assert (hub(root, repo) / "snapshots" / refs_of(root, repo)[branch]).is_dir()
    for view in (plain, hub(root, repo) / "snapshots" / commit):
        assert digests(view) == shown(files)
        for path in files:
            status = (view / path).lstat()
            assert stat.S_ISREG(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o444
            assert os.path.samestat(status, (plain / path).lstat())
    for directory, _, _ in os.walk(plain.resolve()):
        assert stat.S_IMODE(Path(directory).stat().st_mode) == 0o555, directory


def assert_nothing_left(root: Path) -> None:
    """No model, no blob, nothing half-made."""
    for directory in ("models/.trees", "models/.holds", "hub/.locks", "ready"):
        assert names_below(root / directory) == set(), directory
    assert names_below(root / "hub") == {".locks"}
    assert names_below(root / "models") == {".trees", ".holds"}
    for directory in ("ingest", "manifests", "staging", "trash", "pending", "pins", "config_pins"):
        assert names_below(root / ".cachd" / directory) == set(), directory
    assert blobs_of(root) == set()


def give_back(fillers: Path) -> None:
    for filler in fillers.iterdir():
        filler.unlink()
    fillers.rmdir()


CONTENT = noise(10 * KIB)
PARTS = [Extent(start, min(start + 4 * KIB, len(CONTENT))) for start in range(0, len(CONTENT), 4 * KIB)]
FILE = file_of(CONTENT)


def ingest_directory(store: DiskStore, file: File = FILE) -> Path:
    return store.layout.ingest(file.blob, file.size)


def left_by_an_earlier_life(store: DiskStore, *parts: Extent) -> Path:
    """An ingest that holds these parts of CONTENT and was closed; its directory."""
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, *parts)
    return ingest_directory(store)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as opened:
        opened.seek(offset)
        opened.write(content)


DIGESTS = {
    "sha256": lambda c: Digest("sha256", hashlib.sha256(c).hexdigest()),
    "git-sha1": lambda c: Digest("git-sha1", hashlib.sha1(b"blob %d\0" % len(c) + c).hexdigest()),
    "sha1": lambda c: Digest("sha1", hashlib.sha1(c).hexdigest()),
    "crc32": lambda c: Digest("crc32", f"{crc(c, 0xEDB88320, 32):08x}"),
    "crc32c": lambda c: Digest("crc32c", f"{crc(c, 0x82F63B78, 32):08x}"),
    "crc64nvme": lambda c: Digest("crc64nvme", f"{crc(c, 0x9A6C9329AC4BC9B5, 64):016x}"),
}


def crc(content: bytes, polynomial: int, bits: int) -> int:
    """A reflected CRC, bit by bit: slow, and nobody else's code."""
    value = ones = (1 << bits) - 1
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)
    return value ^ ones


ONE: Files = {
    "config.json": b'{"model_type": "noise"}',
    "model.safetensors": noise(20 * KIB, 1),
    "1_Pooling/config.json": b"{}",
    "empty.txt": b"",
    "twin.safetensors": noise(20 * KIB, 1),
}
TWO: Files = {
    **ONE,
    "model.safetensors": noise(20 * KIB, 2),
    "twin.safetensors": noise(20 * KIB, 2),
    "new/deep/er.bin": noise(KIB, 3),
}
SMALL: Files = {"config.json": b"{}", "dir/model.bin": noise(KIB)}


def cut(path: Path, size: int) -> None:
    """Take the tail of a read-only file, as a failing disk does."""
    path.chmod(0o644)
    os.truncate(path, size)


def fetched_anew(store: DiskStore, content: bytes) -> None:
    """Damage the blob of the content and take it in again: it is another file then."""
    cut(store.content.path(sha256(content)), 1)
    commit(store, file_of(content), content)


def assert_only(root: Path, named: Mapping[str, Snapshot], *files: Files) -> None:
    """A root of one repository holds these names, their snapshots and their files, and nothing else."""
    snapshots = {s.manifest for s in named.values()}
    commits = {s.commit for s in named.values()}
    assert mount.names(root) == set(named)
    assert mount.holds(root) == set(mount.addresses(root).values()) == snapshots
    assert names_below(root / "ready") == {f"{name}.json" for name in named}
    assert names_below(root / "models/.trees") == snapshots
    assert names_below(root / ".cachd/manifests") == {f"{m}.json" for m in snapshots}
    assert names_below(hub(root) / "snapshots") == commits
    assert names_below(hub(root) / "trees") == {f"{c}.json" for c in commits}
    assert names_below(hub(root) / ".no_exist") <= commits
    branches = {str(s.hub_revision): s.commit for s in named.values() if s.hub_revision}
    main = {} if "main" in branches else {"main": refs_of(root).get("main")}  # of a name of a commit
    assert refs_of(root).items() <= (branches | main).items()
    assert branches.items() <= refs_of(root).items()
    assert blobs_of(root) == hexes(*files)
    for directory in ("staging", "trash"):
        assert names_below(root / ".cachd" / directory) == set()


def swept_bytes(gone: Files, left: Files) -> int:
    return sum(len(c) for c in {*gone.values()} - {*left.values()})


def manifest_file(root: Path) -> Path:
    return root / ".cachd/manifests" / f"{(root / 'models/org--model').readlink().name}.json"
