"""A Hub cache on a shared volume: revisions, digests of its own blobs, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

from cachd.errors import CachdError, Forbidden, NotFound
from cachd.model import Digest, Ref
from tests.conftest import Engine, spec_of
from tests.fetching import refused, resolve, share
from tests.ground.models import noise

COMMIT, OLDER = "a1" * 20, "b2" * 20
CONFIG, WEIGHTS = b'{"model_type": "llama"}', noise(300_000)
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub/again.safetensors": WEIGHTS}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def name_of(content: bytes) -> str:
    """The name of its blob: small files are in git."""
    return git_sha1(content) if len(content) < 10_000 else hashlib.sha256(content).hexdigest()


def add_snapshot(repository: Path, files: dict[str, bytes], commit: str = COMMIT, *branches: str) -> Path:
    """A snapshot as huggingface_hub leaves it."""
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        (repository / "blobs" / name_of(content)).write_bytes(content)
        link = repository / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (2 + path.count("/"))) / "blobs" / name_of(content))
    for branch in branches:
        (repository / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    return repository / "snapshots" / commit


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A share that holds a repository with two snapshots, in the directory of a Hub cache."""
    repository = tmp_path / "share/hub/models--org--m"
    add_snapshot(repository, {"config.json": b"{}"}, OLDER, "v1", "refs/pr/1")
    add_snapshot(repository, FILES, COMMIT, "main")
    return tmp_path / "share"


@pytest.mark.parametrize(
    ("suffix", "commit"),
    [
        ("", COMMIT),
        ("/", COMMIT),
        ("@main", COMMIT),
        ("@main/", COMMIT),
        (f"@{COMMIT}", COMMIT),
        ("@v1", OLDER),
        ("@refs/pr/1", OLDER),
        ("@refs%2Fpr%2F1", OLDER),
        (f"@{OLDER}", OLDER),
        (f"@{OLDER[:7]}", OLDER),
    ],
)
def test_a_repository_of_a_cache_is_its_snapshot_of_the_revision(
    place: Path, suffix: str, commit: str
) -> None:
    manifest = resolve(share(place), f"file://{place}/hub/models--org--m{suffix}")
    assert manifest.revision == commit
    assert manifest.base == f"file://{place}/hub/models--org--m".rstrip("/") + "/" * (suffix == "/")
    paths = set(FILES) if commit == COMMIT else {"config.json"}
    assert {f.path for f in manifest.files} == paths


def test_a_shortened_commit_of_two_snapshots_is_refused_with_both(place: Path) -> None:
    twin = OLDER[:20] + "c" * 20
    add_snapshot(place / "hub/models--org--m", {"config.json": b"{}"}, twin)
    ref = f"file://{place}/hub/models--org--m@{{}}"
    with pytest.raises(NotFound) as refusal:
        resolve(share(place), ref.format(OLDER[:7]))
    assert refusal.value.code == "revision_not_found"
    assert OLDER in refusal.value.hint
    assert twin in refusal.value.hint
    assert resolve(share(place), ref.format(twin[:21])).revision == twin


def test_a_ref_with_a_revision_is_read_as_it_is_written(place: Path) -> None:
    for revision in ("main", "refs/pr/1", "a%2Fb", COMMIT):
        ref = Ref.parse(f"file:///mnt/hub/models--org--m@{revision}")
        assert (ref.location, Ref.parse(str(ref))) == ("/mnt/hub/models--org--m", ref)
        assert str(ref).endswith(f"@{revision}")
    assert Ref.parse("file:///mnt/a@b/c@d").location == "/mnt/a@b/c@d"
    refused(lambda: Ref.parse("file:///mnt/models--a--b@x..y"), "bad_revision")


@pytest.mark.parametrize("below", ["", f"/snapshots/{COMMIT}", f"/snapshots/{COMMIT}/sub"])
def test_the_names_of_the_repositorys_own_blobs_are_digests(place: Path, below: str) -> None:
    manifest = resolve(share(place), f"file://{place}/hub/models--org--m{below}")
    stated = {f.path.rpartition("/")[2]: f.digest for f in manifest.files}
    sha256 = Digest("sha256", hashlib.sha256(WEIGHTS).hexdigest())
    assert stated.pop("again.safetensors") == sha256
    if stated:
        assert stated == {"model.safetensors": sha256, "config.json": Digest("git-sha1", git_sha1(CONFIG))}


def test_a_file_of_a_snapshot_has_the_digest_of_its_blob(place: Path) -> None:
    ref = f"file://{place}/hub/models--org--m/snapshots/{COMMIT}/model.safetensors"
    (file,) = resolve(share(place), ref).files
    assert str(file.digest) == f"sha256:{hashlib.sha256(WEIGHTS).hexdigest()}"


