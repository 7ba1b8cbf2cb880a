"""A name belongs to the model it was first asked for until somebody says `replace`."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cachd.errors import Cancelled, InUse
from cachd.store.permit import Permit
from tests.conftest import Engine, spec_of
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Answer, Node
from tests.ground.origin import Origin, Status
from tests.ground.program import CACHD, run
from tests.ground.site import PATIENCE_SECONDS, Ground, assert_problem, received, send, until
from tests.test_scrub import flip

MIB = 1 << 20
Nodes = Callable[..., Node]
Alone = Callable[..., Ground]


def asked(ground: Ground, ref: str, **more: Any) -> Answer:
    """A request as it stands, with no name of the tests' own."""
    return ground.node.ask("POST", "/v1/models", {"ref": ref, **more})


def two_branches(ground: Ground, repo: str) -> tuple[str, str]:
    """A repository of two revisions; their commits."""
    first, second = (
        ground.hub.add(repo, {"config.json": b"{}", "a.bin": noise(MIB, number)}, revision=f"v{number}")
        for number in (1, 2)
    )
    return first, second


# --- default names ---


def test_refs_that_end_alike_are_two_models(ground: Ground) -> None:
    names = []
    for place in ("llama", "qwen"):
        ref = ground.origin.add(f"/{place}/m.gguf", noise(1000, len(place)))
        answer = asked(ground, ref)
        assert answer.status == 202
        names.append(answer.document["name"])
        assert ground.node.ready(names[-1]).document["ref"] == ref
    host = ground.origin.url.partition("://")[2].replace(":", "-")
    assert names == [f"{host}--llama--m.gguf", f"{host}--qwen--m.gguf"]


def test_two_quantisations_of_one_repository_are_two_models(ground: Ground) -> None:
    ground.hub.add("org/quants", {"m-Q4.gguf": noise(1000), "m-Q5.gguf": noise(1000, 2), "m-Q6.gguf": b"6"})
    found = {}
    for include in (["m-Q4.gguf"], ["m-Q5.gguf"], ["*Q6*"], []):
        name = asked(ground, "hf://org/quants", include=include).document["name"]
        found[name] = ground.node.ready(name).document["files"]
    assert len(found) == 4
    assert found["org--quants--m-Q4.gguf"] == found["org--quants--m-Q5.gguf"] == 1
    assert found["org--quants"] == 3


# --- a name that exists ---


def test_a_ready_name_is_not_moved_to_another_model_without_replace(ground: Ground) -> None:
    old, new = ground.have("kept.bin"), ground.add("taker.bin", MIB)
    refused = ground.node.pull(new, name="kept.bin")
    assert_problem(refused, 409, "name_taken")
    assert old in refused.document["detail"]
    assert new in refused.document["detail"]
    assert "--replace" in refused.document["hint"]
    assert "--name" in refused.document["hint"]
    assert ground.show("kept.bin")["pull"]["ref"] == old, "nothing was begun"
    assert ground.node.pull(new, name="kept.bin", replace=True).status == 202
    ground.node.wait_for("pull ended", name="kept.bin", ref=new)
    assert ground.node.ready("kept.bin").document["ref"] == new


def test_a_ready_name_is_not_moved_to_other_patterns_without_replace(ground: Ground) -> None:
    ground.hub.add("org/patterns", {"config.json": b"{}", "a.bin": noise(1000), "b.bin": noise(1000, 2)})
    ground.node.pull("hf://org/patterns", name="patterns", include=["*.json", "a.*"])
    assert ground.node.ready("patterns").document["files"] == 2
    for other in ({"include": ["*.json"]}, {"include": ["*.json", "a.*"], "exclude": ["x"]}, {}):
        refused = ground.node.pull("hf://org/patterns", name="patterns", **other)
        assert_problem(refused, 409, "name_taken")
        assert "include *.json a.*" in refused.document["detail"]
    same = ground.node.pull("hf://org/patterns", name="patterns", include=["a.*", "*.json"])
    assert same.status == 202, "whatever their order"
    ground.node.ready("patterns")
    assert ground.node.pull("hf://org/patterns", name="patterns", replace=True).status == 202
    until(lambda: ground.node.ready("patterns").document["files"] == 3)


