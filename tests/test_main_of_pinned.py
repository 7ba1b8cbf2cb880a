"""A client that asks for no revision finds a model that was pulled by its commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cachd.errors import CachdError
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.needs import needs
from tests.ground.pod import run_in_pod

Engines = Callable[..., Engine]
LOCAL_ONLY = """
from huggingface_hub import hf_hub_download
print(open(hf_hub_download("org/m", "config.json", local_files_only=True)).read())
"""


def commits(hub: Hub, count: int) -> list[str]:
    """The commits of a repository `org/m`, the oldest first; the last one is `main`."""
    return [hub.add("org/m", {"config.json": json.dumps({"number": n}).encode()}) for n in range(count)]


def main_of(root: Path) -> str | None:
    main = root / "hub/models--org--m/refs/main"
    return main.read_text() if main.exists() else None


def refs_of(root: Path, name: str) -> list[str]:
    refs: list[str] = json.loads((root / f"ready/{name}.json").read_text())["hub"]["refs"]
    return refs


@needs("pods")
def test_the_hubs_client_finds_it_without_a_revision(hub: Hub, root: Path, engine: Engines) -> None:
    first, _ = commits(hub, 2)
    engine(hf_endpoint=hub.url).pull(f"hf://org/m@{first}", name="m")
    ended = run_in_pod(root, LOCAL_ONLY)
    assert json.loads(ended.stdout) == {"number": 0}, ended.stderr
    assert refs_of(root, "m") == ["main"]


def test_main_follows_a_name_that_moves_to_another_commit(hub: Hub, root: Path, engine: Engines) -> None:
    first, second = commits(hub, 2)
    running = engine(hf_endpoint=hub.url)
    running.pull(f"hf://org/m@{first}", name="m")
    running.pull(f"hf://org/m@{second}", name="m", replace=True)
    assert main_of(root) == second


def test_a_second_commit_under_another_name_does_not_move_main(hub: Hub, root: Path, engine: Engines) -> None:
    first, second, third = commits(hub, 3)
    running = engine(hf_endpoint=hub.url)
    running.pull(f"hf://org/m@{first}", name="m")
    running.pull(f"hf://org/m@{second}", name="trial")
    assert main_of(root) == first
    assert (refs_of(root, "m"), refs_of(root, "trial")) == (["main"], [])
    running.pull(f"hf://org/m@{third}", name="m", replace=True)
    assert main_of(root) == third, "it follows the name that it led to"
    running.store.withdraw("m")
    assert main_of(root) == second, "the only commit that is left"


def test_what_was_pulled_from_main_is_main(hub: Hub, root: Path, engine: Engines) -> None:
    first, second = commits(hub, 2)
    running = engine(hf_endpoint=hub.url)
    running.pull(f"hf://org/m@{first}", name="m")
    running.pull("hf://org/m", name="newest")
    running.pull(f"hf://org/m@{first}", name="again")
    assert main_of(root) == second
    assert (refs_of(root, "newest"), refs_of(root, "again")) == (["main"], [])
    running.store.withdraw("newest")
    assert main_of(root) == first


def test_a_branch_below_main_leaves_no_room_for_it(hub: Hub, root: Path, engine: Engines) -> None:
    (first,) = commits(hub, 1)
    hub.add("org/m", {"config.json": b"[]"}, revision="main/x")
    running = engine(hf_endpoint=hub.url)
    running.pull("hf://org/m@main%2Fx", name="x")
    running.pull(f"hf://org/m@{first}", name="m")
    assert (root / "hub/models--org--m/refs/main/x").exists()
    assert refs_of(root, "m") == []
    running.store.withdraw("x")
    assert main_of(root) == first


def test_a_branch_below_main_takes_its_place(hub: Hub, root: Path, engine: Engines) -> None:
    (first,) = commits(hub, 1)
    hub.add("org/m", {"config.json": b"[]"}, revision="main/x")
    running = engine(hf_endpoint=hub.url)
    running.pull(f"hf://org/m@{first}", name="m")
    try:
        running.pull("hf://org/m@main%2Fx", name="x")
    except CachdError as error:
        raise AssertionError(error.detail) from error
    assert (root / "hub/models--org--m/refs/main/x").exists()
