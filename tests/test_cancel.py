"""A running pull is cancelled without deleting anything."""

from __future__ import annotations

from collections.abc import Callable

from tests.ground.site import MIB, PATIENCE_SECONDS, Ground, assert_problem, until

Alone = Callable[..., Ground]


def test_a_cancelled_pull_keeps_its_bytes_and_the_next_one_resumes(ground: Ground) -> None:
    with ground.held("ended.bin"):
        answer = ground.node.ask("DELETE", "/v1/models/ended.bin/pull")
        assert answer.status == 200
        assert (answer.document["state"], answer.document["pull"]["error"]["code"]) == (
            "cancelled",
            "cancelled",
        )
        assert answer.document["pull"]["began_at"] <= answer.document["pull"]["ended_at"]
    assert_problem(ground.node.ask("DELETE", "/v1/models/ended.bin/pull"), 404, "no_pull")
    ground.node.pull(f"{ground.origin.url}/ended.bin")
    assert ground.node.ready("ended.bin").status == 200
    assert ground.show("ended.bin")["pull"]["bytes"]["resumed"] >= 2 * MIB


def test_a_cancelled_pull_of_a_new_revision_leaves_the_old_one_ready(ground: Ground) -> None:
    ground.have("served.bin")
    successor = ground.add("successor.bin")
    hold = ground.origin.hold("/successor.bin", after=MIB)
    try:
        ground.node.pull(successor, name="served.bin", replace=True)
        assert hold.reached.wait(PATIENCE_SECONDS)
        answer = ground.node.ask("DELETE", "/v1/models/served.bin/pull")
        assert (answer.status, answer.document["state"]) == (200, "ready")
        assert answer.document["pull"]["state"] == "cancelled"
    finally:
        hold.release()
    assert ground.node.ready("served.bin").document["ref"] == f"{ground.origin.url}/served.bin"


def test_a_pull_that_waits_for_its_turn_is_cancelled_too(alone: Alone) -> None:
    ground = alone(pulls=1)
    with ground.held("first.bin"):
        ground.node.pull(ground.add("second.bin"))
        answer = ground.node.ask("DELETE", "/v1/models/second.bin/pull")
        assert (answer.status, answer.document["state"]) == (200, "cancelled")


def test_a_cancelled_pull_of_a_listed_model_begins_again_when_the_file_changes(alone: Alone) -> None:
    ground = alone()
    ref = ground.add("listed.bin")
    hold = ground.origin.hold("/listed.bin", after=MIB)
    try:
        listed = {"ref": ref, "name": "listed.bin"}
        options = ground.node.options
        ground.node.configure(**options, models=[listed])
        assert hold.reached.wait(PATIENCE_SECONDS)
        answer = ground.node.ask("DELETE", "/v1/models/listed.bin/pull")
        assert (answer.status, answer.document["state"]) == (200, "cancelled")
    finally:
        hold.release()
    ground.node.configure(**options, models=[{**listed, "pin": True}])
    ground.node.wait_for("pull ended", name="listed.bin", state="ready")


def test_nothing_is_cancelled_where_nothing_is_known(ground: Ground) -> None:
    ground.have("ready.bin")
    assert_problem(ground.node.ask("DELETE", "/v1/models/ready.bin/pull"), 404, "no_pull")
    assert_problem(ground.node.ask("DELETE", "/v1/models/nobody/pull"), 404, "no_such_model")
    assert_problem(ground.node.ask("DELETE", "/v1/models/a%20b/pull"), 400, "bad_name")


def test_a_failed_resolve_is_known_while_it_is_tried_again(alone: Alone) -> None:
    ground = alone()
    ground.hub.add("org/again", {"config.json": b"{}"})
    ground.hub.status(503, times=1)
    ground.node.pull("hf://org/again")
    ground.node.wait_for("resolve will be retried", name="org--again")
    hold = ground.hub.hold("/api/models/org/again", after=0)
    waits = until(lambda: ground.show("org--again")["pull"]["waits"])
    try:
        assert hold.reached.wait(PATIENCE_SECONDS)
        pull = ground.show("org--again")["pull"]
        assert (pull["state"], pull["waits"]) == ("resolving", {**waits, "until": None})
        assert pull["waits"]["reason"] == "origin"
        assert "503" in pull["waits"]["detail"]
    finally:
        hold.release()
    assert ground.node.ready("org--again").status == 200
