"""Another tenant, who may ask for pulls from an origin of their own, and wants other pods to load it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import InUse, Invalid
from cachd.model import Wish
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.models import write_sha256sums
from tests.ground.origin import Origin

Engines = Callable[..., Engine]
REAL, EVIL = {"config.json": b'{"model_type": "real"}'}, {"config.json": b'{"model_type": "evil"}'}


def main_of(root: Path, folder: str) -> str:
    return (root / "hub" / folder / "refs/main").read_text()


@pytest.mark.parametrize("pinned", [False, True])
def test_a_model_of_another_origin_never_stands_in_a_repository_of_the_hub(
    engine: Engines, hub: Hub, origin: Origin, root: Path, pinned: bool
) -> None:
    """Promised: No model of another origin stands in the folder of a repository of the Hub."""
    running = engine(hf_endpoint=hub.url)
    hub.add("org/model", REAL)
    running.pull("hf://org/model")
    if pinned:
        running.store.snapshots.pin("org--model")
    before = main_of(root, "models--org--model")
    evil = origin.add_model("evil", EVIL)
    for name in ("Org--model", "org--model-2", "x"):
        running.pull(evil, name=name)
    with pytest.raises(InUse) as refusal:
        running.pull(evil, name="org--model")
    assert refusal.value.code == "name_taken"
    assert main_of(root, "models--org--model") == before
    shown = (root / "hub/models--org--model/snapshots").rglob("config.json")
    assert {path.read_bytes() for path in shown} == {REAL["config.json"]}


def test_a_model_of_another_origin_that_came_first_leaves_the_repository_to_the_hub(
    engine: Engines, hub: Hub, origin: Origin, root: Path
) -> None:
    running = engine(hf_endpoint=hub.url)
    running.pull(origin.add_model("evil", EVIL), name="org--model")
    assert not (root / "hub/models--org--model").exists()
    hub.add("org/model", REAL)
    snapshot = running.pull("hf://org/model", name="real")
    assert main_of(root, "models--org--model") == snapshot.commit
    assert (root / f"hub/models--org--model/snapshots/{snapshot.commit}/config.json").read_bytes() == (
        REAL["config.json"]
    )


def test_a_name_that_another_model_has_in_the_hub_view_is_refused_to_a_third_source(
    engine: Engines, tmp_path: Path, origin: Origin, root: Path
) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share/config.json").write_bytes(REAL["config.json"])
    write_sha256sums(tmp_path / "share")
    running = engine(allow=("127.0.0.0/8", f"file://{tmp_path}/share/"))
    snapshot = running.pull(f"file://{tmp_path}/share", name="a--b")
    alike = "a-b-" + hashlib.sha256(b"a--b").hexdigest()[:8]
    assert snapshot.hub_folder == f"models--{alike}"
    with pytest.raises(InUse) as refusal:
        running.pull(origin.add_model("evil", EVIL), name=alike)
    assert refusal.value.code == "hub_id_taken"
    assert main_of(root, f"models--{alike}") == snapshot.commit
    assert running.store.snapshots.get(alike) is None


def mirror(origin: Origin, name: str, files: dict[str, bytes] = REAL) -> str:
    return origin.add_model(name, files)


def test_a_mirror_stands_in_the_folder_of_the_repository_that_its_hub_id_names(
    engine: Engines, origin: Origin, root: Path
) -> None:
    running = engine()
    snapshot = running.pull(mirror(origin, "real"), name="x", hub_id="org/model")
    assert snapshot.repo == "org/model"
    shown = root / "hub/models--org--model/snapshots" / main_of(root, "models--org--model")
    assert (shown / "config.json").read_bytes() == REAL["config.json"]
    assert not (root / "hub/models--x").exists()


def test_a_folder_belongs_to_one_source_until_it_is_deleted(
    engine: Engines, hub: Hub, origin: Origin, root: Path
) -> None:
    """Promised: A folder of the Hub view shows one source; a second is refused, and nothing moves."""
    running = engine(hf_endpoint=hub.url)
    hub.add("org/model", REAL)
    snapshot = running.pull(mirror(origin, "real"), name="x", hub_id="org/model")
    for ref, hub_id in ((mirror(origin, "evil", EVIL), "org/model"), ("hf://org/model", None)):
        with pytest.raises(InUse) as refusal:
            running.pull(ref, name="y", hub_id=hub_id)
        assert refusal.value.code == "hub_id_taken"
    assert main_of(root, "models--org--model") == snapshot.commit
    asked = [seen for seen in origin.requests if "/evil/" in seen.path]
    assert not asked, "refused before anything is asked of the source"
    running.pulls.delete("x")
    assert running.pull("hf://org/model", name="y").repo == "org/model"


def test_a_hub_id_is_a_repository_and_of_another_source_than_the_hub() -> None:
    for ref, hub_id in (("hf://org/model", "org/other"), ("s3://bucket/x/", "../x"), ("s3://bucket/x/", "x")):
        with pytest.raises(Invalid):
            Wish.asked(ref, "x", hub_id=hub_id)


def test_a_name_moves_to_another_hub_id_only_when_replace_is_said(
    engine: Engines, origin: Origin, root: Path
) -> None:
    running = engine()
    ref = mirror(origin, "real")
    running.pull(ref, name="x", hub_id="org/model")
    with pytest.raises(InUse) as refusal:
        running.pull(ref, name="x", hub_id="org/other")
    assert refusal.value.code == "name_taken"
    running.pull(ref, name="x", hub_id="org/other", replace=True)
    assert not (root / "hub/models--org--model/refs/main").exists()
    assert (root / "hub/models--org--other/refs/main").exists()


def test_a_branch_that_would_be_a_directory_where_another_is_a_file_is_refused_by_name(
    engine: Engines, hub: Hub, root: Path
) -> None:
    running = engine(hf_endpoint=hub.url)
    for revision in ("main", "main/x", "main/y"):
        hub.add("org/model", REAL | {"revision": revision.encode()}, revision=revision)
    running.pull("hf://org/model@main", name="a")
    with pytest.raises(InUse) as refusal:
        running.pull("hf://org/model@main%2Fx", name="b")
    assert refusal.value.code == "branch_taken"
    running.pull("hf://org/model@main%2Fx", name="a")
    assert (root / "hub/models--org--model/refs/main/x").exists()
    running.pull("hf://org/model@main%2Fy", name="b")
    with pytest.raises(InUse):
        running.pull("hf://org/model@main", name="b")
    assert (root / "hub/models--org--model/refs/main/y").exists()
