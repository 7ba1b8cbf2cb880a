"""Blue-green: a name moves to another snapshot in one step, and back again without a byte."""

from __future__ import annotations

import functools
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.site import MIB, PATIENCE_SECONDS, Ground, assert_problem, until


@functools.cache
def revision(number: int, name: str) -> dict[str, bytes]:
    seed = zlib.crc32(name.encode())
    return {
        "shared.safetensors": noise(6 * MIB, seed),
        "own.safetensors": noise(2 * MIB, seed + number),
        "config.json": name.encode(),
    }


def own(number: int, name: str) -> bytes:
    return revision(number, name)["own.safetensors"]


def have(ground: Ground, *numbers: int, name: str) -> list[str]:
    """Pull revisions one after the other under one name, each by its tag; their commits."""
    commits, repo = [], f"org/{name}"
    for number in numbers:
        commits.append(ground.hub.add(repo, revision(number, name)))
        ground.hub.tag(repo, f"v{number}", commits[-1])
        ground.node.log.clear()
        while ground.node.pull(f"hf://{repo}@v{number}", name=name).status == 409:
            pass  # the pull before is about to end
        ground.node.wait_for("published", name=name)
    return commits


def shown(node: Node, name: str) -> bytes:
    return (node.root / f"models/{name}/own.safetensors").read_bytes()


def trees(node: Node) -> set[str]:
    return {path.name for path in (node.root / "models/.trees").iterdir()}


def rollback(node: Node, name: str) -> Any:
    return node.ask("POST", f"/v1/models/{name}/rollback")


def test_a_probe_tells_the_snapshot_of_the_moment(ground: Ground) -> None:
    def probed() -> Any:
        return ground.node.ask("GET", "/v1/models/probed/ready").document["revision"]

    first = have(ground, 1, name="probed")[0]
    assert probed() == first
    second = have(ground, 2, name="probed")[0]
    assert probed() == second
    assert rollback(ground.node, "probed").status == 200
    assert probed() == first
    ground.node.ask("DELETE", "/v1/models/probed?force=true")
    assert_problem(ground.node.ask("GET", "/v1/models/probed/ready"), 404, "no_such_model")


def test_a_new_revision_costs_what_differs_and_a_rollback_nothing(ground: Ground) -> None:
    """Promised: A name moves to another snapshot in one step, and moves back without a byte from its
    source."""
    first, _ = have(ground, 1, name="costs")[0], ground.hub.cdn.forget()
    second = have(ground, 2, name="costs")[0]
    assert ground.hub.cdn.bytes_sent() == 2 * MIB
    told = ground.show("costs")
    assert [before["revision"] for before in told["previous"]] == [first]
    assert shown(ground.node, "costs") == own(2, "costs")
    ground.hub.forget()
    ground.hub.cdn.forget()
    back = rollback(ground.node, "costs")
    assert back.status == 200
    assert (back.document["state"], back.document["ready"]["revision"]) == ("ready", first)
    assert back.document["ready"]["ref"] == "hf://org/costs@v1"
    assert [before["revision"] for before in back.document["previous"]] == [second]
    assert ground.node.ready("costs", wait=0).document["revision"] == first
    assert shown(ground.node, "costs") == own(1, "costs")
    assert rollback(ground.node, "costs").document["ready"]["revision"] == second
    assert shown(ground.node, "costs") == own(2, "costs")
    assert (ground.hub.requests, ground.hub.cdn.requests) == ([], [])


def test_whoever_reads_the_name_sees_one_snapshot_or_the_other(ground: Ground) -> None:
    """Promised: A name moves to another snapshot in one step, and moves back without a byte from its
    source."""
    have(ground, 1, 2, name="read")
    link = ground.node.root / "models/read"
    both = [own(number, "read") for number in (1, 2)]
    over, seen = threading.Event(), list[int]()

    def read() -> None:
        while not over.is_set():
            content = (link / "own.safetensors").read_bytes()
            seen.append(both.index(content) if content in both else -1)

    def shows(snapshot: int) -> bool:
        return seen[-1] == snapshot

    reader = threading.Thread(target=read)
    reader.start()
    try:
        until(lambda: seen)
        for turn in range(6):
            assert rollback(ground.node, "read").status == 200
            until(functools.partial(shows, turn % 2))
    finally:
        over.set()
        reader.join()
    assert set(seen) == {0, 1}