@pytest.mark.parametrize("name", ["e3" * 16, "ABCDEF" * 10 + "0123", "e" * 32 + "-3"])
def test_a_name_that_is_no_digest_states_none(place: Path, name: str) -> None:
    repository = place / "hub/models--org--m"
    (repository / "blobs" / name).write_bytes(b"x")
    (repository / "snapshots" / COMMIT / "other").symlink_to(f"../../blobs/{name}")
    files = resolve(share(place), f"file://{repository}").files
    assert [f.digest for f in files if f.path == "other"] == [None]


def test_a_name_of_another_repositorys_blob_states_nothing(place: Path) -> None:
    other = place / "hub/models--org--other"
    add_snapshot(other, {"x": noise(20_000)}, COMMIT, "main")
    blob = name_of(noise(20_000))
    (place / f"hub/models--org--m/snapshots/{COMMIT}/x").symlink_to(f"../../../{other.name}/blobs/{blob}")
    files = resolve(share(place), f"file://{place}/hub/models--org--m").files
    assert [f.digest for f in files if f.path == "x"] == [None]


def share_blob(hub: Path, repository: Path, content: bytes, xet_hash: str) -> None:
    """Move a blob into the store of all repositories, as huggingface_hub 2 does."""
    blob = str(repository / "blobs" / name_of(content))
    assert publish_blob_to_shared_store(
        blob_path=blob,
        xet_hash=xet_hash,
        cache_dir=str(hub),
        expected_size=len(content),
        replace_existing=False,
    )
    assert Path(blob).is_symlink()


def test_a_blob_in_the_store_of_all_repositories_has_the_digest_that_its_own_repository_names(
    place: Path, root: Path, engine: Callable[..., Engine]
) -> None:
    repository = place / "hub/models--org--m"
    share_blob(place / "hub", repository, WEIGHTS, "e4" * 32)
    files = resolve(share(place), f"file://{repository}").files
    sha256 = Digest("sha256", hashlib.sha256(WEIGHTS).hexdigest())
    assert [f.digest for f in files if f.path.endswith(".safetensors")] == [sha256, sha256]
    running, stored = engine(allow=[f"file://{place}/"]), place / f"hub/blobs/e4/{'e4' * 32}"
    stored.chmod(0o644)  # huggingface_hub makes it read-only
    stored.write_bytes(WEIGHTS[::-1])
    refused(lambda: running.pull(f"file://{repository}", name="m"), "corrupt")
    stored.write_bytes(WEIGHTS)
    assert running.pull(f"file://{repository}", name="m").verified
    assert {path: (root / "models/m" / path).read_bytes() for path in FILES} == FILES


def test_each_blob_is_read_once_and_verified_and_no_hub_folder_is_taken(
    place: Path, root: Path, engine: Callable[..., Engine]
) -> None:
    running = engine(allow=[f"file://{place}/"])
    ref = f"file://{place}/hub/models--org--m@main"
    pull = running.pulls.start(spec_of(ref, name="m"))
    assert pull is not None
    pull.done.result(60)
    assert pull.progress.fetched == len(CONFIG) + len(WEIGHTS)
    assert {path: (root / "models/m" / path).read_bytes() for path in FILES} == FILES
    assert not (root / "hub/models--org--m").exists()


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
def test_a_blob_with_other_bytes_than_its_name_says_is_corrupt(
    place: Path, engine: Callable[..., Engine], path: str
) -> None:
    repository = place / "hub/models--org--m"
    (repository / "blobs" / name_of(FILES[path])).write_bytes(FILES[path][::-1])
    refused(lambda: engine(allow=[f"file://{place}/"]).pull(f"file://{repository}"), "corrupt")


# --- refused ---