def test_another_revision_moves_a_name_that_is_not_pinned(ground: Ground) -> None:
    _, second = two_branches(ground, "org/moving")
    ground.node.pull("hf://org/moving@v1", name="moving")
    assert ground.node.ready("moving").status == 200
    assert ground.node.pull("hf://org/moving@v2", name="moving").status == 202
    until(lambda: ground.node.ready("moving").document["revision"] == second)


def test_a_pinned_name_is_not_moved_at_all_without_replace(ground: Ground) -> None:
    first, second = two_branches(ground, "org/pinned")
    ground.node.pull("hf://org/pinned@v1", name="pinned", pin=True)
    assert ground.node.ready("pinned").document["revision"] == first
    refused = ground.node.pull("hf://org/pinned@v2", name="pinned")
    assert_problem(refused, 409, "name_taken")
    assert "pinned at hf://org/pinned@v1" in refused.document["detail"]
    assert_problem(ground.node.pull("hf://org/pinned@v1", name="pinned", refresh=True), 409, "name_taken")
    assert ground.node.pull("hf://org/pinned@v1", name="pinned").status == 200, "it is what is asked for"
    assert ground.node.pull("hf://org/pinned@v2", name="pinned", replace=True).status == 202
    until(lambda: ground.node.ready("pinned").document["revision"] == second)
    assert ground.show("pinned")["pinned"] is True


def test_a_pinned_name_is_its_model_s_though_its_pull_failed(ground: Ground) -> None:
    good = ground.add("good.bin", MIB)
    wrong = f"{ground.origin.url}/typo-pinned.bin"
    ground.node.pull(wrong, name="typo-pinned", pin=True)
    assert ground.node.ready("typo-pinned").status == 404
    assert_problem(ground.node.pull(good, name="typo-pinned"), 409, "name_taken")
    assert ground.node.pull(good, name="typo-pinned", replace=True).status == 202
    assert ground.node.ready("typo-pinned").status == 200


def test_a_pull_that_failed_owns_no_name(ground: Ground) -> None:
    good = ground.add("right.bin", MIB)
    ground.node.pull(f"{ground.origin.url}/typo.bin", name="typo")
    assert ground.node.ready("typo").status == 404
    assert ground.node.pull(good, name="typo").status == 202
    assert ground.node.ready("typo").document["ref"] == good


def test_a_damaged_name_is_still_its_model_s(alone: Alone) -> None:
    ground = alone()
    old, new = ground.have("hurt.bin"), ground.add("other.bin", MIB)
    ground.origin.fault("/hurt.bin", Status(404))
    flip(next((ground.node.root / "models/.trees").glob("*/hurt.bin")), at=1000)
    ground.node.ask("POST", "/v1/models/hurt.bin/verify")
    ground.node.wait_for("pull ended", name="hurt.bin", state="failed")
    until(lambda: ground.show("hurt.bin")["state"] == "damaged")
    refused = ground.node.pull(new, name="hurt.bin")
    assert_problem(refused, 409, "name_taken")
    assert old in refused.document["detail"]
    ground.origin.clear()
    until(lambda: ground.node.ready("hurt.bin").status == 200)
    assert ground.node.ready("hurt.bin").document["ref"] == old


# --- pulls that run ---


def test_replace_stops_the_pull_that_runs_and_takes_its_place(ground: Ground) -> None:
    new = ground.add("winner.bin", MIB)
    with ground.held("loser.bin"):
        refused = ground.node.pull(new, name="loser.bin")
        assert_problem(refused, 409, "name_taken")
        assert ground.node.pull(new, name="loser.bin", replace=True).status == 202
        assert ground.node.ready("loser.bin").document["ref"] == new
    ended = ground.node.wait_for("pull ended", name="loser.bin", state="cancelled")
    assert ended["code"] == "replaced"
    assert ground.node.ready("loser.bin").document["ref"] == new


def test_replace_does_not_wait_for_a_source_that_hangs(ground: Ground) -> None:
    new = ground.add("quick.bin", MIB)
    ground.hub.add("org/hangs", {"config.json": b"{}"})
    hold = ground.hub.hold("/api/models/org/hangs", after=0)
    ground.node.pull("hf://org/hangs", name="hanging")
    assert hold.reached.wait(PATIENCE_SECONDS)
    try:
        assert ground.node.pull(new, name="hanging", replace=True).status == 202
        assert ground.node.ready("hanging").document["ref"] == new
    finally:
        hold.release()
    ground.node.wait_for("pull ended", name="hanging", code="replaced")
    assert ground.node.ready("hanging").document["ref"] == new


