"""Another tenant, who may ask for pulls from an origin of their own, and wants other pods to load it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import InUse
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
