"""What a source must send to prove that it has a blob: random samples, or the complete file."""

from __future__ import annotations

import pytest

from cachd.model import Digest, Extent, File
from cachd.transfer.proof import Proof
from tests.ground.models import noise
from tests.ground.stored import KIB, file_of, sha256

ENOUGH_BYTES = 2 * 32 * 16 * KIB


def sized(size: int) -> File:
    return File("model.bin", size, "https://host/model.bin", Digest("sha256", "0" * 64))


def test_a_large_file_is_proven_by_samples_at_places_that_nobody_foresees() -> None:
    asked: list[int] = []

    def below(most: int) -> int:
        asked.append(most)
        return most - len(asked)

    proof = Proof(sized(ENOUGH_BYTES + 1), by_samples=True, below=below)
    last = ENOUGH_BYTES + 1 - 16 * KIB
    assert asked == [last + 1] * 32
    assert proof.samples == [Extent(last - n, last - n + 16 * KIB) for n in range(32)]
    assert proof.samples[0].stop == ENOUGH_BYTES + 1, "also the last byte may be asked for"
    other = Proof(sized(ENOUGH_BYTES + 1), by_samples=True)
    assert other.samples != Proof(sized(ENOUGH_BYTES + 1), by_samples=True).samples


@pytest.mark.parametrize(("size", "by_samples"), [(ENOUGH_BYTES, True), (ENOUGH_BYTES + 1, False), (1, True)])
def test_another_file_is_fetched_completely(size: int, by_samples: bool) -> None:
    proof = Proof(sized(size), by_samples=by_samples)
    assert proof.samples == []
    assert (proof.rest, proof.reached, proof.has_ranges) == (Extent(0, size), 0, True)


def test_the_complete_file_is_hashed_as_it_comes_and_from_the_start_if_it_must_begin_again() -> None:
    content = noise(1000)
    proof = Proof(file_of(content), by_samples=True)
    proof.take(memoryview(content)[:400])
    assert (proof.reached, proof.rest) == (400, Extent(400, 1000))
    proof.begin()
    assert (proof.reached, proof.rest) == (0, Extent(0, 1000))
    for part in (content[:1], content[1:]):
        proof.take(memoryview(part))
    assert (proof.reached, proof.rest.size, proof.digest()) == (1000, 0, sha256(content))