def note(repository: Path, commit: str, files: dict[str, bytes]) -> None:
    """Which files a revision has, as huggingface_hub 2 notes it."""
    (repository / "trees").mkdir(exist_ok=True)
    shown = {
        path: {"size": len(said), "blob_id": git_sha1(said), "lfs_sha256": hashlib.sha256(said).hexdigest()}
        if len(said) >= 10_000
        else {"size": len(said), "blob_id": git_sha1(said)}
        for path, said in files.items()
    }
    (repository / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": shown}))


def test_a_download_of_another_revision_does_not_matter(place: Path) -> None:
    """As far as the notes of huggingface_hub show that it is of another one."""
    repository, new = place / "hub/models--org--m", noise(70_000)
    begun = repository / f"blobs/{name_of(new)}.1a2b3c4d.incomplete"
    begun.write_bytes(b"half")
    ref = f"file://{repository}"
    refused(lambda: resolve(share(place), ref), "incomplete_model")  # nothing says of which it is
    note(repository, "c3" * 20, {**FILES, "model.safetensors": new})
    assert resolve(share(place), ref).revision == COMMIT  # it replaces a file that is here
    note(repository, "c3" * 20, {**FILES, "more.safetensors": new})
    refused(lambda: resolve(share(place), ref), "incomplete_model")  # is it missing here, too?
    note(repository, COMMIT, FILES)
    assert resolve(share(place), ref).revision == COMMIT
    note(repository, COMMIT, {**FILES, "more.safetensors": new})
    error = refused(lambda: resolve(share(place), ref), "incomplete_model")
    assert begun.name in error.detail
    (repository / "blobs" / name_of(new)).write_bytes(new)
    assert resolve(share(place), ref).revision == COMMIT  # left over: the blob is complete


def begin_newer(repository: Path, files: dict[str, bytes], *, at: float) -> Path:
    """A download of another revision goes on: these of its files are complete, one is not."""
    begun = add_snapshot(repository, files, "c3" * 20, "main")
    begun.mkdir(parents=True, exist_ok=True)
    (repository / f"blobs/{name_of(noise(70_000))}.1a2b3c4d.incomplete").write_bytes(b"half")
    os.utime(begun, (at, at))
    return begun


def test_a_download_of_a_newer_revision_does_not_matter_without_notes(place: Path) -> None:
    """The newer snapshot lacks what is being downloaded, and the older one has it."""
    repository = place / "hub/models--org--m"
    changed = (repository / "snapshots" / COMMIT).stat().st_mtime
    begun = begin_newer(repository, {"config.json": CONFIG}, at=changed + 1)
    ref = f"file://{repository}@{COMMIT}"
    assert resolve(share(place), ref).revision == COMMIT
    refused(lambda: resolve(share(place), f"file://{repository}@main"), "incomplete_model")
    os.utime(begun, (changed - 1, changed - 1))
    refused(lambda: resolve(share(place), ref), "incomplete_model")  # it may have been left behind long ago


@pytest.mark.parametrize(
    "newer",
    [
        {"config.json": CONFIG, "more.json": b"{}"},  # is `more.json` missing in the older one, too?
        {"model.safetensors": WEIGHTS, "sub/again.safetensors": WEIGHTS},  # it lacks no large file
        FILES,
    ],
)
def test_a_newer_revision_that_does_not_explain_a_download_leaves_it_unknown(
    place: Path, newer: dict[str, bytes]
) -> None:
    repository = place / "hub/models--org--m"
    begin_newer(repository, newer, at=(repository / "snapshots" / COMMIT).stat().st_mtime + 1)
    refused(lambda: resolve(share(place), f"file://{repository}@{COMMIT}"), "incomplete_model")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"files": 7}', b'{"files": {"a": {}}}', b"[" * 9000])
def test_a_note_that_is_none_explains_no_download(place: Path, content: bytes) -> None:
    repository = place / "hub/models--org--m"
    (repository / "blobs/0123.4567.incomplete").write_bytes(b"")
    (repository / "trees").mkdir()
    for commit in (COMMIT, "c3" * 20):
        (repository / f"trees/{commit}.json").write_bytes(content)
    refused(lambda: resolve(share(place), f"file://{repository}"), "incomplete_model")


def test_a_blob_that_is_still_being_downloaded_makes_the_cache_incomplete(place: Path) -> None:
    repository = place / "hub/models--org--m"
    (repository / "blobs/0123.4567.incomplete").write_bytes(b"")
    for ref in (repository, f"{repository}/snapshots/{COMMIT}"):
        error = refused(lambda ref=ref: resolve(share(place), f"file://{ref}"), "incomplete_model")
        assert "0123.4567.incomplete" in error.detail


def test_a_link_without_its_blob_is_named_unless_a_pattern_excludes_it(place: Path) -> None:
    repository = place / "hub/models--org--m"
    (repository / "blobs" / name_of(CONFIG)).unlink()
    error = refused(lambda: resolve(share(place), f"file://{repository}"), "file_not_found")
    assert "config.json" in error.detail