def test_who_waits_for_a_name_waits_for_what_takes_it(ground: Ground) -> None:
    new = ground.add("later.bin", MIB)
    with (
        ground.held("sooner.bin"),
        send(ground.node, "GET", "/v1/models/sooner.bin/ready?wait=60") as waiting,
    ):
        hold = ground.origin.hold("/later.bin", after=1000)
        assert ground.node.ask("GET", "/livez").status == 200  # the request before it is being answered
        ground.node.pull(new, name="sooner.bin", replace=True)
        assert hold.reached.wait(PATIENCE_SECONDS)
        ground.node.wait_for("pull ended", name="sooner.bin", code="replaced")
        hold.release()
        response = http.client.HTTPResponse(waiting)
        response.begin()
        assert received(response).document["ref"] == new


def test_what_replaced_a_pull_is_what_the_next_life_goes_on_with(alone: Alone) -> None:
    ground = alone()
    new = ground.add("second.bin")
    with ground.held("first.bin"):
        hold = ground.origin.hold("/second.bin", after=MIB)
        assert ground.node.pull(new, name="first.bin", replace=True).status == 202
        assert hold.reached.wait(PATIENCE_SECONDS)
        ground.node.wait_for("pull ended", name="first.bin", code="replaced")
        ground.node.kill()
        hold.release()
    ground.node.start()
    assert ground.node.ready("first.bin").document["ref"] == new


def test_replace_by_what_is_ready_stops_the_other_and_asks_no_source(ground: Ground) -> None:
    old, new = ground.have("stays.bin"), ground.add("goes.bin")
    hold = ground.origin.hold("/goes.bin", after=MIB)
    assert ground.node.pull(new, name="stays.bin", replace=True).status == 202
    assert hold.reached.wait(PATIENCE_SECONDS)
    seen = len(ground.origin.requests)
    assert_problem(ground.node.pull(old, name="stays.bin"), 409, "name_taken")
    back = ground.node.cli("pull", old, "--name", "stays.bin", "--replace", "--wait")
    assert back.returncode == 0, back.stderr
    assert ground.show("stays.bin")["pull"] is None
    hold.release()
    ground.node.wait_for("pull ended", name="stays.bin", code="replaced")
    assert ground.node.ready("stays.bin").document["ref"] == old
    assert not [r for r in ground.origin.requests[seen:] if r.path == "/stays.bin"]


def test_another_revision_is_asked_to_wait_for_the_one_that_is_pulled(ground: Ground) -> None:
    two_branches(ground, "org/busy")
    ground.hub.add("org/busy", {"config.json": b"{}"})
    hold = ground.hub.hold("/api/models/org/busy", after=0)
    ground.node.pull("hf://org/busy", name="busy")
    assert hold.reached.wait(PATIENCE_SECONDS)
    refused = ground.node.pull("hf://org/busy@v2", name="busy")
    hold.release()
    assert_problem(refused, 409, "name_busy")
    assert ground.node.ready("busy").document["ref"] == "hf://org/busy"


def test_of_two_requests_at_once_for_a_new_name_one_wins_and_the_other_is_told(ground: Ground) -> None:
    for turn in range(5):
        refs = [ground.add(f"race-{turn}-{number}.bin", 1000) for number in range(8)]
        go = threading.Barrier(len(refs))

        def ask(ref: str, turn: int = turn, go: threading.Barrier = go) -> Answer:
            go.wait()
            return ground.node.pull(ref, name=f"race-{turn}")

        with ThreadPoolExecutor(len(refs)) as crowd:
            answers = dict(zip(refs, crowd.map(ask, refs), strict=True))
        won = [ref for ref, answer in answers.items() if answer.status in (200, 202)]
        assert len(won) == 1, answers
        assert {a.document["code"] for a in answers.values() if a.status == 409} == {"name_taken"}
        assert ground.node.ready(f"race-{turn}").document["ref"] == won[0]


# --- when it is published ---


