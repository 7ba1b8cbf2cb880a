"""The disk fails while the store reads or writes: what is intact is used, and nothing else is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cachd.errors import DiskFailed
from cachd.kernel import durable
from cachd.model import File
from cachd.store.ingest.part_lines import parts_of
from cachd.upkeep.jobs import JobState
from cachd.upkeep.scrubs import Scrubs
from tests.conftest import PATIENCE_SECONDS, Engine
from tests.ground.disks import FuseDisk
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.pause import at_event

MIB = 1 << 20
PART = 4 * MIB
CONTENT = noise(3 * PART)


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[FuseDisk]:
    """A disk that fails on demand."""
    with FuseDisk(tmp_path) as disk:
        yield disk


def damage(on: Engine, name: str) -> None:
    """Flip a byte of the last part of the only file of a model, and report it as a scrub does."""
    file = file_of(on, name)
    blob = on.store.layout.blob(file.blob)
    blob.chmod(0o644)
    with blob.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(bytes([CONTENT[-1] ^ 1]))
    blob.chmod(durable.SEALED)
    assert on.store.quarantine(file, "damaged", on.store.content.inode(file.blob), now=5.0) == [name]


# What the disk cannot read of the damaged file, and how much of it is fetched again.
UNREADABLE = {
    "nothing": ("", PART),
    "its bytes": ("*[0-9a-f]", 3 * PART),
    "its part hashes": ("*.parts", 3 * PART),
}


@pytest.mark.parametrize(("match", "fetched"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_repair_fetches_what_the_disk_cannot_read_of_the_damaged_file(
    broken: FuseDisk, origin: Origin, engine: Callable[..., Engine], match: str, fetched: int
) -> None:
    on = engine(root=broken.path, allow=(f"{origin.url}/",), scrub_bytes_per_second=0)
    ref = origin.add("/model.bin", CONTENT)
    on.pull(ref)
    damage(on, "model.bin")
    origin.forget()
    broken.fail("read", "EIO", f"/.cachd/damaged/{match}")
    on.pull(ref)
    broken.heal()
    assert origin.bytes_sent("/model.bin") == fetched
    assert (broken.path / "models/model.bin/model.bin").read_bytes() == CONTENT
    assert list((broken.path / ".cachd/damaged").iterdir()) == []


def undigested(on: Engine, origin: Origin, *names: str) -> None:
    """Pull models whose source states no digest."""
    for number, name in enumerate(names):
        on.pull(origin.add(f"/{name}", noise(64, number)))


def file_of(on: Engine, name: str) -> File:
    (file,) = on.store.manifests.of(on.store.names.ready(name)).files
    return file


def lose_part_hashes(on: Engine, name: str) -> None:
    parts_of(on.store.layout.blob(file_of(on, name).blob)).unlink()


def test_a_file_that_cannot_be_verified_is_not_called_intact(
    origin: Origin, engine: Callable[..., Engine]
) -> None:
    """Its source states no digest, and its part hashes are gone: there is nothing to compare it with."""
    on = engine(scrub_bytes_per_second=0)
    undigested(on, origin, "kept.bin", "lost.bin")
    lose_part_hashes(on, "lost.bin")
    found = {name: on.scrubs.verify(name) for name in ("kept.bin", "lost.bin")}
    assert all(each.ended.wait(PATIENCE_SECONDS) for each in found.values())
    assert found["kept.bin"].state is JobState.intact
    assert found["lost.bin"].state is JobState.failed
    assert isinstance(found["lost.bin"].error, DiskFailed)
    assert on.store.names.get("lost.bin") is not None, "it may well be intact"


def test_a_file_that_cannot_be_verified_keeps_the_scrub_from_no_other(
    origin: Origin, engine: Callable[..., Engine]
) -> None:
    on = engine(scrub_bytes_per_second=0)
    undigested(on, origin, "lost.bin", "damaged.bin")
    lose_part_hashes(on, "lost.bin")
    blob = on.store.layout.blob(file_of(on, "damaged.bin").blob)
    blob.chmod(0o644)
    blob.write_bytes(bytes(64))
    verified_at = {str(file_of(on, name).blob): at for at, name in enumerate(("lost.bin", "damaged.bin"))}
    on.store.layout.scrub_log.write_text(json.dumps(verified_at))
    scrubs = Scrubs(on.store, on.pulls, on.metrics, bytes_per_second=10**9, interval_seconds=0.01)
    with closing(scrubs), at_event("readiness withdrawn", lambda: None) as withdrawn:
        scrubs.start()
        assert withdrawn.wait(PATIENCE_SECONDS)
    assert on.store.names.get("lost.bin") is not None
