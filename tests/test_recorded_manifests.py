"""The manifests that a root records, and the sha256 that cachd computed of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import DiskFailed, NotFound
from cachd.model import Digest, File, Manifest, ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.store.hashes import Hashes
from cachd.store.manifests import Manifests
from tests.ground.stored import ONE, SMALL, A, B, commit, hexes, manifest_of, publish, sha256
from tests.ground.synced import synced

CONTENT = b"content"
GIT = Digest("git-sha1", "6b584e8ece562ebffc15d38808cd6b98fc3d97ea")  # of CONTENT, by git hash-object
BASE = "https://host/"
WEAK = File("model.bin", len(CONTENT), f"{BASE}model.bin", GIT, base=BASE)
FIRST, SECOND = Digest("sha256", "1" * 64), Digest("sha256", "2" * 64)


@pytest.fixture
def manifests(store: DiskStore) -> Manifests:
    return store.manifests


def unreadable(store: DiskStore, manifest: str) -> None:
    store.layout.manifest(manifest).write_text("{")


# --- reading ---


def test_a_recorded_manifest_is_read_as_it_was_and_a_missing_one_is_not_found(
    store: DiskStore, manifests: Manifests
) -> None:
    snapshot = publish(store, SMALL)
    assert manifests.of(snapshot) == manifests.read(snapshot.manifest) == manifest_of(SMALL)
    assert (manifests.has(snapshot.manifest), manifests.has("f" * 32)) == (True, False)
    assert manifests.shown_in(snapshot.manifest) == ["models--org--model"]
    assert manifests.shown_in("f" * 32) == []
    unreadable(store, snapshot.manifest)
    with pytest.raises(DiskFailed):
        manifests.of(snapshot)
    assert manifests.shown_in(snapshot.manifest) == []
    manifests.remove(snapshot.manifest)
    with pytest.raises(NotFound, match="org--model was withdrawn"):
        manifests.of(snapshot)
    with pytest.raises(FileNotFoundError):
        manifests.read(snapshot.manifest)


def test_manifests_are_listed_by_their_ids_and_other_files_are_not(
    store: DiskStore, manifests: Manifests
) -> None:
    both = [publish(store, files, f"hf://org/{name}") for name, files in (("a", SMALL), ("b", ONE))]
    for name in (".x.json.new", ".y.json", "z.txt"):
        (store.layout.manifests / name).touch()
    assert manifests.ids() == sorted(each.manifest for each in both)
    assert manifests.unnamed() == []
    store.quarantine(
        manifest_of(SMALL).files[1], "x", store.content.inode(sha256(SMALL["dir/model.bin"])), now=1.0
    )
    assert manifests.unnamed() == [], "a quarantined name counts"
    store.names.undeclared("org--b")
    assert manifests.unnamed() == [both[1].manifest]


def test_what_cannot_be_read_is_skipped_and_logged_and_its_blobs_are_not_known(
    store: DiskStore, manifests: Manifests
) -> None:
    bad, good = publish(store, SMALL), publish(store, ONE, "hf://org/b", revision=B)
    assert {blob.hex for blob in manifests.blobs()} == hexes(SMALL, ONE)
    assert {each for each, _ in manifests.readable()} == {bad.manifest, good.manifest}
    assert [each for each, _ in manifests.readable({good.manifest, "f" * 32})] == [good.manifest]
    assert list(manifests.readable(())) == []
    unreadable(store, bad.manifest)
    with capture_logs() as logs:
        assert [each for each, _ in manifests.readable()] == [good.manifest]
    assert [(each["event"], each["manifest"]) for each in logs] == [
        ("unreadable snapshot skipped", bad.manifest)
    ]
    with pytest.raises(DiskFailed):
        manifests.blobs()
    assert manifests.owned("hf://org/model") == set()
    assert {blob.hex for blob in manifests.owned("hf://org/b")} == hexes(ONE)


def test_each_manifest_has_its_ready_names_and_quarantined_ones_are_left_out(
    store: DiskStore, manifests: Manifests
) -> None:
    one, two = publish(store, SMALL, name="m"), publish(store, SMALL, name="n")
    other = publish(store, {"x": b"x"}, "hf://org/b", "b")
    store.names.undeclared("b")
    assert sorted((m.id, [s.name for s in names]) for m, names in manifests.with_names()) == sorted(
        [(one.manifest, ["m", "n"]), (other.manifest, [])]
    )
    assert one.manifest == two.manifest
    file = manifest_of(SMALL).files[0]
    store.quarantine(file, "x", store.content.inode(file.blob), now=1.0)
    assert [m.id for m, _ in manifests.with_names()] == [other.manifest]


# --- writing ---


def test_a_manifest_is_written_durably_with_every_folder_that_ever_showed_it(
    store: DiskStore, manifests: Manifests
) -> None:
    manifest = manifest_of(SMALL)
    with synced() as paths:
        manifests.record(manifest, "b")
    assert paths[-1] == str(store.layout.manifests)
    manifests.record(manifest, "a", "c")
    manifests.record(manifest)
    assert manifests.shown_in(manifest.id) == ["a", "b", "c"]
    with synced() as paths:
        manifests.remove(manifest.id)
    assert (paths, manifests.has(manifest.id)) == ([str(store.layout.manifests)], False)
    manifests.remove(manifest.id)


def test_the_copies_of_the_same_snapshot_under_another_name_stay(
    store: DiskStore, manifests: Manifests
) -> None:
    plain = manifest_of(ONE)
    assert manifests.with_copied(plain) is plain
    copied = replace(plain, copied=("model.safetensors",))
    manifests.record(copied, "a")
    assert manifests.with_copied(plain).copied == ("model.safetensors",)
    more = replace(plain, copied=("empty.txt",))
    assert manifests.with_copied(more).copied == ("empty.txt", "model.safetensors")
    unreadable(store, plain.id)
    assert manifests.with_copied(more) is more


# --- what is known of a file ---


def recorded_hash(store: DiskStore, manifest: Manifest) -> object:
    document = json.loads(store.layout.manifest(manifest.id).read_text())
    return document["files"][0].get("sha256")


@pytest.fixture
def weak(store: DiskStore) -> Manifest:
    """A published manifest of one file with a weak digest."""
    manifest = Manifest(BASE, A, (WEAK,))
    commit(store, manifest.files[0], CONTENT)
    store.publish(ModelSpec(Ref.parse(f"{BASE}model.bin"), "m"), manifest, now=1.0)
    return manifest


def test_a_computed_sha256_is_written_into_the_manifest_and_known_of_the_next_one(
    store: DiskStore, manifests: Manifests, weak: Manifest, next_life: Callable[[], DiskStore]
) -> None:
    computed = sha256(CONTENT)
    assert recorded_hash(store, weak) == computed.hex
    assert store.content.hashes.unrecorded() == frozenset(), "nothing is left to be written"
    assert manifests.as_kept(weak).files[0].sha256 == computed
    elsewhere = Manifest(
        "https://other/", A, (replace(WEAK, base="https://other/", origin="https://other/x"),)
    )
    assert manifests.as_kept(elsewhere) is elsewhere, "another base: nothing is known of it"
    larger = Manifest(BASE, B, (replace(WEAK, size=8),))
    assert manifests.as_kept(larger) is larger
    store = next_life()
    assert store.content.hashes.of(store.manifests.read(weak.id).files[0]) == computed


def test_a_sha256_that_was_computed_later_is_added_once(
    store: DiskStore, manifests: Manifests, weak: Manifest
) -> None:
    (file,) = weak.files
    store.content.hashes.forget(file.blob)
    path = store.layout.manifest(weak.id)
    document = json.loads(path.read_text())
    del document["files"][0]["sha256"]
    path.write_text(json.dumps(document))
    before = path.stat().st_ino
    manifests.record_hashes()
    assert path.stat().st_ino == before, "nothing is to be added"
    store.content.hashes.note(file.blob, FIRST)
    manifests.record_hashes()
    assert recorded_hash(store, weak) == FIRST.hex
    assert manifests.shown_in(weak.id) == document["shown"]
    before = path.stat().st_ino
    manifests.record_hashes()
    store.content.hashes.note(file.blob, SECOND)
    manifests.record_hashes()
    assert path.stat().st_ino == before, "it has one"


def test_content_that_is_here_under_a_weak_digest_is_found_by_its_sha256(
    manifests: Manifests, weak: Manifest
) -> None:
    stated = File("a", len(CONTENT), "https://other/a", sha256(CONTENT), base="https://other/")
    unknown = File("b", len(CONTENT), "https://other/b", FIRST, base="https://other/")
    found = manifests.as_kept(Manifest("https://other/", A, (stated, unknown)))
    assert [file.blob for file in found.files] == [weak.files[0].blob, FIRST]
    manifests.record(found, "x")
    listed = Manifest("https://other/", B, (replace(stated, path="c"),))
    assert manifests.as_kept(listed).files[0].kept == weak.files[0].blob


# --- hashes, without a disk ---

PRIVATE = replace(WEAK, sha256=None)


def test_a_sha256_is_known_until_its_blob_goes() -> None:
    hashes = Hashes()
    hashes.note(PRIVATE.blob, None)
    assert (hashes.of(PRIVATE), hashes.unrecorded()) == (None, frozenset())
    hashes.note(PRIVATE.blob, FIRST)
    assert (hashes.of(PRIVATE), hashes.blob_of(FIRST)) == (FIRST, PRIVATE.blob)
    assert hashes.unrecorded() == {PRIVATE.blob}
    hashes.recorded([SECOND])
    assert hashes.unrecorded() == {PRIVATE.blob}
    hashes.recorded([PRIVATE.blob])
    assert hashes.unrecorded() == frozenset()
    hashes.note(PRIVATE.blob, FIRST)
    hashes.forget(SECOND)
    hashes.forget(PRIVATE.blob)
    assert (hashes.of(PRIVATE), hashes.blob_of(FIRST), hashes.unrecorded()) == (None, None, frozenset())


def test_a_blob_that_goes_takes_no_other_blob_of_the_same_content_with_it() -> None:
    hashes = Hashes()
    for blob in (PRIVATE.blob, SECOND):
        hashes.note(blob, FIRST)
    hashes.forget(PRIVATE.blob)
    assert hashes.blob_of(FIRST) == SECOND


@pytest.mark.parametrize(
    ("file", "known"),
    [
        (replace(PRIVATE, sha256=FIRST), FIRST),
        (replace(PRIVATE, digest=None, sha256=FIRST), None),
        (PRIVATE, None),
        (File("a", 1, "https://host/a", FIRST, base=BASE), None),
    ],
)
def test_what_a_manifest_records_is_known_of_a_file_that_its_source_cannot_change(
    file: File, known: Digest | None
) -> None:
    hashes = Hashes()
    hashes.read(file)
    assert hashes.of(replace(file, sha256=None)) == known
    assert hashes.of(file) == known
    assert hashes.blob_of(FIRST) == (file.blob if known else None)
    assert hashes.unrecorded() == frozenset()


def test_a_copy_that_is_damaged_makes_the_names_that_show_it_not_ready_and_no_other(
    store: DiskStore, root: Path
) -> None:
    copied = replace(manifest_of(ONE), copied=("model.safetensors",))
    for content, path in ((content, path) for path, content in ONE.items()):
        if not store.content.path(sha256(content)).exists():
            commit(store, next(f for f in copied.files if f.path == path), content)
    spec = ModelSpec(Ref.parse("hf://org/model"), "m")
    with store.copies.staged(copied, spec.hub_folder, lambda _: nullcontext()):
        store.publish(spec, copied, now=1.0)
    publish(store, ONE, "hf://org/other", "linked", revision=B)
    file = next(f for f in copied.files if f.path == "model.safetensors")
    place = store.layout.model("m") / file.path
    inode, before = place.stat().st_ino, store.content.inode(file.blob)
    assert store.quarantine_copy(file, str(place.resolve()), "damaged", inode, now=5.0) == ["m"]
    found = store.names.quarantine_of("m")
    assert found is not None
    assert (found.reason, found.inodes, found.since) == (f"a copy of {file.path}: damaged", {}, 5.0)
    assert (store.content.inode(file.blob), store.content.damaged.has(file.blob)) == (before, False)
    assert [each.name for each in store.names.all()] == ["linked"]
    assert not (store.layout.tree(copied.id) / file.path).exists()
