"""Digests of content, of its pieces in order, and of its parts; each compared with another implementation."""

from __future__ import annotations

import pytest
import xxhash

from cachd.model import Digest, File
from cachd.store.digests import PartHash, checksum, corrupt, digest_of, hasher_of, in_order
from tests.ground.models import noise
from tests.ground.stored import DIGESTS

CONTENT = noise(10_000)
PIECES = [CONTENT[:1], CONTENT[1:5000], b"", CONTENT[5000:]]
CRCS = {"crc32": 32, "crc32c": 32, "crc64nvme": 64}


@pytest.mark.parametrize("content", [CONTENT, b"", b"x"], ids=len)
@pytest.mark.parametrize("algorithm", DIGESTS)
def test_the_digest_of_content_is_that_of_another_implementation(algorithm: str, content: bytes) -> None:
    expected = DIGESTS[algorithm](content)
    assert digest_of(expected, memoryview(content)) == expected
    assert digest_of(expected, memoryview(content + b"!")) != expected


@pytest.mark.parametrize("algorithm", DIGESTS)
def test_pieces_in_order_have_the_digest_of_the_content(algorithm: str) -> None:
    expected = DIGESTS[algorithm](CONTENT)
    hashers = [hasher_of(expected, len(CONTENT))]
    hashers += [in_order(expected, len(CONTENT))] if algorithm not in CRCS else []
    for hasher in hashers:
        for piece in PIECES:
            hasher.update(memoryview(piece))
        assert hasher.digest() == hasher.digest() == expected


@pytest.mark.parametrize("algorithm", DIGESTS)
def test_only_a_crc_is_combined_from_those_of_its_parts(algorithm: str) -> None:
    expected = DIGESTS[algorithm](CONTENT)
    check = checksum(expected)
    if algorithm not in CRCS:
        assert check is None
        return
    assert check is not None
    assert (check.algorithm, check.bits) == (algorithm, CRCS[algorithm])
    assert check.joined([(check.add(memoryview(p), 0), len(p)) for p in PIECES]) == expected
    assert check.joined([]) == DIGESTS[algorithm](b"")


def test_without_a_digest_there_is_no_crc() -> None:
    assert checksum(None) is None


@pytest.mark.parametrize("algorithm", [None, *CRCS])
def test_a_part_is_known_by_a_hash_of_at_least_64_bits(algorithm: str | None) -> None:
    expected = DIGESTS[algorithm](CONTENT) if algorithm else None
    hashed = PartHash(checksum(expected))
    for piece in PIECES[:2]:
        hashed.update(memoryview(piece))
    before = hashed.copy()
    for piece in PIECES[2:]:
        hashed.update(memoryview(piece))
    value = int(expected.hex, 16) if expected else 0
    known = expected.hex if algorithm == "crc64nvme" and expected else xxhash.xxh3_128_hexdigest(CONTENT)
    assert (hashed.hexdigest, hashed.checksum) == (known, value)
    assert before.hexdigest != hashed.hexdigest
    for piece in PIECES[2:]:
        before.update(memoryview(piece))
    assert (before.hexdigest, before.checksum) == (known, value)


def test_the_error_for_a_wrong_digest_says_both() -> None:
    stated, got, other = (Digest("sha256", digit * 64) for digit in "123")
    file = File("a/b", 5, "https://host/b", stated)
    error = corrupt(file, got)
    assert error.facts == {"file": "a/b", "expected": str(stated), "got": str(got)}
    assert all(part in error.detail for part in ("a/b", str(stated), str(got), "5 bytes", "https://host/b"))
    assert corrupt(file, got, other).facts["expected"] == str(other)
