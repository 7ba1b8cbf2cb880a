"""Files of more than 50 GB and of more than 2**32 bytes: offsets, parts, ranges, checksums.

No test fetches so many bytes. The origin holds a sparse file. By the journal of an earlier pull, whose data
file is sparse, too, most of its zeros are here already. The pull reads and hashes all of them, and fetches
a few parts at large offsets. So this shows that nothing is cut to 32 bits, and that the checksum of the
complete file is right; it does not show how 50 GB arrive.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from awscrt import checksums

from cachd.config import Config
from cachd.daemon.parts import assembled
from tests.conftest import Engine, spec_of
from tests.fetching import PATIENCE_SECONDS
from tests.ground.bucket import Bucket
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.origin import Disk, Server
from tests.ground.site import until

Engines = Callable[..., Engine]
Disks = Callable[..., Path]

MIB, GIB = 1 << 20, 1 << 30
PART = 32 * MIB
NAME = "weights.dat"  # no form whose header cachd reads before a publish: it is of zeros here
LONG_SECONDS = 20 * PATIENCE_SECONDS
OPTIONS: dict[str, Any] = {"allow": ("127.0.0.0/8", "http://127.0.0.1/"), "reserve_free": 0, "streams": 4}
LINE_OF_ZEROS = {
    "crc64nvme": f"{checksums.crc64nvme(bytes(PART)):016x}",
    "sha256": xxhash.xxh3_128(bytes(PART)).hexdigest(),
}


@dataclass(frozen=True)
class Large:
    """A file of zeros, but for a MiB of noise at each of some offsets. The parts with noise are missing."""

    size: int
    noisy: tuple[int, ...]

    def write(self, path: Path) -> Path:
        with path.open("wb") as opened:
            os.truncate(opened.fileno(), self.size)
            for seed, offset in enumerate(self.noisy):
                os.pwrite(opened.fileno(), noise(MIB, seed), offset)
        return path

    @property
    def missing(self) -> list[int]:
        """The numbers of the parts that the journal lacks."""
        return sorted({at // PART for offset in self.noisy for at in (offset, offset + MIB - 1)})

    def lines(self, hexdigest: str) -> str:
        """The journal of an earlier pull."""
        extents = [(start, min(start + PART, self.size)) for start in range(0, self.size, PART)]
        return "".join(
            f"{start} {stop} {hexdigest}\n"
            for number, (start, stop) in enumerate(extents)
            if number not in self.missing
        )

    def check(self, path: Path) -> None:
        """Assert that a file has the size, and the noise at its offsets."""
        assert path.stat().st_size == self.size
        with path.open("rb") as opened:
            for seed, offset in enumerate(self.noisy):
                assert os.pread(opened.fileno(), MIB, offset) == noise(MIB, seed)


# The noise at 2**32 belongs to two parts. The last part is shorter than the others.
OVER_4_GIB = Large((4 << 30) + 50 * MIB + 7, ((1 << 32) - MIB // 2, (4 << 30) + 49 * MIB + 7))
OVER_50_GB = Large(60 * 10**9 + 1, ((1 << 32) - MIB // 2, 1 << 35, 60 * 10**9 + 1 - MIB))


def left_by_an_earlier_life(
    options: Mapping[str, Any], ref: str, server: Server, path: str, lines: str
) -> None:
    """Begin to pull a file, end, and leave a journal with these lines."""
    hold = server.hold(path, after=3 * MIB)
    with assembled(Config(**options)) as first:
        running = first.pulls.start(spec_of(ref, name="large"))
        assert running
        until(lambda: running.progress.now.done >= 3 * MIB)
    hold.release()
    (data,) = (options["root"] / ".cachd/ingest").glob("*/data")
    data.with_name("received").unlink()
    data.with_name("journal").write_text(lines)
    server.forget()


def check(large: Large, root: Path, server: Server, path: str) -> None:
    """Only the missing parts were asked for, and the file is complete."""
    asked = sorted(seen.extent for seen in server.requests if seen.path == path and seen.extent)
    asked = [extent for extent in asked if extent != (0, 1)]
    starts = {number * PART: min((number + 1) * PART, large.size) for number in large.missing}
    assert dict(asked) == starts
    published = root / "models/large" / NAME
    large.check(published)
    assert published.stat().st_blocks * 512 < (len(large.missing) + 1) * PART, "it is not sparse any more"


def test_an_object_of_60_gb_is_resumed_at_offsets_of_eleven_digits_and_has_its_checksum(
    bucket: Bucket, disk: Disks, engine: Engines
) -> None:
    root = disk(2 * OVER_50_GB.size)
    with OVER_50_GB.write(root.parent / "origin").open("rb") as held:
        told = crc64nvme(held.fileno(), OVER_50_GB)
        path = bucket.put(f"m/{NAME}", Disk(held.fileno(), OVER_50_GB.size), **told)
        options = {**OPTIONS, "root": root, "s3_endpoint_url": bucket.url, "s3_region": "us-east-1"}
        lines = OVER_50_GB.lines(LINE_OF_ZEROS["crc64nvme"])
        left_by_an_earlier_life(options, "s3://models/m/", bucket, path, lines)
        snapshot = engine(**options).begin(spec_of("s3://models/m/", name="large")).done.result(LONG_SECONDS)
    assert (snapshot.size, dict(snapshot.verified_by)) == (OVER_50_GB.size, {"crc64nvme": 1})
    check(OVER_50_GB, root, bucket, path)
    assert max(len(str(start)) for start in (seen.extent[0] for seen in bucket.requests if seen.extent)) == 11


def crc64nvme(descriptor: int, large: Large) -> Mapping[str, str]:
    """The headers with the checksum of a file, computed from its first to its last byte."""
    value, zeros = 0, bytes(MIB)
    reached = 0
    for seed, offset in enumerate(large.noisy):
        for start in range(reached, offset, MIB):
            value = checksums.crc64nvme(zeros[: min(MIB, offset - start)], value)
        value = checksums.crc64nvme(noise(MIB, seed), value)
        reached = offset + MIB
    assert reached == large.size
    encoded = base64.b64encode(value.to_bytes(8, "big")).decode()
    return {"x_amz_checksum_crc64nvme": encoded, "x_amz_checksum_type": "FULL_OBJECT"}


def test_a_file_of_the_hub_is_resumed_beyond_32_bits_and_has_its_sha256(
    hub: Hub, disk: Disks, engine: Engines
) -> None:
    root = disk(3 * OVER_4_GIB.size)
    hub.add("org/large", {NAME: OVER_4_GIB.write(root.parent / "origin")})
    path = hub.cdn_path("org/large", NAME)
    options = {**OPTIONS, "root": root, "hf_endpoint": hub.url}
    lines = OVER_4_GIB.lines(LINE_OF_ZEROS["sha256"])
    left_by_an_earlier_life(options, "hf://org/large", hub.cdn, path, lines)
    snapshot = engine(**options).begin(spec_of("hf://org/large", name="large")).done.result(LONG_SECONDS)
    assert (snapshot.size, dict(snapshot.verified_by)) == (OVER_4_GIB.size, {"sha256": 1})
    check(OVER_4_GIB, root, hub.cdn, path)
