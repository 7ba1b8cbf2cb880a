"""The power goes at any moment: what was not synced may be there or not; no ready file names a wrong byte."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cachd.model import Extent
from cachd.policy.parts import Received
from cachd.store.disk_store import DiskStore
from tests.ground import mount, power
from tests.ground.disks import FuseDisk
from tests.ground.models import digests, noise
from tests.ground.site import files_left
from tests.ground.stored import (
    CONTENT,
    FILE,
    PARTS,
    A,
    B,
    Files,
    assert_whole,
    commit,
    file_of,
    hub,
    manifest_of,
    publish,
    refs_of,
    shown,
    write,
)
from tests.test_ingest import keep_begun

KIB = 1 << 10
TOKENIZER = noise(3 * KIB, 3)
FILES: Mapping[str | None, Files] = {
    A: {"model.bin": noise(10 * KIB, 1), "tokenizer.json": TOKENIZER},
    B: {"sub/model.bin": noise(10 * KIB, 2), "tokenizer.json": TOKENIZER},
}
WITH_BRANCH = "hf://org/model"
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass(slots=True)
class Life:
    """A store on a disk that keeps records, and which revisions may be ready under its name from which
    record on; None: no ready file."""

    disk: FuseDisk
    store: DiskStore
    may_be: list[tuple[int, set[str | None]]] = field(default_factory=lambda: [(0, {None})])

    def change(self, work: Callable[[], object], *, into: str | None) -> None:
        """Change the name: before it the old is there, after it the new, meanwhile either or none."""
        _, before = self.may_be[-1]
        self.may_be.append((len(self.disk.records()), {*before, into, None}))
        work()
        self.may_be.append((len(self.disk.records()), {into}))

    def publish(self, revision: str, ref: str = WITH_BRANCH) -> None:
        """Take the small file in as pulls do, the large one through an ingest."""
        if not self.store.content.has(file_of(TOKENIZER)):
            self.store.content.put(file_of(TOKENIZER), memoryview(TOKENIZER))
        files = FILES[revision]
        self.change(lambda: publish(self.store, files, ref, "mine", revision=revision), into=revision)

    def moments(self, promised: Callable[[int], Hashable]) -> Iterator[tuple[power.State, int, str]]:
        """Each different state that a loss of power could leave, and after which record; not again one that
        was given for the same promise.

        Before each sync, and where a promise changes: between two syncs there is only ever more unsynced.
        """
        disk, seen = power.Disk(), set()
        records = [("sync_directory", 0), *self.disk.records(), ("sync_directory", 0)]
        for index, (record, following) in enumerate(itertools.pairwise(records)):
            disk.apply(record)
            if not following[0].startswith("sync") and promised(index) == promised(index + 1):
                continue
            for state in disk.after_power_loss():
                if (key := (promised(index), state.entries)) not in seen:
                    seen.add(key)
                    yield state, index, f"after record {index}, {record[:5]}, {state.said}"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FuseDisk]:
    with FuseDisk(tmp_path) as mounted:
        yield mounted


@pytest.fixture
def life(disk: FuseDisk) -> Iterator[Life]:
    with DiskStore(disk.path) as store:
        yield Life(disk, store)


@contextmanager
def laid_out(state: power.State, moment: str) -> Iterator[Path]:
    """The state as a root; what fails over it tells the moment."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        root = Path(place)
        root.chmod(0o755)
        state.lay_out(root)
        try:
            yield root
        except BaseException as error:
            error.add_note(f"the power went {moment}")
            raise


@pytest.mark.parametrize("ref", [WITH_BRANCH, f"{WITH_BRANCH}@{B}"])
def test_whenever_the_power_goes_a_ready_model_is_whole_and_what_was_told_ready_is_ready(
    life: Life, ref: str
) -> None:
    """Promised: After a power cut, a model that was reported ready is ready and complete, whatever was not
    synced.

    With a branch that moves, and without one.
    """
    if ref == WITH_BRANCH:
        life.publish(A)
    life.publish(B, ref)
    life.store.sweep_snapshots()
    life.change(lambda: life.store.withdraw("mine"), into=None)

    def may_be(index: int) -> frozenset[str | None]:
        told = [found for since, found in life.may_be if since == index]
        return frozenset(set.intersection(*told or [next(f for s, f in life.may_be[::-1] if s < index)]))

    count = 0
    for state, index, moment in life.moments(may_be):
        with laid_out(state, moment) as root:
            assert_kept(root, may_be(index))
            assert_goes_on(root)
            count += 1
    assert count > 100