def test_a_permit_that_was_taken_back_publishes_nothing() -> None:
    spec, other = spec_of("hf://org/a", name="n"), spec_of("hf://org/b", name="n")
    permit = Permit()
    assert permit.revoke()
    with pytest.raises(Cancelled):
        permit.use(None, spec)
    used = Permit()
    used.use(spec_of("hf://org/a@v2", name="n"), spec)
    assert not used.revoke(), "who takes it back now publishes after it"
    with pytest.raises(InUse) as refusal:
        Permit().use(other, spec)
    assert refusal.value.code == "name_taken"
    Permit(replace=True).use(other, spec)


def test_a_name_that_came_to_be_another_s_meanwhile_is_not_published_over(
    origin: Origin, engine: Callable[..., Engine]
) -> None:
    """As when an operator leads it back to what it was before another pull of the present one ends."""
    running = engine()
    refs: dict[str, str] = {}
    for name in ("a", "b"):
        refs[name] = origin.add(f"/{name}", noise(1000, len(refs)))
    first = running.pull(refs["a"], name="n")
    taker = running.store.manifests.of(first)
    with pytest.raises(InUse) as refusal:
        running.store.publish(spec_of(refs["b"], name="n"), taker, now=1.0, permit=Permit())
    assert refusal.value.code == "name_taken"
    assert running.store.names.ready("n").spec.ref == first.spec.ref


# --- the configuration ---


def listing(ref: str, **more: object) -> list[dict[str, object]]:
    return [{"ref": ref, "name": "listed", **more}]


def test_a_changed_ref_in_the_configuration_moves_even_a_pinned_name(origin: Origin, node: Nodes) -> None:
    refs = [origin.add(f"/{number}.bin", noise(1000, number)) for number in range(3)]
    running = node(models=listing(refs[0], pin=True))
    assert running.ready("listed").document["ref"] == refs[0]
    running.configure(**{**running.options, "models": listing(refs[1], pin=True)})
    until(lambda: running.ready("listed", wait=0).document["ref"] == refs[1])
    running.stop()
    running.configure(**{**running.options, "models": listing(refs[2], pin=True)})
    running.start()
    until(lambda: running.ready("listed", wait=0).document["ref"] == refs[2])


def test_a_changed_ref_in_the_configuration_stops_the_pull_of_the_old_one(
    origin: Origin, node: Nodes
) -> None:
    old, new = origin.add("/old.bin", noise(MIB)), origin.add("/new.bin", noise(MIB, 2))
    hold = origin.hold("/old.bin", after=1000)
    running = node(models=listing(old))
    assert hold.reached.wait(PATIENCE_SECONDS)
    running.configure(**{**running.options, "models": listing(new)})
    running.wait_for("published", name="listed")
    hold.release()
    running.wait_for("pull ended", name="listed", code="replaced")
    assert running.ready("listed").document["ref"] == new


def test_what_replaced_a_listed_model_stays_until_the_file_or_the_daemon_begins_anew(
    origin: Origin, node: Nodes
) -> None:
    listed, other = origin.add("/listed.bin", noise(1000)), origin.add("/other.bin", noise(1000, 2))
    running = node(models=listing(listed))
    assert running.ready("listed").status == 200
    assert running.pull(other, name="listed", replace=True).status == 202
    until(lambda: running.ready("listed", wait=0).document["ref"] == other)
    more = [*listing(listed), {"ref": listed, "name": "more"}]
    running.configure(**{**running.options, "models": more})
    running.wait_for("published", name="more")  # the list was gone through since
    assert running.ready("listed", wait=0).document["ref"] == other
    running.stop()
    running.start()
    until(lambda: running.ready("listed", wait=0).document["ref"] == listed)


def test_a_listed_model_is_removed_by_force_alone_and_comes_back_with_the_next_start(
    origin: Origin, node: Nodes
) -> None:
    ref = origin.add("/listed.bin", noise(1000))
    running = node(models=listing(ref))
    assert running.ready("listed").status == 200
    refused = running.ask("DELETE", "/v1/models/listed")
    assert_problem(refused, 409, "configured")
    assert "come back at the next start or change of the file" in refused.document["detail"]
    ended = running.cli("rm", "listed")
    assert (ended.returncode, "configured" in ended.stderr, "--force" in ended.stderr) == (9, True, True)
    assert running.ready("listed", wait=0).status == 200
    forced = running.cli("rm", "listed", "--force")
    assert forced.returncode == 0
    assert "so it comes back at the next start or change of the file" in forced.stdout
    running.configure(**running.options)
    running.pull(ref, name="later")
    assert running.ready("later").status == 200
    assert running.ready("listed", wait=0).status == 404, "not before"
    more = [*listing(ref), {"ref": ref, "name": "more"}]
    running.configure(**{**running.options, "models": more})
    until(lambda: running.ready("listed", wait=0).status == 200)
    assert running.ask("DELETE", "/v1/models/listed?force=true").document["configured"] is True
    running.stop()
    running.start()
    assert until(lambda: running.ready("listed", wait=0).status == 200)