def test_a_branch_of_the_hub_view_goes_back_with_the_name(ground: Ground) -> None:
    commits = []
    for number in (1, 2):
        commits.append(ground.hub.add("org/branch", revision(number, "branch")))
        ground.node.pull("hf://org/branch", name="branch", refresh=True)
        while ground.node.ready("branch").document["revision"] != commits[-1]:
            pass
    branch = ground.node.root / "hub/models--org--branch/refs/main"
    assert branch.read_text() == commits[1]
    rollback(ground.node, "branch")
    assert branch.read_text() == commits[0]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_so_many_snapshots_are_kept_as_told(alone: Callable[..., Ground], keep: int) -> None:
    ground = alone(keep_previous=keep)
    commits = have(ground, 1, 2, 3, 4, name="many")
    kept = [before["revision"] for before in ground.show("many")["previous"]]
    assert kept == commits[-2::-1][:keep]
    while len(trees(ground.node)) > 1 + keep:
        ground.node.ask("POST", "/v1/sweeps", {})  # the last pull may not have ended yet
    assert len(trees(ground.node)) == 1 + keep
    answer = rollback(ground.node, "many")
    if keep:
        assert answer.document["ready"]["revision"] == commits[2]
    else:
        assert_problem(answer, 404, "no_previous")


def test_what_was_before_survives_a_restart(alone: Callable[..., Ground]) -> None:
    ground = alone()
    first, _ = have(ground, 1, 2, name="restart")
    ground.node.kill()
    ground.node.start()
    while (answer := rollback(ground.node, "restart")).status == 409:
        pass  # the pull was killed before it said that it had ended
    assert answer.document["ready"]["revision"] == first


def test_a_listed_model_that_was_rolled_back_stays_so_until_something_else_is_asked_for(
    hub: Hub, node: Callable[..., Node]
) -> None:
    for number in (1, 2, 3):
        hub.tag("org/listed", f"v{number}", hub.add("org/listed", revision(number, "listed")))

    def listed(number: int) -> list[dict[str, str]]:
        return [{"ref": f"hf://org/listed@v{number}", "name": "listed"}]

    running = node(hf_endpoint=hub.url, models=listed(1))
    running.wait_for("published", name="listed")
    options = running.options
    running.log.clear()
    running.configure(**{**options, "models": listed(2)})
    running.wait_for("published", name="listed")
    assert rollback(running, "listed").document["ready"]["ref"].endswith("@v1")
    running.kill()
    hub.forget()
    running.start()
    running.configure(**{**options, "models": [*listed(2), {"ref": "hf://org/listed@v3", "name": "other"}]})
    running.wait_for("published", name="other")  # the list was gone through
    assert running.ready("listed", wait=0).document["ref"].endswith("@v1")
    running.log.clear()
    running.configure(**{**options, "models": listed(3)})
    running.wait_for("published", name="listed")
    assert running.ready("listed", wait=0).document["ref"].endswith("@v3")


def test_a_name_that_is_being_pulled_is_not_rolled_back(ground: Ground) -> None:
    have(ground, 1, 2, name="busy")
    ref = ground.add("next.bin")
    hold = ground.origin.hold("/next.bin", after=MIB)
    ground.node.pull(ref, name="busy", replace=True)
    assert hold.reached.wait(PATIENCE_SECONDS)
    assert_problem(rollback(ground.node, "busy"), 409, "name_busy")
    assert shown(ground.node, "busy") == own(2, "busy")
    hold.release()


def test_a_deleted_name_takes_what_was_before_with_it(ground: Ground) -> None:
    have(ground, 1, 2, name="deleted")
    told = ground.show("deleted")
    both = {told["ready"]["manifest"], told["previous"][0]["manifest"]}
    assert both <= trees(ground.node)
    freed = ground.node.ask("DELETE", "/v1/models/deleted").document["freed_bytes"]
    assert freed >= sum(
        len(content) for content in {**revision(1, "deleted"), "2": own(2, "deleted")}.values()
    )
    assert not both & trees(ground.node)
    assert not (ground.node.root / ".cachd/previous/deleted.json").exists()
    assert_problem(rollback(ground.node, "deleted"), 404, "no_previous")


def test_a_snapshot_of_before_with_a_damaged_file_is_not_gone_back_to(ground: Ground) -> None:
    have(ground, 1, name="incomplete")
    before = (ground.node.root / "models/incomplete/own.safetensors").resolve()
    have(ground, 2, name="incomplete")
    for blob in (ground.node.root / ".cachd/blobs/sha256").iterdir():
        if blob.samefile(before):
            blob.unlink()
    assert_problem(rollback(ground.node, "incomplete"), 500, "previous_incomplete")
    assert shown(ground.node, "incomplete") == own(2, "incomplete")


def test_the_command_goes_back_and_prints_where(ground: Ground) -> None:
    first, _ = have(ground, 1, 2, name="commanded")
    ended = ground.node.cli("rollback", "commanded")
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == [
        f"commanded hf://org/commanded@v1 {first}",
        str(Path(ground.node.root) / "models/commanded"),
    ]
    assert ground.node.cli("rollback", "unheard-of").returncode == 3