def assert_kept(root: Path, may_be: frozenset[str | None]) -> None:
    """What a pod sees, before any daemon looked at it."""
    ready = root / "ready/mine.json"
    if not ready.exists():
        assert None in may_be, "it was told ready"
        return
    told = json.loads(ready.read_text())
    assert told["revision"] in may_be
    assert mount.wrong(root) == []
    assert digests(root / "models/mine") == shown(FILES[told["revision"]])
    branch = refs_of(root).get("main")  # which moves before the ready file does
    assert branch in may_be if "main" in told["hub"]["refs"] else branch is None
    for revision in {branch or told["revision"], told["revision"]}:
        assert digests(hub(root) / "snapshots" / revision) == shown(FILES[revision])


def assert_goes_on(root: Path) -> None:
    """What the next daemon finds and can do, with no human's help."""
    was_ready = (root / "ready/mine.json").exists()
    with DiskStore(root) as store:
        found = store.names.get("mine")
        assert was_ready == (found is not None)
        if found:
            assert store.content.missing(store.manifests.of(found)) == [], "nothing is fetched again"
        publish(store, FILES[B], name="mine", revision=B)
        assert_whole(root, "mine", FILES[B], commit=B)
        store.sweep_snapshots()
        store.withdraw("mine")
        store.content.removal.free(manifest_of(FILES[A]))
        store.content.proven.drop_stale()  # as the sweep does
        # A replacement that was cut off is overwritten by the next of the same name.
        assert [name for name in files_left(root) if not name.endswith(".new")] == []


def test_whenever_the_power_goes_what_a_sync_covered_of_unfinished_parts_is_resumed(life: Life) -> None:
    told: dict[int, int] = {0: 0}
    with closing(life.store.content.begin(FILE)) as ingest:
        keep_begun(ingest, KIB, 3 * KIB)
        write(ingest, CONTENT, PARTS[1])
        told[len(life.disk.records())] = 3 * KIB + PARTS[1].size
    assert_resumed(life, told)


def assert_resumed(life: Life, told: Mapping[int, int]) -> None:
    """Whenever the power goes, the next life resumes the bytes told durable by then, and commits right ones.

    `told`: bytes, by the number of records of the disk when they were told durable.
    """

    def promised(index: int) -> int:
        return max(count for since, count in told.items() if since <= index)

    for state, index, moment in life.moments(promised):
        with laid_out(state, moment) as root, DiskStore(root) as store:
            with closing(store.content.begin(FILE)) as ingest:
                assert ingest.resumed >= promised(index)
            commit(store, FILE, CONTENT)
            assert store.content.path(FILE.blob).read_bytes() == CONTENT


def test_what_no_sync_covered_is_written_again_by_the_next_life_and_what_one_did_is_not(life: Life) -> None:
    """A write that failed may have been told to the life that ended, which is asked no more."""
    with closing(life.store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, PARTS[1])
        keep_begun(ingest, KIB, 3 * KIB)
    before = len(life.disk.records())
    with closing(life.store.content.begin(FILE)) as ingest:
        again = [r[2:] for r in life.disk.records()[before:] if r[0] == "write" and len(r[3]) > 1]
        assert again == [(0, CONTENT[: 3 * KIB])]
        write(ingest, CONTENT, PARTS[2])
        journal = (ingest.directory / "journal").read_text()
    assert {tuple(map(int, line.split()[:2])) for line in journal.splitlines()} == {
        (part.start, part.stop) for part in (Extent(0, 3 * KIB), *PARTS[1:])
    }


def test_whenever_the_power_goes_every_part_told_durable_is_resumed(life: Life) -> None:
    """And nothing but right bytes is: the blob is committed from them and what was missing."""
    told: dict[int, int] = {0: 0}
    finished = Received()
    with closing(life.store.content.begin(FILE)) as ingest:
        for part in PARTS:
            write(ingest, CONTENT, part)
            finished.add(part)
            told[len(life.disk.records())] = finished.bytes
    assert finished.bytes == len(CONTENT)
    assert_resumed(life, told)
