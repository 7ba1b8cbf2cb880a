"""The Hub view says which of the files that clients look for a revision does not have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.errors import Invalid
from cachd.model import LeftOut, Manifest, ModelSpec, Unusable
from cachd.model.optional import OPTIONAL
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.values import file, manifest

Engines = Callable[..., Engine]
FILES = {"config.json": b"{}", "README.md": b"read", "notes.json": b"w", "other.txt": b"o"}


def marks(root: Path, repo: str = "models--org--m") -> set[str]:
    top = root / "hub" / repo / ".no_exist"
    return {
        os.path.relpath(os.path.join(at, name), top).partition("/")[2]
        for at, _, names in os.walk(top)
        for name in names
    }


def inodes(root: Path) -> set[int]:
    return {p.stat().st_ino for p in (root / "hub").glob("*/.no_exist/**/*") if p.is_file()}


def test_every_mark_of_a_commit_is_one_empty_inode_and_goes_with_the_snapshot(
    hub: Hub, root: Path, engine: Engines
) -> None:
    hub.add("org/m", FILES)
    running = engine(hf_endpoint=hub.url)
    running.pull("hf://org/m", name="m")
    assert marks(root) == set(OPTIONAL) - set(FILES)
    assert len(inodes(root)) == 1
    running.store.withdraw("m")
    assert not (root / "hub/models--org--m").exists()


def test_marks_of_a_commit_go_with_it_while_another_commit_stays(
    hub: Hub, root: Path, engine: Engines
) -> None:
    first = hub.add("org/m", FILES)
    running = engine(hf_endpoint=hub.url)
    running.pull(f"hf://org/m@{first}", name="old")
    second = hub.add("org/m", FILES | {"vocab.txt": b"v"})
    running.pull("hf://org/m", name="new")
    assert set(os.listdir(root / "hub/models--org--m/.no_exist")) == {first, second}
    running.store.withdraw("old")
    assert os.listdir(root / "hub/models--org--m/.no_exist") == [second]
    assert "vocab.txt" not in marks(root)


def test_a_narrowed_pull_marks_nothing_that_it_left_out(hub: Hub, root: Path, engine: Engines) -> None:
    hub.add("org/m", FILES)
    engine(hf_endpoint=hub.url).pull("hf://org/m", include=("notes.json",))
    assert marks(root) == set(OPTIONAL) - set(FILES)


def test_marks_are_the_same_after_a_restart_and_after_somebody_changed_them(
    hub: Hub, root: Path, engine: Engines
) -> None:
    commit = hub.add("org/m", FILES)
    with assembled(Config(root=root, hf_endpoint=hub.url, allow=("127.0.0.0/8",), reserve_free=0)) as first:
        Engine(first).pull("hf://org/m", name="m", exclude=("README.md",))
        before = marks(root)
    top = root / "hub/models--org--m/.no_exist" / commit
    (top / "vocab.txt").unlink()
    (top / "README.md").touch()
    engine(hf_endpoint=hub.url).store.check("m", now=0.0)
    assert marks(root) == before
    assert "README.md" not in before


def test_a_manifest_that_an_older_version_narrowed_marks_nothing() -> None:
    whole = manifest(file("config.json"), file("a.bin"))
    narrowed = ModelSpec.asked("hf://org/m", include=["a.bin"]).select(whole)
    document = json.loads(json.dumps(narrowed.as_document()))
    assert Manifest.from_document(document).absent == narrowed.absent == whole.absent
    del document["absent"]
    assert Manifest.from_document(document).absent == ()


def test_only_names_of_the_list_are_read_from_a_record() -> None:
    narrowed = replace(
        manifest(file("a.bin")), left_out=LeftOut(1, 1), lacks=("vocab.txt",)
    ).as_document() | {"absent": ["../../../etc/cron.d/x", "vocab.txt"]}
    assert Manifest.from_document(narrowed).absent == ("vocab.txt",)


@pytest.mark.parametrize(
    ("unusable", "unknown"),
    [
        ("vocab.txt", {"vocab.txt"}),
        ("1_Pooling/", {"1_Pooling/config.json"}),
        ("1_Pooling", {"1_Pooling/config.json"}),
    ],
)
def test_an_entry_that_cannot_be_a_file_is_not_absent(unusable: str, unknown: set[str]) -> None:
    odd = replace(manifest(file("a.bin")), unusable=(Unusable(unusable, Invalid("odd")),))
    selected = ModelSpec.asked("hf://org/m", exclude=[unusable]).select(odd)
    assert set(OPTIONAL) - set(selected.absent) == unknown
