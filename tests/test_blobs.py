"""Blobs by themselves: who needs one, who may resume its download, what is damaged, what removal frees."""

from __future__ import annotations

import os
import stat
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import Corrupt, DiskFailed, InUse
from cachd.model import Digest, Extent, File
from cachd.store.content import ContentStore
from cachd.store.content.blobs import blocks_of, freed_by, inode_of
from cachd.store.content.claims import Claims
from cachd.store.content.damaged import DamagedBlobs
from cachd.store.content.owners import Owners
from cachd.store.content.removal import Removal
from cachd.store.content.trash import Trash
from cachd.store.disk_store import DiskStore
from cachd.store.ingest.part_lines import parts_of
from tests.ground.models import noise
from tests.ground.stored import (
    CONTENT,
    DIGESTS,
    FILE,
    KIB,
    PARTS,
    SMALL,
    blobs_of,
    commit,
    file_of,
    keep,
    left_by_an_earlier_life,
    manifest_of,
    names_below,
    publish,
    sha256,
    write,
)
from tests.test_durable import os_calls

OTHER = sha256(b"other")
PATIENCE_SECONDS = 30.0
MANIFEST = manifest_of({"model.bin": CONTENT})


@pytest.fixture
def removal(store: DiskStore) -> Removal:
    return store.content.removal


@pytest.fixture
def damaged(store: DiskStore) -> DamagedBlobs:
    return store.content.damaged


# --- what is here ---


def test_a_blob_is_here_with_its_size_its_inode_and_its_blocks(store: DiskStore) -> None:
    content, path = store.content, store.content.path(FILE.blob)
    assert (content.has(FILE), content.inode(FILE.blob), content.sizes(MANIFEST)) == (False, 0, {})
    assert content.missing(MANIFEST) == list(MANIFEST.files)
    commit(store, FILE, CONTENT)
    status = path.stat()
    assert (content.has(FILE), content.inode(FILE.blob)) == (True, status.st_ino)
    assert content.missing(MANIFEST) == []
    assert not content.has(replace(FILE, size=FILE.size + 1))
    assert content.sizes(MANIFEST) == {FILE.blob: status.st_blocks * 512}
    parts_of(path).write_bytes(noise(10 * KIB))
    assert content.sizes(MANIFEST) == {FILE.blob: status.st_blocks * 512 + blocks_of(parts_of(path))}
    assert (inode_of(path), inode_of(path.parent / "absent"), inode_of(path / "below")) == (
        status.st_ino,
        0,
        0,
    )
    assert (blocks_of(path), blocks_of(path.parent / "absent")) == (status.st_blocks * 512, 0)


def test_a_blob_is_read_compared_and_hashed(store: DiskStore) -> None:
    big = noise(2 * 1024 * KIB + 5)
    file, steps = file_of(big), list[int]()
    keep(store, {"model.bin": big})
    content = store.content
    with content.opened(file) as opened:
        assert opened.read() == big
    assert content.computed_sha256(file, lambda: steps.append(1)) == sha256(big)
    assert len(steps) == 3
    part = Extent(5, 100)
    assert content.agrees(file, part, memoryview(big[5:100]))
    assert not content.agrees(file, part, memoryview(big[6:101]))
    assert not content.agrees(file_of(b"absent"), Extent(0, 6), memoryview(b"absent"))
    with pytest.raises(DiskFailed), content.opened(file_of(b"absent")):
        pytest.fail("there is nothing to open")


