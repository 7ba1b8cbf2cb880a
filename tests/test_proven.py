"""The proofs of sources, and the lines of part hashes, as they are read back from the disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cachd.model import Digest, Extent, File
from cachd.store.ingest.part_lines import read_parts
from cachd.store.proven import Proven

FILE = File("a", 5, "https://h/a", Digest("sha256", "5" * 64), base="https://h/")
OTHER = File("b", 5, "https://h/b", Digest("sha256", "6" * 64), base="https://h/")


def test_a_proof_survives_a_restart(tmp_path: Path) -> None:
    Proven(tmp_path / "proven", lambda _: True).add(FILE)
    assert Proven(tmp_path / "proven", lambda _: True).has(FILE)


def test_the_lines_of_blobs_that_are_gone_are_dropped(tmp_path: Path) -> None:
    place, here = tmp_path / "proven", {FILE.blob, OTHER.blob}
    proven = Proven(place, here.__contains__)
    proven.add(FILE)
    proven.add(OTHER)
    with place.open("a") as lines:
        lines.write("torn\n")
    here.remove(OTHER.blob)
    proven = Proven(place, here.__contains__)
    proven.drop_stale()
    assert place.read_text().endswith(f" {FILE.blob}\n")
    assert place.read_text().count("\n") == 1
    assert not proven.has(OTHER), "its blob is gone"
    here.clear()
    proven.drop_stale()
    assert not place.exists()


def test_proofs_that_cannot_be_read_stay_for_the_next_start(tmp_path: Path) -> None:
    """Such as when the daemon has no free descriptor, or another process holds a lease on the file."""
    place, kept = tmp_path / "proven", tmp_path / "kept"
    Proven(place, lambda _: True).add(FILE)
    place.rename(kept)
    place.symlink_to(kept)  # cachd opens no link
    assert not Proven(place, lambda _: True).has(FILE)
    assert place.is_symlink()
    kept.replace(place)
    assert Proven(place, lambda _: True).has(FILE)


def test_only_a_source_that_has_proven_it_may_use_a_shared_blob(tmp_path: Path) -> None:
    proven = Proven(tmp_path / "proven", lambda _: True)
    elsewhere = replace(FILE, base="https://other/")
    assert [proven.has(file) for file in (FILE, OTHER, elsewhere)] == [False] * 3
    proven.add(FILE)
    assert [proven.has(file) for file in (FILE, OTHER, elsewhere)] == [True, False, False]
    assert proven.has(replace(OTHER, base="hf://org/model")), "the Hub checks its listings itself"
    assert proven.has(File("a", 5, "https://h/a", None, "etag", base="https://h/")), "it has no other source"
    before = (tmp_path / "proven").read_text()
    proven.add(FILE)
    assert (tmp_path / "proven").read_text() == before
    assert Proven(tmp_path / "other", lambda _: True, trusts_claims=True).has(OTHER)


def test_after_three_unfinished_proofs_samples_are_not_enough(tmp_path: Path) -> None:
    proven = Proven(tmp_path / "proven", lambda _: True)
    assert [proven.begin_proof(FILE) for _ in range(4)] == [True, True, True, False]
    assert proven.begin_proof(OTHER), "each blob has its own count"
    for number in range(3):
        proven.add(replace(FILE, base=f"https://{number}/"))  # by which one proof ends
    assert [proven.begin_proof(FILE) for _ in range(3)] == [True, True, False]


def test_the_file_of_proofs_is_open_during_pulls_alone(tmp_path: Path) -> None:
    proven, before = Proven(tmp_path / "proven", lambda _: True), sorted(os.listdir("/proc/self/fd"))
    with proven.during_pull():
        with proven.during_pull():
            proven.add(FILE)
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    assert sorted(os.listdir("/proc/self/fd")) == before
    proven.add(OTHER)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert all(Proven(tmp_path / "proven", lambda _: True).has(file) for file in (FILE, OTHER))


def test_a_removed_blob_has_no_proof_and_the_last_one_takes_the_file_with_it(tmp_path: Path) -> None:
    place = tmp_path / "proven"
    proven = Proven(place, lambda _: True)
    proven.add(FILE)
    proven.add(OTHER)
    proven.forget(FILE.blob)
    assert (proven.has(FILE), proven.has(OTHER), place.exists()) == (False, True, True)
    proven.forget(OTHER.blob)
    assert not place.exists()
    proven.forget(OTHER.blob)
    proven.add(FILE)
    assert Proven(place, lambda _: True).has(FILE)


def test_a_file_without_lines_is_removed_and_nothing_is_rewritten_without_need(tmp_path: Path) -> None:
    place = tmp_path / "proven"
    place.touch()
    proven = Proven(place, lambda _: True)
    assert not place.exists()
    proven.add(FILE)
    before = place.stat().st_ino
    proven.drop_stale()
    assert Proven(place, lambda _: True).has(FILE)
    assert place.stat().st_ino == before


@pytest.mark.parametrize(
    "line", ["0 4 ab", "0 4 " + "A" * 32, "0 4 " + "a" * 31, "0 9 " + "a" * 32, "0 4", "4 4 x"]
)
def test_a_torn_or_wrong_line_of_part_hashes_is_skipped(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.parts").write_text(f"0 8 {'b' * 16}\n{line}\n4 8 {'c' * 32}")
    assert list(read_parts(tmp_path / "x.parts", 8)) == [(Extent(0, 8), "b" * 16), (Extent(4, 8), "c" * 32)]
