"""The proofs of sources, and the lines of part hashes, as they are read back from the disk."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "line", ["0 4 ab", "0 4 " + "A" * 32, "0 4 " + "a" * 31, "0 9 " + "a" * 32, "0 4", "4 4 x"]
)
def test_a_torn_or_wrong_line_of_part_hashes_is_skipped(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.parts").write_text(f"0 8 {'b' * 16}\n{line}\n4 8 {'c' * 32}")
    assert list(read_parts(tmp_path / "x.parts", 8)) == [(Extent(0, 8), "b" * 16), (Extent(4, 8), "c" * 32)]