def test_a_model_that_nothing_lists_is_removed_without_force(ground: Ground) -> None:
    ground.have("plain.bin")
    assert ground.node.ask("DELETE", "/v1/models/plain.bin").document["configured"] is False


# --- the command line ---


def test_the_command_line_refuses_to_move_a_name_and_says_how(ground: Ground) -> None:
    old, new = ground.have("cli.bin"), ground.add("cli-2.bin", MIB)
    refused = ground.node.cli("pull", new, "--name", "cli.bin", "--wait")
    assert (refused.returncode, "code: name_taken" in refused.stderr) == (9, True)
    assert old in refused.stderr
    assert new in refused.stderr
    moved = ground.node.cli("pull", new, "--name", "cli.bin", "--wait", "--replace")
    assert moved.returncode == 0, moved.stderr
    assert ground.node.ready("cli.bin").document["ref"] == new


def test_who_waits_for_a_pull_is_told_that_another_took_its_place(ground: Ground) -> None:
    new = ground.add("usurper.bin", MIB)
    with ground.held("usurped.bin"), ThreadPoolExecutor(1) as other:
        words = ("pull", f"{ground.origin.url}/usurped.bin", "--name", "usurped.bin", "--wait")
        waiting = other.submit(ground.node.cli, *words)
        until(lambda: ground.node.metric("cachd_joins_total") >= 1)
        ground.node.pull(new, name="usurped.bin", replace=True)
        ended = waiting.result(PATIENCE_SECONDS)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "code: replaced" in ended.stderr


def test_a_direct_pull_moves_a_name_only_with_replace(origin: Origin, root: Path) -> None:
    refs = [origin.add(f"/{number}", noise(1000, number)) for number in range(2)]

    def direct(ref: str, *more: str) -> tuple[int, str]:
        command = [*CACHD, "pull", ref, "--name", "n", "--direct", "--root", root]
        env = {**os.environ, "CACHD_RESERVE_FREE": "0", "CACHD_ALLOW": "127.0.0.0/8"}
        ended = run([*command, *more], env=env, timeout=PATIENCE_SECONDS)
        return ended.returncode, ended.stderr

    assert direct(refs[0])[0] == 0
    status, told = direct(refs[1])
    assert (status, "code: name_taken" in told) == (9, True)
    assert direct(refs[1], "--replace")[0] == 0
    assert json.loads((root / "ready/n.json").read_text())["ref"] == refs[1]


@pytest.mark.parametrize("asks", [False, True], ids=["somebody else pins it", "who asked pins it"])
def test_a_pin_that_is_set_while_another_revision_is_pulled_stops_the_move_unless_who_asked_set_it(
    engine: Callable[..., Engine], hub: Hub, asks: bool
) -> None:
    """Promised: A pinned name moves only with `replace`, also if it was pinned while the pull ran."""
    running = engine(hf_endpoint=hub.url)
    first = hub.add("org/model", {"f": b"one"})
    running.pull("hf://org/model", name="m")
    second = hub.add("org/model", {"f": b"two"})
    assert first != second
    held = hub.hold("*", after=0)
    pull = running.pulls.start(spec_of("hf://org/model@" + second, name="m"), pins=asks)
    assert pull is not None
    assert held.reached.wait(120)
    running.store.pins.add("m")
    held.release()
    if asks:
        assert pull.done.result(120).revision == second
        return
    with pytest.raises(InUse) as refusal:
        pull.done.result(120)
    assert (refusal.value.code, "is pinned at" in refusal.value.detail) == ("name_taken", True)
    ready = running.store.names.get("m")
    assert ready is not None
    assert ready.revision == first