def test_only_files_without_other_links_count_as_freed(tmp_path: Path) -> None:
    (tmp_path / "top/sub").mkdir(parents=True)
    for name in ("top/one", "top/sub/two", "top/linked"):
        (tmp_path / name).write_bytes(noise(8 * KIB))
    os.link(tmp_path / "top/linked", tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("top")
    own = blocks_of(tmp_path / "top/one") + blocks_of(tmp_path / "top/sub/two")
    assert own >= 16 * KIB
    assert freed_by(tmp_path / "top") - own < 8 * KIB
    assert freed_by(tmp_path / "top/one") == own // 2
    assert freed_by(tmp_path / "link") == blocks_of(tmp_path / "link")
    assert freed_by(tmp_path / "absent") == 0


def test_content_under_another_name_is_found_by_its_sha256(store: DiskStore) -> None:
    git = File("model.bin", len(CONTENT), "https://host/model.bin", DIGESTS["git-sha1"](CONTENT))
    assert store.content.alike(FILE) is None
    commit(store, git, CONTENT)
    assert store.content.alike(FILE) == git.blob
    assert store.content.alike(replace(FILE, size=FILE.size + 1)) is None
    assert store.content.alike(git) is None
    assert store.content.alike(replace(FILE, digest=None, validator="etag")) is None
    commit(store, FILE, CONTENT)
    assert store.content.alike(FILE) is None, "its own blob is here"


# --- who needs it ---


def test_claims_add_up_and_each_ends_by_itself() -> None:
    claims = Claims()
    with claims.claimed([FILE.blob, OTHER], "one"):
        with claims.claimed([FILE.blob], "two"):
            assert claims.blobs() == {FILE.blob, OTHER}
            assert (claims.names(FILE.blob), claims.names(OTHER)) == ({"one", "two"}, {"one"})
            with claims.paused() as claimed:
                assert set(claimed) == {FILE.blob, OTHER}
        assert (claims.names(FILE.blob), claims.is_claimed(FILE.blob)) == ({"one"}, True)
    assert (claims.blobs(), claims.is_claimed(FILE.blob), claims.names(FILE.blob)) == (set(), False, set())


@pytest.fixture
def owned(tmp_path: Path) -> tuple[Owners, Claims, Path]:
    claims = Claims()
    (tmp_path / "ingest").mkdir()
    return Owners(claims), claims, tmp_path / "ingest"


def test_an_ingest_is_expected_while_a_pull_of_an_owner_goes_on(owned: tuple[Owners, Claims, Path]) -> None:
    owners, claims, ingest = owned
    owners.add(ingest, {"m", "n", ""})
    assert owners.names(ingest) == {"m", "n"}
    assert not owners.is_expected(FILE.blob, ingest)
    with claims.claimed([FILE.blob], "x"):
        assert owners.is_expected(FILE.blob, ingest)
    for name, expected in (("other", False), ("m", True)):
        owners.expect(name)
        assert owners.is_expected(FILE.blob, ingest) is expected
    owners.expect("m")
    owners.expect_no_more("m")
    assert owners.is_expected(FILE.blob, ingest)
    owners.expect_no_more("m")
    assert not owners.is_expected(FILE.blob, ingest)
    owners.expect_no_more("absent")
    owners.expect("absent")
    owners.add(ingest, {"absent"})
    assert owners.is_expected(FILE.blob, ingest), "what never began cannot end"


def test_owners_are_removed_until_none_is_left(owned: tuple[Owners, Claims, Path]) -> None:
    owners, _, ingest = owned
    assert owners.remove(ingest, ["m"])
    owners.add(ingest, {"m", "n"})
    before = (ingest / "owners").stat().st_mtime_ns
    assert not owners.remove(ingest, ["other"])
    assert (ingest / "owners").stat().st_mtime_ns == before
    assert not owners.remove(ingest, ["m"])
    assert owners.names(ingest) == {"n"}
    assert owners.remove(ingest, ["n", "m"])
    assert owners.names(ingest) == {"n"}, "the caller removes the ingest"


def test_so_many_owners_are_recorded(owned: tuple[Owners, Claims, Path]) -> None:
    owners, _, ingest = owned
    (ingest / "owners").write_text("".join(f"{number}\n" for number in range(999)))
    owners.add(ingest, {"a", "b"})
    assert len(owners.names(ingest)) == 1000
    owners.add(ingest, {"c"})
    assert len(owners.names(ingest)) == 1000
    owners.add(ingest.parent / "absent", {"a"})  # a failure is ignored
    assert owners.names(ingest.parent / "absent") == set()


def test_a_pull_owns_what_an_earlier_one_left_of_its_blobs(store: DiskStore) -> None:
    directory = left_by_an_earlier_life(store, PARTS[0])
    assert store.content.is_begun(FILE)
    assert not store.content.is_begun(replace(FILE, size=FILE.size + 1))
    assert store.content.begun([FILE, file_of(b"other")]) == {FILE.blob}
    assert store.content.allocated(FILE) >= PARTS[0].size
    assert store.content.allocated(file_of(b"other")) == 0
    with store.content.claim(MANIFEST, "m"):
        assert store.content.claims.names(FILE.blob) == {"m"}
        assert store.content.owners.names(directory) == {"m"}
    assert store.content.claims.blobs() == set()


def test_a_download_belongs_to_the_pulls_that_claim_its_blob(store: DiskStore) -> None:
    with store.content.claim(MANIFEST, "m"), closing(store.content.begin(FILE)) as ingest:
        assert store.content.owners.names(ingest.directory) == {"m"}


# --- damaged ---


def test_a_damaged_blob_is_kept_with_its_part_hashes_until_it_is_forgotten(
    store: DiskStore, damaged: DamagedBlobs
) -> None:
    commit(store, FILE, CONTENT)
    path, inode = store.content.path(FILE.blob), store.content.inode(FILE.blob)
    parts_of(path).write_text("parts")
    damaged.keep(FILE.blob, inode + 1)
    assert (damaged.has(FILE.blob), store.content.has(FILE)) == (False, True)
    damaged.keep(FILE.blob, inode)
    assert (damaged.has(FILE.blob), store.content.has(FILE), parts_of(path).exists()) == (True, False, False)
    assert damaged.path(FILE.blob).read_bytes() == CONTENT
    assert parts_of(damaged.path(FILE.blob)).read_text() == "parts"
    assert DamagedBlobs(store.content).has(FILE.blob), "the next start knows it"
    damaged.keep(FILE.blob, inode)  # it is gone already
    size = blocks_of(damaged.path(FILE.blob))
    assert damaged.forget(FILE.blob) == size > 0
    assert (damaged.has(FILE.blob), damaged.forget(FILE.blob)) == (False, 0)
    assert names_below(store.layout.damaged_blobs) == set()


def test_a_directory_in_place_of_a_blob_is_removed(store: DiskStore, damaged: DamagedBlobs) -> None:
    commit(store, FILE, CONTENT)
    path = store.content.path(FILE.blob)
    path.unlink()
    (path / "sub").mkdir(parents=True)
    damaged.keep(FILE.blob, store.content.inode(FILE.blob))
    assert (path.exists(), damaged.has(FILE.blob)) == (False, False)


def test_a_commit_or_a_wrong_digest_ends_the_use_of_a_damaged_copy(
    store: DiskStore, damaged: DamagedBlobs
) -> None:
    for is_right in (True, False):
        commit(store, FILE, CONTENT)
        damaged.keep(FILE.blob, store.content.inode(FILE.blob))
        with closing(store.content.begin(FILE)) as ingest:
            write(ingest, CONTENT if is_right else CONTENT[::-1])
            ingest.follow(memoryview(bytearray(64 * KIB)))
            if is_right:
                store.content.commit(ingest)
            else:
                with pytest.raises(Corrupt) as refusal:
                    store.content.commit(ingest)
                assert refusal.value.facts["got"] == str(sha256(CONTENT[::-1]))
        assert (damaged.has(FILE.blob), store.content.has(FILE)) == (False, is_right)
        assert names_below(store.layout.ingests) == set()
        store.content.removal.drop(FILE.blob)


def test_a_begin_that_fails_at_a_damaged_copy_leaves_nothing_open(
    store: DiskStore, damaged: DamagedBlobs
) -> None:
    commit(store, FILE, CONTENT)
    damaged.keep(FILE.blob, store.content.inode(FILE.blob))
    parts_of(damaged.path(FILE.blob)).mkdir()  # its hashes cannot be read
    with pytest.raises(DiskFailed):
        store.content.begin(FILE)
    opened = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    assert [path for path in opened if path.startswith(str(store.layout.ingests))] == []
    parts_of(damaged.path(FILE.blob)).rmdir()
    store.content.begin(FILE).close()


def test_the_names_of_blobs_that_came_or_went_are_synced(store: DiskStore, damaged: DamagedBlobs) -> None:
    content = store.content
    git = File("model.bin", len(CONTENT), "https://host/model.bin", DIGESTS["git-sha1"](CONTENT))
    for file in (FILE, git):
        content.put(file, memoryview(CONTENT))
    assert os_calls(lambda: content.put(FILE, memoryview(CONTENT))) == [], "it is here"
    assert os_calls(lambda: content.sync([FILE.blob, OTHER])) == ["fsync"] * 2
    assert os_calls(lambda: content.sync([FILE.blob, git.blob])) == ["fsync"] * 3
    assert os_calls(lambda: content.sync([])) == ["fsync"]
    assert os_calls(lambda: damaged.keep(git.blob, content.inode(git.blob))) == ["rename", "rename", "fsync"]
    assert os_calls(lambda: damaged.forget(git.blob)) == ["unlink", "fsync", "unlink"]
    dropped = os_calls(lambda: content.removal.drop(FILE.blob))
    assert (dropped[:2], dropped.count("fsync")) == (["unlink", "rename"], 3), (
        "both directories, and the proofs"
    )


def test_a_put_writes_a_sealed_file_aside_and_moves_it(store: DiskStore) -> None:
    put = ["pwrite", "fchmod", "utime", "fsync", "rename"]
    store.content.put(FILE, memoryview(CONTENT))
    store.content.path(FILE.blob).unlink()
    store.content.path(FILE.blob).parent.rmdir()
    with capture_logs():  # they are written, too
        called = [
            os_calls(lambda at=at: store.content.put(file_of(at), memoryview(at))) for at in (b"a", b"b")
        ]
    moved = [[name for name in names if name != "write"] for names in called]  # of the proofs
    assert moved == [[*put, "mkdir", "rename"], put], "the first makes the directory"
    directory = store.content.path(FILE.blob).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_who_may_no_longer_write_neither_commits_nor_puts(store: DiskStore) -> None:
    def refused() -> None:
        raise InUse("another process has the root")

    fenced = ContentStore(store.layout, check=refused)
    with closing(fenced.begin(FILE)) as ingest:
        write(ingest, CONTENT)
        ingest.follow(memoryview(bytearray(64 * KIB)))
        with pytest.raises(InUse):
            fenced.commit(ingest)
        with pytest.raises(InUse):
            fenced.put(FILE, memoryview(CONTENT))
        assert (store.content.has(FILE), fenced.is_begun(FILE)) == (False, True)
        store.content.commit(ingest)
    assert store.content.has(FILE)


def test_a_put_tells_readers_ends_a_damaged_copy_and_notes_what_it_knows(
    store: DiskStore, damaged: DamagedBlobs
) -> None:
    content, file = store.content, replace(FILE, base="https://host/")
    content.put(file, memoryview(CONTENT))
    damaged.keep(file.blob, content.inode(file.blob))
    offer = content.offers.of(file)
    before = offer.wait(-1, 0.0)
    content.put(file, memoryview(CONTENT))
    assert offer.wait(before, PATIENCE_SECONDS) == before + 1
    assert (damaged.has(file.blob), content.proven.has(file)) == (False, True)
    git = File("model.bin", len(CONTENT), "https://host/model.bin", DIGESTS["git-sha1"](CONTENT))
    with pytest.raises(Corrupt) as refusal:
        content.put(replace(git, sha256=OTHER), memoryview(CONTENT))
    assert refusal.value.facts["expected"] == str(OTHER)
    assert not content.has(git)
    content.put(replace(git, sha256=sha256(CONTENT)), memoryview(CONTENT))
    assert content.hashes.blob_of(sha256(CONTENT)) == git.blob


def test_one_offer_of_a_blob_lasts_as_long_as_somebody_has_it(store: DiskStore) -> None:
    offers = store.content.offers
    offers.tell(FILE)  # nobody reads along
    offer = offers.of(FILE)
    assert offers.of(replace(FILE, path="other.bin")) is offer
    other = offers.of(replace(FILE, size=FILE.size + 1))
    assert (other is offer, other.size, offer.size) == (False, FILE.size + 1, FILE.size)
    assert offer.data == store.layout.ingest(FILE.blob, FILE.size) / "data"
    before = [each.wait(-1, 0.0) for each in (offer, other)]
    offers.tell(FILE)
    assert [each.wait(-1, 0.0) for each in (offer, other)] == [before[0] + 1, before[1]]


# --- removal ---


def test_a_blob_is_free_unless_a_view_links_to_it_or_a_pull_claims_it(
    store: DiskStore, removal: Removal
) -> None:
    assert (removal.is_free(FILE.blob), removal.drop(FILE.blob)) == (False, 0)
    publish(store, {"model.bin": CONTENT})
    assert (removal.is_free(FILE.blob), removal.drop(FILE.blob)) == (False, 0)
    keep(store, SMALL)
    small = manifest_of(SMALL)
    blob = small.files[1].blob
    with store.content.claim(small):
        assert (removal.is_free(blob), removal.drop(blob)) == (False, 0)
    assert removal.is_free(blob)
    path = store.content.path(blob)
    parts_of(path).write_bytes(noise(5 * KIB))
    size = blocks_of(path) + blocks_of(parts_of(path))
    assert removal.drop(blob) == size >= 2 * KIB
    assert (removal.is_free(blob), path.exists(), parts_of(path).exists()) == (False, False, False)
    assert names_below(store.layout.trash) == set()


def test_a_partial_download_stays_while_somebody_may_resume_it(store: DiskStore, removal: Removal) -> None:
    directory = left_by_an_earlier_life(store, PARTS[0])
    store.content.owners.add(directory, {"m", "n"})
    assert removal.free(MANIFEST, ["m"]) == 0
    assert store.content.owners.names(directory) == {"n"}
    with store.content.claims.claimed([FILE.blob], ""):
        assert removal.free(MANIFEST, ["n"]) == removal.drop_ingest(FILE.blob) == 0
    store.content.owners.expect("n")
    assert removal.drop_ingest(FILE.blob) == 0
    assert directory.exists()
    store.content.owners.expect_no_more("n")
    size = freed_by(directory)
    assert removal.drop_ingest(FILE.blob) == size >= PARTS[0].size
    assert not directory.exists()
    assert removal.drop_ingest(FILE.blob) == 0


def test_the_damaged_copy_goes_with_the_last_download_of_its_blob(
    store: DiskStore, removal: Removal, damaged: DamagedBlobs
) -> None:
    commit(store, FILE, CONTENT)
    damaged.keep(FILE.blob, store.content.inode(FILE.blob))
    another = replace(FILE, size=FILE.size + 1)
    for file in (FILE, another):
        store.content.begin(file).close()
    assert removal.free(MANIFEST) > 0
    assert damaged.has(FILE.blob), "the other download may reuse its parts"
    removal.drop_ingest(FILE.blob)
    assert not damaged.has(FILE.blob)
    assert names_below(store.layout.ingests) == names_below(store.layout.damaged_blobs) == set()


def test_part_hashes_that_an_interrupted_commit_left_go_with_the_download(
    store: DiskStore, removal: Removal, root: Path
) -> None:
    left_by_an_earlier_life(store, PARTS[0])
    left = parts_of(store.content.path(FILE.blob))
    left.parent.mkdir(exist_ok=True)
    left.write_text("left")
    removal.drop_ingest(FILE.blob)
    assert blobs_of(root) == set()


def test_the_trash_counts_what_is_deleted_and_keeps_what_is_open(store: DiskStore) -> None:
    trash, directory = Trash(store.layout, unique=iter("abc").__next__), store.layout.trash
    assert trash.new_path(FILE.blob) == directory / f"{FILE.blob.hex}.a"
    assert trash.new_path(FILE.blob) == directory / f"{FILE.blob.hex}.b"
    (directory / "dir/sub").mkdir(parents=True)
    (directory / "file").write_bytes(b"x")
    (directory / "open").write_bytes(b"x")
    (directory / "link").symlink_to("dir")
    sizes = {directory / name: size for name, size in (("dir", 1), ("file", 2), ("link", 4), ("gone", 8))}
    with (directory / "open").open("rb"):
        kept = {"open"} if store.reports_open_files else set()
        assert trash.empty({**sizes, directory / "open": 16}) == 15 + (0 if kept else 16)
        assert names_below(directory) == kept
    trash.empty_all()
    assert names_below(directory) == set()


def test_what_is_known_of_a_removed_blob_is_forgotten(store: DiskStore, removal: Removal) -> None:
    source = replace(FILE, base="https://host/")
    commit(store, source, CONTENT)
    git = File("model.bin", len(CONTENT), "https://host/model.bin", DIGESTS["git-sha1"](CONTENT))
    commit(store, git, CONTENT)
    assert store.content.proven.has(source)
    assert store.content.hashes.blob_of(sha256(CONTENT)) == git.blob
    for blob in (FILE.blob, git.blob):
        assert removal.drop(blob) > 0
    assert not store.content.proven.has(source)
    assert store.content.hashes.blob_of(sha256(CONTENT)) is None


def test_a_recorded_sha256_must_be_that_of_the_bytes(store: DiskStore) -> None:
    """Other models may share the blob by it."""
    stated = File("model.bin", len(CONTENT), "https://host/model.bin", DIGESTS["crc64nvme"](CONTENT))
    with pytest.raises(Corrupt) as refusal:
        commit(store, replace(stated, sha256=OTHER), CONTENT)
    assert refusal.value.facts["expected"] == str(OTHER)
    assert not store.content.has(stated)
    right = replace(stated, sha256=sha256(CONTENT))
    commit(store, right, CONTENT)
    assert store.content.hashes.blob_of(sha256(CONTENT)) == stated.blob
    assert isinstance(store.content.hashes.of(right), Digest)
