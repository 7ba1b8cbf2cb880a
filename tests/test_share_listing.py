"""The files of a shared volume: digests, origins and marks, and what cannot be one of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cachd.errors import CachdError, Changed, Invalid
from cachd.model import Digest, Extent, File, Manifest, Ref, quoted
from cachd.sources.cancel import CancelToken
from cachd.sources.share_listing import mark_of
from tests.fetching import refused, resolve, share

SUM = hashlib.sha256(b"x").hexdigest()


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "top/a").mkdir(parents=True)
    (tmp_path / "top/a/x").write_bytes(b"x")
    (tmp_path / "top/y").write_bytes(b"x")
    return tmp_path / "top"


def found(top: Path) -> Manifest:
    """All files, also of a directory with others that cannot be used."""
    return share(top.parent).resolve(Ref.parse(f"file://{top}"), CancelToken()).select((), ("none",))


def listed(top: Path) -> dict[str, File]:
    return {file.path: file for file in resolve(share(top.parent), f"file://{top}").files}


def error_of(top: Path) -> CachdError:
    with pytest.raises(CachdError) as refusal:
        listed(top)
    return refusal.value


def test_a_directory_has_files_with_their_marks_and_origins(top: Path) -> None:
    files = listed(top)
    assert list(files) == ["a/x", "y"]
    for path, file in files.items():
        assert (file.size, file.digest, file.origin) == (1, None, f"file://{top}/{path}")
        assert file.validator == mark_of((top / path).stat())


def test_a_mark_changes_with_size_and_times(top: Path) -> None:
    before = mark_of((top / "y").stat())
    os.utime(top / "y", ns=(0, 1))
    after = mark_of((top / "y").stat())
    assert before != after == mark_of((top / "y").stat())
    status = (top / "y").stat()
    assert after == f"1-1-{status.st_ctime_ns}"


def test_the_revision_is_a_hash_of_the_files(top: Path) -> None:
    before = found(top).revision
    assert len(before) == 64
    assert found(top).revision == before
    (top / "z").write_bytes(b"z")
    assert found(top).revision != before


def test_files_with_several_names_have_one_origin(top: Path) -> None:
    (top / "hard").hardlink_to(top / "y")
    (top / "soft").symlink_to("a/x")
    files = listed(top)
    assert {path: file.origin for path, file in files.items()} == {
        "hard": f"file://{top}/hard",
        "y": f"file://{top}/hard",
        "soft": f"file://{top}/soft",
        "a/x": f"file://{top}/soft",
    }


def test_sha256sums_states_digests_and_is_no_file_of_the_model(top: Path) -> None:
    (top / "SHA256SUMS").write_text(f"{SUM}  y\n{SUM}  .git/x\n")
    files = listed(top)
    assert {path: file.digest for path, file in files.items()} == {"y": Digest("sha256", SUM), "a/x": None}
    (top / "a/SHA256SUMS").write_text("no checksums")
    assert "a/SHA256SUMS" in listed(top)


@pytest.mark.parametrize("name", ["z", "a/z", "b/z"])
def test_a_listed_file_that_is_not_there_is_missed_unless_what_is_above_cannot_be_used(
    top: Path, name: str
) -> None:
    (top / "SHA256SUMS").write_text(f"{SUM}  {name}\n")
    error = error_of(top)
    assert (error.code, f"has no {name}, " in error.detail) == ("file_not_found", True)


def test_a_listed_file_that_cannot_be_used_is_not_missed(top: Path) -> None:
    os.mkfifo(top / "pipe")
    (top / "SHA256SUMS").write_text(f"{SUM}  pipe\n{SUM}  y\n")
    manifest = share(top.parent).resolve(Ref.parse(f"file://{top}"), CancelToken())
    chosen = manifest.select((), ("pipe",))
    assert sorted(file.path for file in chosen.files) == ["a/x", "y"]
    assert error_of(top).code == "unsafe_path"


def test_sums_that_are_too_long_or_malformed_are_refused_and_a_directory_of_their_name_is_none(
    top: Path,
) -> None:
    (top / "SHA256SUMS").write_text("no checksums")
    assert error_of(top).code == "bad_checksums"
    with (top / "SHA256SUMS").open("wb") as opened:
        opened.truncate((16 << 20) + 1)
    assert isinstance(error_of(top), Invalid)
    (top / "SHA256SUMS").unlink()
    (top / "SHA256SUMS").mkdir()
    (top / "SHA256SUMS/x").write_bytes(b"x")
    assert "SHA256SUMS/x" in listed(top)


def test_a_directory_with_nothing_but_what_cannot_be_used_is_refused_for_that(top: Path) -> None:
    (top / "b").mkdir()
    os.mkfifo(top / "b/pipe")
    assert error_of(top / "b").code == "unsafe_path"


def test_a_listing_leaves_no_descriptor_open(top: Path) -> None:
    (top / "empty").write_bytes(b"")
    (top / "SHA256SUMS").write_text(f"{SUM}  y\n")
    listed(top)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        listed(top)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_empty_file_is_a_file(top: Path) -> None:
    (top / "empty").write_bytes(b"")
    assert listed(top)["empty"].size == 0


# --- one file ---


def test_one_file_has_the_digest_of_its_ref_and_its_own_name(top: Path) -> None:
    (file,) = resolve(share(top), f"file://{top}/a/x#sha256={SUM}").files
    assert (file.path, file.digest, file.origin) == ("x", Digest("sha256", SUM), f"file://{top}/a/x")
    (file,) = resolve(share(top), f"file://{top}/a/x").files
    assert file.digest is None
    refused(lambda: resolve(share(top), f"file://{top}/a#sha256={SUM}"), "bad_ref")


@pytest.mark.parametrize("suffix", [".aria2", ".lftp-pget-status", ".st"])
def test_a_file_beside_which_a_downloader_keeps_its_state_is_not_complete(top: Path, suffix: str) -> None:
    (top / "m.gguf").write_bytes(b"x")
    (top / f"m.gguf{suffix}").symlink_to("nowhere")
    refused(lambda: resolve(share(top), f"file://{top}/m.gguf"), "incomplete_model")


def test_a_pipe_is_no_file(top: Path) -> None:
    os.mkfifo(top / "pipe")
    refused(lambda: resolve(share(top), f"file://{top}/pipe"), "unsafe_path")


# --- revisions and bodies ---


def test_only_a_repository_of_a_hub_cache_has_revisions(top: Path) -> None:
    ref = Ref("file", quoted(str(top)), "main")
    refused(lambda: share(top.parent).resolve(ref, CancelToken()), "revision_not_found")


def test_each_file_and_directory_counts_as_progress(top: Path) -> None:
    token = CancelToken()
    share(top.parent).resolve(Ref.parse(f"file://{top}"), token)
    assert token.answered == 1 + 2 + 2


def test_a_body_is_read_in_any_steps_and_ends_with_its_extent(top: Path) -> None:
    (top / "long").write_bytes(b"0123456789")
    file = listed(top)["long"]
    with share(top.parent).open(file, Extent(2, 7), CancelToken()) as body:
        view = memoryview(bytearray(3))
        read = []
        while count := body.readinto(view):
            read.append(bytes(view[:count]))
        assert read == [b"234", b"56"]
        assert body.readinto(memoryview(bytearray(0))) == 0


@pytest.mark.parametrize("change", ["shrinks", "is written to"])
def test_a_file_that_changes_while_it_is_read_is_refused(top: Path, change: str) -> None:
    (top / "long").write_bytes(b"0123456789")
    file = listed(top)["long"]
    with share(top.parent).open(file, Extent(0, 10), CancelToken()) as body:
        with (top / "long").open("r+b") as opened:
            if change == "shrinks":
                opened.truncate(5)
            else:
                opened.write(b"9")
        os.utime(top / "long", ns=(0, 7))
        with pytest.raises(Changed, match="has shrunk to 5 bytes" if change == "shrinks" else "was changed"):
            body.readinto(memoryview(bytearray(10)))
    with pytest.raises(Changed, match="since it was listed"):
        share(top.parent).open(file, Extent(0, 5), CancelToken())
