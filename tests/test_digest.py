"""What a digest and an extent may be."""

from __future__ import annotations

import pytest

from cachd.model import (
    Digest,
    Extent,
)
from tests.ground.values import SHA256, code_of

# --- digests ---


@pytest.mark.parametrize(
    ("algorithm", "digits"),
    [("sha256", 64), ("git-sha1", 40), ("sha1", 40), ("crc64nvme", 16), ("crc32c", 8), ("crc32", 8)],
)
def test_a_digest_has_exactly_the_digits_of_its_algorithm(algorithm: str, digits: int) -> None:
    assert str(Digest.parse(f"{algorithm}:{'a' * digits}")) == f"{algorithm}:{'a' * digits}"
    for wrong in (digits - 1, digits + 1):
        assert code_of(lambda wrong=wrong: Digest(algorithm, "a" * wrong)) == "bad_digest"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "sha256",
        "sha256:",
        f"sha256:{'g' * 64}",
        f"sha256: {'0' * 63}",
        f"sha256:{'0' * 64}\n",
        "sha256:" + "\u0660" * 64,
        f"md5:{'0' * 32}",
        f"SHA256:{'0' * 64}",
        f"sha512:{'0' * 128}",
        SHA256,
        f"../sha256:{'0' * 64}",
    ],
    ids=ascii,
)
def test_any_other_digest_is_refused(text: str) -> None:
    assert code_of(lambda: Digest.parse(text)) == "bad_digest"


def test_upper_case_hex_is_folded_when_it_is_read_and_nowhere_else() -> None:
    assert Digest.parse(f"sha256:{SHA256.upper()}") == Digest("sha256", SHA256)
    assert code_of(lambda: Digest("sha256", SHA256.upper())) == "bad_digest"


def test_only_a_sha256_names_content() -> None:
    lengths = {
        "sha256": 64,
        "git-sha1": 40,
        "sha1": 40,
        "crc64nvme": 16,
        "crc32c": 8,
        "crc32": 8,
        "origin": 64,
    }
    naming = {name for name, digits in lengths.items() if Digest(name, "0" * digits).names_content}
    assert naming == {"sha256"}


# --- extents ---


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (1, 0), (-2, -1)])
def test_an_extent_that_is_no_interval_of_a_file_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not an interval"):
        Extent(start, stop)