def test_a_shard_that_the_index_names_and_the_snapshot_lacks_is_refused(
    place: Path, engine: Callable[..., Engine]
) -> None:
    index = (
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    files = {"model.safetensors.index.json": index, "model-00001-of-00002.safetensors": WEIGHTS}
    add_snapshot(place / "hub/models--org--s", files, COMMIT, "main")
    running = engine(allow=[f"file://{place}/"])
    refused(lambda: running.pull(f"file://{place}/hub/models--org--s"), "incomplete_model")


def test_a_revision_that_the_cache_lacks_is_not_found_and_the_hint_lists_those_it_has(place: Path) -> None:
    ref = f"file://{place}/hub/models--org--m@dev"
    error = refused(lambda: resolve(share(place), ref), "revision_not_found")
    assert "main" in error.hint
    assert OLDER in error.hint
    (place / "hub/models--org--m/refs/main").unlink()
    refused(lambda: resolve(share(place), f"file://{place}/hub/models--org--m"), "revision_not_found")


def test_the_only_snapshot_of_a_cache_without_branches_is_taken(tmp_path: Path) -> None:
    add_snapshot(tmp_path / "models--org--m", FILES)
    assert resolve(share(tmp_path), f"file://{tmp_path}/models--org--m").revision == COMMIT


@pytest.mark.parametrize("left", ["refs", "blobs", "snapshots"])
def test_a_repository_without_a_snapshot_is_no_model(tmp_path: Path, left: str) -> None:
    (tmp_path / "models--org--m" / left).mkdir(parents=True)
    (tmp_path / "models--org--m" / left / "x").write_bytes(b"x")
    refused(lambda: resolve(share(tmp_path), f"file://{tmp_path}/models--org--m"), "revision_not_found")


def test_only_a_repository_of_a_cache_has_revisions(place: Path) -> None:
    (place / "models--a--b").mkdir()
    (place / "models--a--b/x").write_bytes(b"x")
    refused(lambda: resolve(share(place), f"file://{place}/models--a--b@main"), "revision_not_found")


def test_a_complete_cache_is_no_model_and_the_error_lists_its_repositories(place: Path) -> None:
    add_snapshot(place / "hub/datasets--org--d", {"x": b"x"})
    for top, shown in ((place / "hub", "models--org--m"), (place, "hub/models--org--m")):
        error = refused(lambda top=top: resolve(share(place), f"file://{top}"), "several_models")
        assert f"datasets--org--d, {shown}".replace(", hub/", ", hub/") in error.detail.replace("hub/d", "d")
        assert "hub_id" in error.hint


def test_links_that_leave_the_share_are_refused_whatever_the_cache_holds(place: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    link = place / f"hub/models--org--m/snapshots/{COMMIT}/secret"
    for target in (tmp_path / "secret", Path("../" * 5 + "secret")):
        link.symlink_to(target)
        refused(lambda: resolve(share(place), f"file://{place}/hub/models--org--m"), "path_refused")
        link.unlink()
    for hostile in ("../../../../secret", str(tmp_path / "secret"), "..", "/", ""):
        (place / "hub/models--org--m/refs/evil").write_text(hostile)
        refused(
            lambda: resolve(share(place), f"file://{place}/hub/models--org--m@evil"), "revision_not_found"
        )
    (place / "hub/models--org--m/refs/leads").symlink_to(tmp_path / "secret")
    with pytest.raises(Forbidden):
        resolve(share(place), f"file://{place}/hub/models--org--m@leads")


def test_a_snapshot_of_files_instead_of_links_is_a_model_without_digests(tmp_path: Path) -> None:
    snapshot = tmp_path / f"models--org--m/snapshots/{COMMIT}"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(CONFIG)
    (file,) = resolve(share(tmp_path), f"file://{tmp_path}/models--org--m").files
    assert file.digest is None


def test_a_reading_of_a_cache_leaves_no_descriptor_open(place: Path) -> None:
    resolve(share(place), f"file://{place}/hub/models--org--m")
    before = os.listdir("/proc/self/fd")
    resolve(share(place), f"file://{place}/hub/models--org--m")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(("count", "more"), [(20, ""), (21, " and 1 more")])
def test_the_error_about_a_complete_cache_lists_twenty_repositories(
    tmp_path: Path, count: int, more: str
) -> None:
    for number in range(count):
        (tmp_path / f"models--org--m{number:02}/snapshots").mkdir(parents=True)
    (tmp_path / "models--org--empty").mkdir()
    (tmp_path / "snapshots").mkdir()
    error = refused(lambda: resolve(share(tmp_path), f"file://{tmp_path}"), "several_models")
    assert f" with {count} repositories, " in error.detail
    assert error.detail.endswith(f"models--org--m18, models--org--m19{more}")


def test_a_branch_is_read_from_a_file_of_1024_bytes_at_most(place: Path) -> None:
    branch = place / "hub/models--org--m/refs/padded"
    branch.write_text(COMMIT.ljust(1024))
    assert resolve(share(place), f"file://{place}/hub/models--org--m@padded").revision == COMMIT
    branch.write_text(COMMIT.ljust(1025))
    with pytest.raises(CachdError):
        resolve(share(place), f"file://{place}/hub/models--org--m@padded")
