"""The HTTP API of a daemon in a process of its own: what it answers, refuses, and leaves on the disk."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.model import File
from cachd.store.overhead import beside_file
from cachd.store.space import bytes_beside
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Short, Status
from tests.ground.site import (
    Ground,
    assert_problem,
    files_left,
    hang_up,
    mapped,
    received,
    said,
    send,
    timed,
    until,
)

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 120
Nodes = Callable[..., Node]


# --- asking for a model ---


def test_a_pull_is_accepted_with_its_location_and_answered_200_once_it_is_ready(ground: Ground) -> None:
    with ground.held("twice.bin"):
        again = ground.node.pull(f"{ground.origin.url}/twice.bin")
        assert (again.status, said(again, "Location")) == (202, "/v1/models/twice.bin")
        assert again.document["name"] == "twice.bin"
    assert ground.node.ready("twice.bin").status == 200
    assert ground.node.pull(f"{ground.origin.url}/twice.bin").status == 200
    assert ground.origin.bytes_sent("/twice.bin") == 6 * MIB


def test_a_ready_model_is_answered_within_50_ms_and_its_origin_is_not_asked(ground: Ground) -> None:
    ref = ground.have("quick.bin")
    before = len(ground.origin.requests)
    answers = [timed(lambda: ground.node.pull(ref)) for _ in range(7)]
    assert {answer.status for answer, _ in answers} == {200}
    assert min(seconds for _, seconds in answers) < 0.05
    assert len(ground.origin.requests) == before


def test_a_kept_connection_is_answered_without_the_kernel_holding_bytes_back(ground: Ground) -> None:
    """Linux delays an acknowledgement by 40 ms; a server that sends head and body apart waits for it."""
    connection = http.client.HTTPConnection(urlsplit(ground.node.url).netloc, timeout=PATIENCE_SECONDS)

    def ask() -> int:
        connection.request("GET", "/livez")
        response = connection.getresponse()
        response.read()
        return response.status

    seconds = [timed(ask)[1] for _ in range(16)]
    connection.close()
    assert min(seconds[8:]) < 0.02, "a new connection is acknowledged at once for a while"


def test_a_hundred_requests_at_once_for_a_cold_model_cause_one_transfer(ground: Ground) -> None:
    """Promised: A hundred requests for a cold model cause one transfer; a client that hangs up ends none."""
    node, ref = ground.node, ground.add("crowd.bin")
    hold = ground.origin.hold("/crowd.bin", after=MIB)
    before = {name: node.metric(f"cachd_{name}_total") for name in ("misses", "joins", "hits")}
    with ThreadPoolExecutor(100) as crowd:
        asked = list(crowd.map(lambda _: node.pull(ref).status, range(100)))
        waiting = [crowd.submit(node.ready, "crowd.bin") for _ in range(100)]
        hold.release()
        answers = [waiter.result(PATIENCE_SECONDS) for waiter in waiting]
    assert asked == [202] * 100
    assert [answer.status for answer in answers] == [200] * 100
    assert len({answer.document["manifest"] for answer in answers}) == 1
    assert ground.origin.bytes_sent("/crowd.bin") == 6 * MIB
    assert sum(seen.method == "HEAD" and seen.path == "/crowd.bin" for seen in ground.origin.requests) == 1
    after = {name: node.metric(f"cachd_{name}_total") - before[name] for name in before}
    assert after == {"misses": 1, "joins": 99, "hits": 0}


def test_another_ref_is_refused_while_its_name_is_being_pulled(ground: Ground) -> None:
    other = ground.add("other.bin")
    with ground.held("busy.bin"):
        refused = ground.node.pull(other, name="busy.bin")
        assert_problem(refused, 409, "name_taken")
        assert f"{ground.origin.url}/busy.bin" in refused.document["detail"]
    assert ground.node.ready("busy.bin").document["ref"] == f"{ground.origin.url}/busy.bin"


def test_a_refused_request_pins_nothing(ground: Ground) -> None:
    other = ground.add("other.bin")
    with ground.held("unpinned.bin"):
        assert_problem(ground.node.pull(other, name="unpinned.bin", pin=True), 409, "name_taken")
        assert ground.show("unpinned.bin")["pinned"] is False
    assert ground.node.ready("unpinned.bin").status == 200


def test_a_name_moves_to_another_ref_only_when_that_is_ready(ground: Ground) -> None:
    old, node = ground.have("blue.bin"), ground.node
    new = ground.add("green.bin")
    hold = ground.origin.hold("/green.bin", after=MIB)
    assert node.pull(new, name="blue.bin", replace=True).status == 202
    assert hold.reached.wait(PATIENCE_SECONDS)
    shown = ground.show("blue.bin")
    assert (shown["state"], shown["ready"]["ref"], shown["pull"]["ref"]) == ("ready", old, new)
    assert os.listdir(node.root / "models/blue.bin") == ["blue.bin"]
    hold.release()
    node.wait_for("pull ended", name="blue.bin", ref=new)
    assert node.ready("blue.bin").document["ref"] == new
    assert os.listdir(node.root / "models/blue.bin") == ["green.bin"]


def test_a_client_that_hangs_up_cancels_nothing(ground: Ground) -> None:
    ref, node = ground.add("hangup.bin"), ground.node
    hold = ground.origin.hold("/hangup.bin", after=MIB)
    hang_up(node, "POST", "/v1/models", json.dumps({"ref": ref, "name": "hangup.bin"}).encode())
    assert hold.reached.wait(PATIENCE_SECONDS)
    for _ in range(3):
        hang_up(node, "GET", "/v1/models/hangup.bin/ready?wait=60")
    hold.release()
    assert node.ready("hangup.bin").status == 200
    assert ground.origin.bytes_sent("/hangup.bin") == 6 * MIB


def test_include_and_exclude_are_part_of_what_is_asked(ground: Ground) -> None:
    ground.hub.add("org/parts", {"config.json": b"{}", "a.safetensors": noise(MIB), "b.bin": noise(MIB, 2)})
    asked = {"name": "parts", "include": ["*.json", "*.bin"], "exclude": ["b.*"]}
    ground.node.pull("hf://org/parts", **asked)
    assert ground.node.ready("parts").document["include"] == ["*.json", "*.bin"]
    assert os.listdir(ground.node.root / "models/parts") == ["config.json"]
    assert ground.node.pull("hf://org/parts", **asked).status == 200


# --- how far it is ---


def test_a_model_in_mid_download_tells_how_far_it_is(ground: Ground) -> None:
    with ground.held("half.bin"):
        shown = ground.show("half.bin")
        assert shown["state"] == "downloading"
        assert shown["ready"] is None
        pull = shown["pull"]
        assert pull["bytes"]["total"] == 6 * MIB
        assert 2 * MIB <= pull["bytes"]["done"] < 6 * MIB
        assert pull["bytes"]["fetched"] == pull["bytes"]["done"]
        assert pull["bytes"]["resumed"] == 0
        assert pull["files"] == {"total": 1, "done": 0}
        assert pull["error"] is None
        assert pull["verified"] is False
        assert len(pull["revision"]) == 64
        assert pull["rate_bytes_per_second"] >= 0
        assert pull["eta_seconds"] is None or pull["eta_seconds"] > 0
        listed = ground.node.ask("GET", "/v1/models").document["models"]
        assert [m["state"] for m in listed if m["name"] == "half.bin"] == ["downloading"]
        assert ground.node.metric("cachd_models", state="downloading") == 1
        assert ground.node.metric("cachd_pulls_in_progress") == 1
        assert not (ground.node.root / "ready/half.bin.json").exists()
        assert not (ground.node.root / "models/half.bin").exists()
    assert ground.node.ready("half.bin").status == 200


def test_a_ready_model_shows_the_same_document_in_api_and_ready_file(ground: Ground) -> None:
    with ground.held("whole.bin"):
        pass
    waited = ground.node.ready("whole.bin")
    ended = ground.node.wait_for("pull ended", name="whole.bin")
    shown = ground.show("whole.bin")
    ready = shown["ready"]
    assert ready == waited.document == json.loads((ground.node.root / "ready/whole.bin.json").read_text())
    assert (shown["name"], shown["state"]) == ("whole.bin", "ready")
    assert (shown["pinned"], shown["in_use"], shown["verified"]) == (False, False, False)
    assert Path(shown["path"]).joinpath("whole.bin").read_bytes() == noise(6 * MIB, len("whole.bin"))
    assert (ready["bytes"], ready["files"], ready["verified"]) == (6 * MIB, 1, False)
    assert ready["revision"] == shown["pull"]["revision"]
    assert datetime.fromisoformat(ready["published_at"]).tzinfo is not None
    assert shown["pull"]["state"] == ended["state"] == "ready"
    assert shown["pull"]["bytes"] == {
        "total": 6 * MIB,
        "done": 6 * MIB,
        "fetched": 6 * MIB,
        "resumed": 0,
        "hedged": 0,
    }
    assert shown["pull"]["files"] == {"total": 1, "done": 1}


def test_the_list_holds_every_model_once_in_order(ground: Ground) -> None:
    ground.have("list-b.bin")
    ground.have("list-a.bin")
    names = [model["name"] for model in ground.node.ask("GET", "/v1/models").document["models"]]
    assert names == sorted(set(names))
    assert {"list-a.bin", "list-b.bin"} <= set(names)


def test_a_model_on_its_way_is_503_with_retry_after(ground: Ground) -> None:
    with ground.held("later.bin"):
        answer = ground.node.ready("later.bin", wait=0)
        assert_problem(answer, 503, "not_ready")
        assert 1 <= int(said(answer, "Retry-After")) <= 60
        assert answer.document["state"] == "downloading"
        assert answer.document["bytes_total"] == 6 * MIB
        assert 0 < answer.document["bytes_done"] < 6 * MIB
    assert ground.node.ready("later.bin").status == 200


def test_a_wait_for_a_model_ends_when_it_is_ready_and_no_later_than_it_said(ground: Ground) -> None:
    with ground.held("wait.bin") as hold, ThreadPoolExecutor(1) as other:
        answer, seconds = timed(lambda: ground.node.ready("wait.bin", wait=0.3))
        assert answer.status == 503
        assert 0.3 <= seconds < 5
        waiter = other.submit(ground.node.ready, "wait.bin", wait=60)
        hold.release()
        assert waiter.result(PATIENCE_SECONDS).status == 200


def test_a_bare_probe_is_answered_as_the_route_answers_and_refused_as_any_request(ground: Ground) -> None:
    """It is answered before it is routed."""
    ground.have("probed.bin")
    path, node = "/v1/models/probed.bin/ready", ground.node
    before = node.metric("cachd_requests_total", op="ready", result="2xx")
    bare, routed = node.ask("GET", path), node.ask("GET", f"{path}?wait=0")
    assert (bare.status, bare.document) == (routed.status, routed.document)
    assert said(bare, "Content-Type") == said(routed, "Content-Type") == "application/json"
    assert node.metric("cachd_requests_total", op="ready", result="2xx") == before + 2
    assert_problem(node.ask("GET", path, headers={"Host": "foreign.example"}), 403, "foreign_host")
    assert_problem(node.ask("DELETE", path), 405, "method_not_allowed")


def test_an_unknown_model_is_404_for_every_call(ground: Ground) -> None:
    calls = [("GET", ""), ("GET", "/ready"), ("GET", "/ready?wait=60"), ("PUT", "/pin")]
    for method, below in [*calls, ("DELETE", "/pin"), ("DELETE", "")]:
        assert_problem(ground.node.ask(method, f"/v1/models/nobody{below}"), 404, "no_such_model")


def test_a_failed_pull_is_told_with_its_code_and_asked_again_by_the_next_request(ground: Ground) -> None:
    ref, node = f"{ground.origin.url}/late.bin", ground.node
    assert node.pull(ref).status == 202
    failed = node.ready("late.bin")
    assert_problem(failed, 404, "file_not_found")
    assert (failed.document["state"], failed.document["final"]) == ("failed", True)
    assert failed.document["error"]["error_class"] == "NotFound"
    shown = ground.show("late.bin")
    assert (shown["state"], shown["pull"]["error"]["code"]) == ("failed", "file_not_found")
    ground.add("late.bin")
    assert node.pull(ref).status == 202
    assert node.ready("late.bin").status == 200
    assert ground.show("late.bin")["pull"]["error"] is None


# --- keeping and removing ---


def test_a_deleted_model_frees_its_bytes_and_leaves_nothing(alone: Callable[..., Ground]) -> None:
    ground = alone()
    ground.have("gone.bin", 5 * MIB)
    answer = ground.node.ask("DELETE", "/v1/models/gone.bin")
    assert answer.status == 200
    assert 5 * MIB <= answer.document["freed_bytes"] <= 5 * MIB + 64 * KIB, "blocks, not bytes"
    assert files_left(ground.node.root) == []
    assert_problem(ground.node.ask("GET", "/v1/models/gone.bin"), 404, "no_such_model")
    with ground.held("cancelled.bin"):
        answer = ground.node.ask("DELETE", "/v1/models/cancelled.bin")
        assert answer.status == 200
        assert files_left(ground.node.root) == []
        assert_problem(ground.node.ask("GET", "/v1/models/cancelled.bin"), 404, "no_such_model")


def test_a_deleted_pull_is_not_taken_up_by_the_next_life(alone: Callable[..., Ground]) -> None:
    ground = alone()
    with ground.held("forgotten.bin"):
        ground.node.ask("DELETE", "/v1/models/forgotten.bin")
        ground.node.kill()
        ground.node.start()
        assert ground.node.ask("GET", "/v1/models").document == {"models": []}


def test_a_failed_model_is_forgotten_and_its_bytes_freed_when_deleted(alone: Callable[..., Ground]) -> None:
    ground = alone()
    ref = ground.add("broken.bin")
    ground.origin.fault("/broken.bin", Short(at=3 * MIB))
    ground.node.pull(ref)
    assert ground.node.ready("broken.bin").document["state"] == "failed"
    assert ground.node.ask("DELETE", "/v1/models/broken.bin").status == 200
    assert files_left(ground.node.root) == []
    assert_problem(ground.node.ready("broken.bin"), 404, "no_such_model")


def test_a_pull_that_still_waits_for_its_turn_is_deleted_at_once(alone: Callable[..., Ground]) -> None:
    ground = alone(pulls=1)
    queued = ground.add("queued.bin")
    with ground.held("first.bin") as hold, ThreadPoolExecutor(1) as other:
        ground.node.pull(queued)
        assert ground.show("queued.bin")["state"] == "queued"
        deleting = other.submit(ground.node.ask, "DELETE", "/v1/models/queued.bin")
        try:
            assert deleting.result(5).status == 200
            assert ground.node.metric("cachd_pull_queue_length") == 0
        finally:
            hold.release()


def test_deletes_that_wait_for_a_slow_source_leave_the_api_answering(alone: Callable[..., Ground]) -> None:
    ground = alone()
    ground.hub.add("org/slow", {"config.json": b"{}"})
    hold = ground.hub.hold("/api/models/org/slow", after=0)
    ground.node.pull("hf://org/slow")
    assert hold.reached.wait(PATIENCE_SECONDS)
    with ThreadPoolExecutor(65) as others:
        deleting = [
            others.submit(ground.node.ask, "DELETE", "/v1/models/org--slow?force=true") for _ in range(64)
        ]
        asking = others.submit(ground.node.ask, "GET", "/readyz")
        try:
            assert asking.result(5).status == 200
        finally:
            hold.release()
        assert {answer.result(PATIENCE_SECONDS).status for answer in deleting} <= {200, 404}


def test_a_pinned_model_is_deleted_by_force_or_after_unpinning(ground: Ground) -> None:
    node = ground.node
    for name, force in (("pin-a.bin", False), ("pin-b.bin", True)):
        ground.have(name)
        assert node.ask("PUT", f"/v1/models/{name}/pin").status == 204
        assert ground.show(name)["pinned"] is True
        assert_problem(node.ask("DELETE", f"/v1/models/{name}"), 409, "pinned")
        assert node.ready(name, wait=0).status == 200
        if force:
            assert node.ask("DELETE", f"/v1/models/{name}?force=true").status == 200
        else:
            assert node.ask("DELETE", f"/v1/models/{name}/pin").status == 204
            assert ground.show(name)["pinned"] is False
            assert node.ask("DELETE", f"/v1/models/{name}").status == 200
        assert_problem(node.ready(name), 404, "no_such_model")


def test_a_pinned_model_is_not_deleted_while_it_is_pulled_either(ground: Ground) -> None:
    with ground.held("pinning.bin"):
        assert ground.node.ask("PUT", "/v1/models/pinning.bin/pin").status == 204
        assert_problem(ground.node.ask("DELETE", "/v1/models/pinning.bin"), 409, "pinned")
    assert ground.node.ready("pinning.bin").status == 200
    assert ground.show("pinning.bin")["pinned"] is True


def test_a_model_that_another_process_has_mapped_is_deleted_by_force_only(ground: Ground) -> None:
    """Promised: A model that a process has open is not deleted unless forced, and then stays readable for
    it.
    """
    ground.have("mapped.bin")
    node = ground.node
    with mapped(node.root / "models/mapped.bin/mapped.bin") as reader:
        assert ground.show("mapped.bin")["in_use"] is True
        assert_problem(node.ask("DELETE", "/v1/models/mapped.bin"), 409, "in_use")
        assert node.ready("mapped.bin", wait=0).status == 200
        assert node.ask("DELETE", "/v1/models/mapped.bin?force=true").status == 200
        assert not (node.root / "models/mapped.bin").exists()
        read, _ = reader.communicate(timeout=PATIENCE_SECONDS)
    assert read.strip() == hashlib.sha256(noise(MIB, len("mapped.bin"))).hexdigest()


# --- the node ---


def test_capacity_is_what_the_file_system_says(alone: Callable[..., Ground]) -> None:
    ground = alone(reserve_free="1GiB")
    told = ground.node.ask("GET", "/v1/capacity").document
    found = os.statvfs(ground.node.root)
    assert told["total_bytes"] == found.f_blocks * found.f_frsize
    assert abs(told["free_bytes"] - found.f_bavail * found.f_frsize) < 1 << 30
    assert (told["reserved_bytes"], told["reserve_free_bytes"]) == (0, 1 << 30)
    assert told["free_inodes"] > 0
    with ground.held("reserved.bin"):
        reserved = ground.node.ask("GET", "/v1/capacity").document["reserved_bytes"]
        file = File("reserved.bin", 6 * MIB, "/reserved.bin")
        beside = bytes_beside({file.blob: beside_file(file, by_ingest=True)})
        assert reserved == beside, "the bytes of the file are allocated by now"


def test_readyz_waits_for_required_models_only_when_asked(origin: Origin, node: Nodes) -> None:
    needed, optional = origin.add("/needed.bin", noise(MIB)), origin.add("/optional.bin", noise(MIB))
    holds = [origin.hold(f"/{name}.bin", after=1000) for name in ("needed", "optional")]
    running = node(
        models=[
            {"ref": needed, "name": "needed.bin", "required": True, "pin": True},
            {"ref": optional, "name": "optional.bin"},
        ]
    )
    assert running.ask("GET", "/livez").status == 200
    assert running.ask("GET", "/readyz").status == 200
    absent = running.ask("GET", "/readyz?set=required")
    assert_problem(absent, 503, "not_ready")
    assert absent.document["models"] == ["needed.bin"]
    assert int(said(absent, "Retry-After")) >= 1
    holds[0].release()
    assert running.ready("needed.bin").status == 200
    assert running.ask("GET", "/readyz?set=required").status == 200
    assert_problem(running.ready("optional.bin", wait=0), 503, "not_ready")
    assert_problem(running.ask("DELETE", "/v1/models/needed.bin"), 409, "configured")


INVALID_FILES = {
    "not YAML": "models: [",
    "no list": "models: 5",
    "a ref of no known scheme": "models: [{ref: 'gopher://there/it'}]",
}


@pytest.mark.parametrize("content", INVALID_FILES.values(), ids=INVALID_FILES.keys())
def test_an_invalid_file_is_warned_of_and_the_next_valid_one_is_taken_over(
    origin: Origin, node: Nodes, content: str
) -> None:
    before, after = origin.add("/before.bin", noise(1000)), origin.add("/after.bin", noise(1000))
    running = node(models=[{"ref": before, "name": "before.bin", "required": True}])
    assert running.ready("before.bin").status == 200
    running.config.write_text(content)
    running.wait_for("configuration file not taken over", level="error")
    assert running.ask("GET", "/readyz?set=required").status == 200
    listed = {"ref": after, "name": "after.bin", "required": True}
    running.configure(**{**running.options, "models": [listed]})
    assert running.wait_for("published", name="after.bin")
    assert running.ready("before.bin", wait=0).status == 200, "what is no longer listed stays"


def test_prewarm_asks_again_until_the_origin_has_recovered(origin: Origin, node: Nodes) -> None:
    ref = origin.add("/flaky.bin", noise(MIB))
    origin.fault("/flaky.bin", Status(500))
    running = node(retries=0, models=[{"ref": ref, "name": "flaky.bin"}])
    running.wait_for("pull ended", name="flaky.bin", code="origin_failed")
    until(lambda: running.ask("GET", "/v1/models/flaky.bin").document["state"] == "failed")  # between tries
    origin.clear()
    running.wait_for("published", name="flaky.bin")


def test_a_stop_answers_those_who_wait_and_ends_well(alone: Callable[..., Ground]) -> None:
    ground = alone()
    with ground.held("interrupted.bin"):
        waiting = send(ground.node, "GET", "/v1/models/interrupted.bin/ready?wait=60")
        assert ground.node.ask("GET", "/livez").status == 200
        assert ground.node.stop() == 0
        response = http.client.HTTPResponse(waiting)
        response.begin()
        waited = received(response)
        waiting.close()
    assert waited.status == 503, waited
    assert said(waited, "Content-Type") == "application/problem+json"
    assert "Traceback" not in ground.node.output
