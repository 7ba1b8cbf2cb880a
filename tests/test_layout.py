"""Where things are in a root. Other versions of cachd, and pods, find them there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachd.model import Digest
from cachd.store.layout import PRIVATE, PUBLIC, Layout

HEX = "0a" * 32
BLOB, GIT = Digest("sha256", HEX), Digest("git-sha1", "b" * 40)
ROOT = Path("/cache")
ALONE, SHARED = Layout(ROOT), Layout(ROOT, ".cachd/nodes/7.work")
PLACES = {
    "format": ".cachd/format",
    "lock": ".cachd/lock",
    "last_good": ".cachd/last_good.json",
    "blobs": ".cachd/blobs",
    "damaged_blobs": ".cachd/damaged",
    "manifests": ".cachd/manifests",
    "nodes": ".cachd/nodes",
    "pending": ".cachd/pending",
    "previous": ".cachd/previous",
    "rollbacks": ".cachd/rollbacks",
    "quarantined": ".cachd/quarantined",
    "scrub_log": ".cachd/scrub_log.json",
    "proven": ".cachd/proven",
    "leases": ".cachd/leases",
    "usage_log": ".cachd/usage.json",
    "all_streamed": ".cachd/streamed",
    "copies": ".cachd/copies",
    "config_pins": ".cachd/config_pins",
    "models": "models",
    "trees": "models/.trees",
    "holds": "models/.holds",
    "hub": "hub",
    "ready": "ready",
    "status": "status",
}
OF_NAMES = {
    "pending_file": ".cachd/pending/m.json",
    "failed": ".cachd/pending/m.failed",
    "began": ".cachd/pending/m.began",
    "pin_at": ".cachd/pins/m",
    "config_pin_at": ".cachd/config_pins/m",
    "previous_file": ".cachd/previous/m.json",
    "rollback_file": ".cachd/rollbacks/m.json",
    "quarantine_file": ".cachd/quarantined/m.json",
    "lease": ".cachd/leases/m.json",
    "manifest": ".cachd/manifests/m.json",
    "copies_of": ".cachd/copies/m",
    "tree": "models/.trees/m",
    "hold": "models/.holds/m",
    "hold_at": "models/.holds/m",
    "address": "models/m",
    "model": "models/m",
    "ready_file": "ready/m.json",
    "status_file": "status/m.json",
}
OF_BLOBS = {
    "blob": f".cachd/blobs/sha256/{HEX}",
    "blob_at": f".cachd/blobs/sha256/{HEX}",
    "damaged": f".cachd/damaged/sha256-{HEX}",
}
OF_WORK = {"ingests": "ingest", "staging": "staging", "trash": "trash"}


def test_each_kind_of_thing_has_its_place() -> None:
    assert {name: getattr(ALONE, name) for name in PLACES} == {n: ROOT / at for n, at in PLACES.items()}
    assert ALONE.commit("models--org--m", "c" * 40) == ROOT / f"hub/models--org--m/snapshots/{'c' * 40}"


def test_what_belongs_to_a_name_or_an_id_has_its_place() -> None:
    assert {name: str(getattr(ALONE, name)("m")) for name in OF_NAMES} == {
        name: f"{ROOT}/{at}" for name, at in OF_NAMES.items()
    }


@pytest.mark.parametrize("layout", [ALONE, SHARED], ids=["alone", "shared"])
def test_what_belongs_to_a_blob_has_its_place(layout: Layout) -> None:
    assert {name: str(getattr(layout, name)(BLOB)) for name in OF_BLOBS} == {
        name: f"{ROOT}/{at}" for name, at in OF_BLOBS.items()
    }
    assert layout.streamed(BLOB, 9) == ROOT / f".cachd/streamed/sha256-{HEX}-9"


@pytest.mark.parametrize(
    ("layout", "work", "is_shared"),
    [(ALONE, ".cachd", False), (SHARED, ".cachd/nodes/7.work", True)],
    ids=["alone", "shared"],
)
def test_each_writer_of_a_shared_volume_works_in_directories_of_its_own(
    layout: Layout, work: str, is_shared: bool
) -> None:
    assert layout.is_shared is is_shared
    assert {name: getattr(layout, name) for name in OF_WORK} == {
        name: ROOT / work / at for name, at in OF_WORK.items()
    }
    assert layout.ingest(BLOB, 9) == ROOT / work / f"ingest/sha256-{HEX}-9"
    assert layout.ingest_at(BLOB, 9) == f"{ROOT}/{work}/ingest/sha256-{HEX}-9"
    assert layout.staged_blob_at(BLOB) == f"{ROOT}/{work}/staging/sha256-{HEX}"


def test_all_partial_downloads_of_a_blob_are_found_and_no_others(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for digest, size in ((BLOB, 9), (BLOB, 10), (GIT, 9)):
        layout.ingest(digest, size).mkdir(parents=True)
    assert sorted(layout.ingests_of(BLOB)) == sorted(layout.ingest(BLOB, size) for size in (9, 10))
    assert layout.ingests_of(Digest("sha256", "0b" * 32)) == []


def test_every_place_is_below_a_directory_that_a_start_makes_and_checks() -> None:
    made = {Path(name) for name in (*PUBLIC, *PRIVATE)} | {Path()}
    assert {Path(at).parent for at in (*PLACES.values(), *OF_NAMES.values())} <= made
