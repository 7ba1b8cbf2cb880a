"""The HTTP API of a daemon in a process of its own: what it answers, refuses, and leaves on the disk."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import noise
from tests.ground.hub import Hub
from tests.ground.models import digests
from tests.ground.node import Answer, Node
from tests.ground.origin import Flip, Hold, Origin, Short, Status
from tests.ground.s3 import S3Server

MIB = 1 << 20
PATIENCE_SECONDS = 30
Nodes = Callable[..., Node]


@dataclass(frozen=True, slots=True)
class Ground:
    """One daemon and the origins within its reach. Tests that share it use names of their own."""

    node: Node
    origin: Origin
    hub: Hub

    def add(self, name: str, size: int = 6 * MIB) -> str:
        """Let the origin hold a file; its URL is a ref whose model is called `name`."""
        return self.origin.add(f"/{name}", noise(size, seed=len(name)))

    def have(self, name: str, size: int = MIB) -> str:
        """Pull a file and wait; its ref."""
        ref = self.add(name, size)
        self.node.pull(ref)
        assert self.node.ready(name).status == 200
        return ref

    @contextmanager
    def held(self, name: str) -> Iterator[Hold]:
        """Pull a file of 6 MiB that stops in its first part of 4 MiB, after the second is durable."""
        ref = self.add(name)
        hold = self.origin.hold(f"/{name}", after=3 * MIB)
        try:
            assert self.node.pull(ref).status == 202
            assert hold.reached.wait(PATIENCE_SECONDS)
            self.node.wait_for("part made durable", path=name)
            yield hold
        finally:
            hold.release()

    def show(self, name: str) -> Any:
        return self.node.ask("GET", f"/v1/models/{name}").document


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    root = tmp_path_factory.mktemp("api") / "node"
    with Origin() as origin, Hub() as hub:
        options = {"hf_endpoint": hub.url, "retries": 0, "streams": 4}
        with Node(root, options) as node:
            yield Ground(node, origin, hub)


@pytest.fixture
def alone(origin: Origin, hub: Hub, node: Nodes) -> Callable[..., Ground]:
    """Starts a daemon that a test has to itself: `alone(pulls=1)`."""

    def started(**options: Any) -> Ground:
        plain = {"hf_endpoint": hub.url, "retries": 0, "streams": 4}
        return Ground(node(**{**plain, **options}), origin, hub)

    return started


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
        assert_problem(refused, 409, "name_busy")
        assert f"{ground.origin.url}/busy.bin" in refused.document["detail"]
    assert ground.node.ready("busy.bin").document["ref"] == f"{ground.origin.url}/busy.bin"


def test_a_refused_request_pins_nothing(ground: Ground) -> None:
    other = ground.add("other.bin")
    with ground.held("unpinned.bin"):
        assert_problem(ground.node.pull(other, name="unpinned.bin", pin=True), 409, "name_busy")
        assert ground.show("unpinned.bin")["pinned"] is False
    assert ground.node.ready("unpinned.bin").status == 200


def test_a_name_moves_to_another_ref_only_when_that_is_ready(ground: Ground) -> None:
    old, node = ground.have("blue.bin"), ground.node
    new = ground.add("green.bin")
    hold = ground.origin.hold("/green.bin", after=MIB)
    assert node.pull(new, name="blue.bin").status == 202
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
    hang_up(node, "POST", "/v1/models", json.dumps({"ref": ref}).encode())
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


def test_a_ready_model_tells_what_it_is(ground: Ground) -> None:
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


def test_an_unknown_model_is_404_for_every_call(ground: Ground) -> None:
    calls = [("GET", ""), ("GET", "/ready"), ("GET", "/ready?wait=60"), ("PUT", "/pin")]
    for method, below in [*calls, ("DELETE", "/pin"), ("DELETE", "")]:
        assert_problem(ground.node.ask(method, f"/v1/models/nobody{below}"), 404, "no_such_model")


def test_a_failed_pull_is_told_with_its_code_and_asked_again_by_the_next_request(ground: Ground) -> None:
    ref, node = f"{ground.origin.url}/late.bin", ground.node
    assert node.pull(ref).status == 202
    failed = node.ready("late.bin")
    assert_problem(failed, 503, "file_not_found")
    assert failed.document["state"] == "failed"
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
    assert (answer.status, answer.document["freed_bytes"]) == (200, 5 * MIB)
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
        assert ground.node.ask("GET", "/v1/capacity").document["reserved_bytes"] == 0, "allocated by now"


def test_readyz_waits_for_required_models_only_when_asked(origin: Origin, node: Nodes) -> None:
    needed, optional = origin.add("/needed.bin", noise(MIB)), origin.add("/optional.bin", noise(MIB))
    holds = [origin.hold(f"/{name}.bin", after=1000) for name in ("needed", "optional")]
    running = node(models=[{"ref": needed, "required": True, "pin": True}, {"ref": optional}])
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
    assert_problem(running.ask("DELETE", "/v1/models/needed.bin"), 409, "pinned")


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
    running = node(models=[{"ref": before, "required": True}])
    assert running.ready("before.bin").status == 200
    running.config.write_text(content)
    running.wait_for("configuration file not taken over", level="warning")
    assert running.ask("GET", "/readyz?set=required").status == 200
    running.configure(**{**running.options, "models": [{"ref": after, "required": True}]})
    assert running.wait_for("published", name="after.bin")
    assert running.ready("before.bin", wait=0).status == 200, "what is no longer listed stays"


def test_prewarm_asks_again_until_the_origin_has_recovered(origin: Origin, node: Nodes) -> None:
    ref = origin.add("/flaky.bin", noise(MIB))
    origin.fault("/flaky.bin", Status(500))
    running = node(retries=0, models=[{"ref": ref}])
    running.wait_for("pull ended", name="flaky.bin", code="origin_failed")
    assert running.ask("GET", "/v1/models/flaky.bin").document["state"] == "failed"
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


# --- what is refused, and how ---

JSON = {"Content-Type": "application/json"}
TOO_DEEP = b"[" * 100_000
REFUSED_BODIES: dict[str, tuple[object, int, str]] = {
    "no body": (b"", 422, "invalid_request"),
    "no JSON": (b"{", 422, "invalid_request"),
    "no object": ([], 422, "invalid_request"),
    "no ref": ({}, 422, "invalid_request"),
    "null": ({"ref": None}, 422, "invalid_request"),
    "an unknown field": ({"ref": "hf://a/b", "revision": "main"}, 422, "invalid_request"),
    "a number for a ref": ({"ref": 1}, 422, "invalid_request"),
    "a string for a list": ({"ref": "hf://a/b", "include": "*"}, 422, "invalid_request"),
    "null for a list": ({"ref": "hf://a/b", "exclude": None}, 422, "invalid_request"),
    "a word for a number": ({"ref": "hf://a/b", "priority": "high"}, 422, "invalid_request"),
    "a priority out of range": ({"ref": "hf://a/b", "priority": 101}, 422, "invalid_request"),
    "a priority that is no number": (b'{"ref": "hf://a/b", "priority": NaN}', 422, "invalid_request"),
    "a ref too long": ({"ref": "hf://a/" + "b" * 3000}, 400, "bad_ref"),
    "half a character": (b'{"ref": "hf://a/b", "\\ud800": 1}', 422, "invalid_request"),
    "too many patterns": ({"ref": "hf://a/b", "include": ["*"] * 1001}, 422, "invalid_request"),
    "nested without end": (TOO_DEEP, 400, "refused"),
    "2 MB": (b'"' + b"x" * 2 * MIB + b'"', 413, "body_too_long"),
    "an unknown scheme": ({"ref": "gopher://there/it"}, 400, "unknown_scheme"),
    "no scheme": ({"ref": "org/model"}, 400, "unknown_scheme"),
    "a repo of three": ({"ref": "hf://a/b/c"}, 400, "bad_ref"),
    "a repo with --": ({"ref": "hf://a--b/c"}, 400, "bad_ref"),
    "a repo that ends in .git": ({"ref": "hf://a/b.git"}, 400, "bad_ref"),
    "a revision that climbs": ({"ref": "hf://a/b@../main"}, 400, "bad_revision"),
    "a short commit": ({"ref": "hf://a/b@0123abc"}, 400, "bad_revision"),
    "a path that climbs": ({"ref": "https://example.org/a/../b"}, 400, "bad_ref"),
    "a path that climbs in disguise": ({"ref": "https://example.org/a/%2e%2e/b"}, 400, "bad_ref"),
    "a password": ({"ref": "https://user:pass@example.org/b"}, 400, "url_secrets"),
    "a query": ({"ref": "https://example.org/b?X-Amz-Signature=1"}, 400, "url_query"),
    "a backslash": ({"ref": "https://good\\@example.org/b"}, 400, "bad_ref"),
    "a digest too short": ({"ref": "https://example.org/b#sha256=00"}, 400, "bad_digest"),
    "a name that climbs": ({"ref": "hf://a/b", "name": "../../etc"}, 400, "bad_name"),
    "a name with a null": ({"ref": "hf://a/b", "name": "a\0b"}, 400, "bad_name"),
    "a name with a line feed": ({"ref": "hf://a/b", "name": "a\n"}, 400, "bad_name"),
    "a name that is hidden": ({"ref": "hf://a/b", "name": ".trees"}, 400, "bad_name"),
    "a name too long": ({"ref": "hf://a/b", "name": "n" * 97}, 400, "bad_name"),
    "a name with a look-alike slash": ({"ref": "hf://a/b", "name": "a\u2215b"}, 400, "bad_name"),
    "an empty name": ({"ref": "hf://a/b", "name": ""}, 400, "bad_name"),
}


@pytest.mark.parametrize(("body", "status", "code"), REFUSED_BODIES.values(), ids=REFUSED_BODIES.keys())
def test_a_wrong_request_is_refused_by_a_problem_document(
    ground: Ground, body: object, status: int, code: str
) -> None:
    before = names(ground)
    assert_problem(ground.node.ask("POST", "/v1/models", body), status, code)
    assert ground.node.ask("GET", "/livez").status == 200
    assert names(ground) == before


def test_a_refusal_names_the_field_that_is_wrong(ground: Ground) -> None:
    answer = ground.node.ask("POST", "/v1/models", {"ref": "hf://a/b", "color": 1, "priority": "high"})
    assert "color" in answer.document["detail"]
    assert "priority" in answer.document["detail"]


def test_a_password_in_a_ref_is_not_repeated(ground: Ground) -> None:
    ground.node.pull("https://user:canary-word@example.org/b")
    ground.node.pull("https://example.org/b?token=canary-word")
    ground.node.pull("nonsense://user:canary-word@example.org/b?token=canary-word")
    assert "canary-word" not in ground.node.output
    for ref in ("https://user:canary-word@example.org/b", "https://example.org/b?token=canary-word"):
        assert "canary-word" not in json.dumps(ground.node.pull(ref).document)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
def test_a_body_of_another_type_is_refused(ground: Ground, content_type: str) -> None:
    body = json.dumps({"ref": "hf://org/by-form"}).encode()
    answer = ground.node.ask("POST", "/v1/models", body, headers={"Content-Type": content_type})
    assert_problem(answer, 422, "invalid_request")
    assert_problem(ground.node.ready("org--by-form"), 404, "no_such_model")


def test_a_body_too_long_that_does_not_say_its_length_is_refused_too(ground: Ground) -> None:
    connection = http.client.HTTPConnection(urlsplit(ground.node.url).netloc, timeout=PATIENCE_SECONDS)
    pieces = (b"x" * 65536 for _ in range(20))
    connection.request("POST", "/v1/models", pieces, headers=JSON, encode_chunked=True)
    answer = received(connection.getresponse())
    connection.close()
    assert_problem(answer, 413, "body_too_long")


REFUSED_PATHS = {
    ("GET", "/"): (404, "no_such_path"),
    ("GET", "/v2/models"): (404, "no_such_path"),
    ("GET", "/v1/models/..%2f..%2fetc%2fpasswd"): (404, "no_such_path"),
    ("DELETE", "/v1/models/a%2f..%2fb"): (404, "no_such_path"),
    ("GET", "/v1/models/%2e%2e"): (400, "bad_name"),
    ("GET", "/v1/models/a%00b"): (400, "bad_name"),
    ("GET", "/v1/models/%ff"): (400, "bad_name"),
    ("DELETE", "/v1/models/.trees"): (400, "bad_name"),
    ("PUT", "/v1/models/-rf/pin"): (400, "bad_name"),
    ("GET", "/v1/models/" + "n" * 300): (400, "bad_name"),
    ("GET", "/v1/models/m/ready?wait=soon"): (422, "invalid_request"),
    ("GET", "/v1/models/m/ready?wait=-1"): (422, "invalid_request"),
    ("GET", "/v1/models/m/ready?wait=nan"): (422, "invalid_request"),
    ("GET", "/v1/models/m/ready?wait=3601"): (422, "invalid_request"),
    ("GET", "/readyz?set=all"): (422, "invalid_request"),
    ("POST", "/livez"): (405, "method_not_allowed"),
    ("PATCH", "/v1/models"): (405, "method_not_allowed"),
    ("OPTIONS", "/v1/models"): (405, "method_not_allowed"),
}


@pytest.mark.parametrize(
    ("asked", "expected"), REFUSED_PATHS.items(), ids=[" ".join(p)[:40] for p in REFUSED_PATHS]
)
def test_a_wrong_path_is_refused_by_a_problem_document(
    ground: Ground, asked: tuple[str, str], expected: tuple[int, str]
) -> None:
    assert_problem(ground.node.ask(*asked), *expected)


def test_a_wrong_method_is_told_the_right_ones(ground: Ground) -> None:
    """RFC 9110, 15.5.6: a 405 must carry Allow."""
    assert "GET" in said(ground.node.ask("POST", "/livez"), "Allow")


PRIVATE_REFS = {
    "https://127.0.0.1:1/it": "private_address",
    "https://localhost:1/it": "private_address",
    "https://127.1:1/it": "private_address",
    "https://0x7f.1:1/it": "private_address",
    "https://[::1]:1/it": "private_address",
    "https://[::ffff:127.0.0.1]:1/it": "private_address",
    "https://10.0.0.1:1/it": "private_address",
    "https://169.254.169.254/it": "private_address",
    "http://169.254.169.254/it": "plaintext_refused",
    "http://127.0.0.1:1/it": "plaintext_refused",
    "file:///etc/shadow": "path_refused",
    "file:///proc/self/environ": "path_refused",
}


def test_nothing_private_is_reached_that_the_operator_did_not_allow(node: Nodes) -> None:
    running = node(allow=[])
    for number, (ref, code) in enumerate(PRIVATE_REFS.items()):
        assert running.pull(ref, name=f"m{number}").status == 202
        answer = running.ready(f"m{number}")
        assert_problem(answer, 503, code)
        assert answer.document["error"]["error_class"] == "Forbidden", ref
    assert running.ask("GET", "/livez").status == 200


def test_a_link_on_a_share_does_not_lead_out_of_what_is_allowed(tmp_path: Path, node: Nodes) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "shadow").symlink_to("/etc/shadow")
    running = node(allow=[f"file://{share}/"])
    running.pull(f"file://{share}/shadow")
    assert_problem(running.ready("shadow"), 503, "path_refused")


def test_a_hub_says_no_in_its_own_words(ground: Ground) -> None:
    files = {"config.json": b"{}", "model.safetensors": noise(1000)}
    ground.hub.add("org/known", files)
    ground.hub.add("org/private", files, private=True)
    ground.hub.add("org/gated", files, gated=True)
    expected = {
        "hf://org/known@absent": "revision_not_found",
        "hf://org/absent": "source_unauthorized",
        "hf://org/private": "source_unauthorized",
        "hf://org/gated": "gated",
    }
    told = {}
    for number, ref in enumerate(expected):
        ground.node.pull(ref, name=f"hub-{number}")
        answer = ground.node.ready(f"hub-{number}")
        assert_problem(answer, 503, answer.document["code"])
        told[ref] = answer.document["code"]
    assert told == expected


def test_an_origin_says_no_in_its_own_words(ground: Ground) -> None:
    ref = ground.add("status.bin")
    expected = {401: "source_unauthorized", 403: "source_forbidden", 404: "file_not_found"}
    expected |= {410: "file_not_found", 429: "rate_limited", 500: "origin_failed"}
    told = {}
    for status in expected:
        ground.origin.clear()
        ground.origin.fault("/status.bin", Status(status))
        ground.node.pull(ref, name=f"status-{status}")
        told[status] = ground.node.ready(f"status-{status}").document["code"]
    ground.origin.clear()
    assert told == expected
    assert ground.node.ask("GET", "/livez").status == 200


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB where `node(root="disk")` has its root."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m,mode=0755", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> Path:
    """Take every free block; the file that has them."""
    filler = disk / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(fd, noise(4096))
    except OSError:
        return filler
    finally:
        os.close(fd)


def test_a_model_that_does_not_fit_is_refused_before_its_first_byte(
    small_disk: Path, origin: Origin, node: Nodes
) -> None:
    refs = {size: origin.add(f"/{size}.bin", noise(size * MIB)) for size in (40, 41, 70)}
    running = node(root="disk")
    running.pull(refs[70])
    big = running.ready("70.bin")
    assert_problem(big, 503, "too_big")
    assert big.document["error"]["need"] == 70 * MIB
    assert big.document["error"]["error_class"] == "TooBig"
    running.pull(refs[40])
    assert running.ready("40.bin").status == 200
    running.pull(refs[41])
    none = running.ready("41.bin")
    assert_problem(none, 503, "no_space")
    assert none.document["error"]["free"] < none.document["error"]["need"] == 41 * MIB
    assert "cachd rm" in none.document["mend"]
    assert origin.bytes_sent() == 40 * MIB
    assert running.ask("DELETE", "/v1/models/40.bin").status == 200
    assert running.pull(refs[41]).status == 202
    assert running.ready("41.bin").status == 200


def test_a_full_disk_is_507_and_the_daemon_goes_on(small_disk: Path, origin: Origin, node: Nodes) -> None:
    first, second = origin.add("/first.bin", noise(20 * MIB)), origin.add("/second.bin", noise(20 * MIB, 2))
    running = node(root="disk")
    running.pull(first)
    assert running.ready("first.bin").status == 200
    filler = fill(small_disk)
    assert_problem(running.pull(second), 507, "no_space")
    assert running.ask("GET", "/livez").status == 200
    assert running.ready("first.bin", wait=0).status == 200
    filler.unlink()
    assert running.pull(second).status == 202
    assert running.ready("second.bin").status == 200


def test_a_daemon_killed_in_mid_pull_starts_again_on_a_full_disk(
    small_disk: Path, origin: Origin, node: Nodes
) -> None:
    origin.add("/kept.bin", noise(MIB, 3))
    origin.add("/pulled.bin", noise(20 * MIB))
    running = node(root="disk")
    running.pull(f"{origin.url}/kept.bin")
    assert running.ready("kept.bin").status == 200
    hold = origin.hold("/pulled.bin", after=MIB)
    running.pull(f"{origin.url}/pulled.bin")
    assert hold.reached.wait(PATIENCE_SECONDS)
    running.kill()
    hold.release()
    fill(small_disk)
    running.start()
    assert running.ready("kept.bin", wait=0).status == 200
    assert running.ask("DELETE", "/v1/models/kept.bin").status == 200, "an operator can make room"


# --- who may ask ---

TOKEN = "canary-bearer-7f3e"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A daemon that wants a token for writes and answers to one more name."""
    directory = tmp_path_factory.mktemp("guarded")
    options = {"token_file": str(directory / "token"), "allowed_hosts": ["Cache.Example"]}
    with Origin() as origin, Hub() as hub, Node(directory / "node", options) as node:
        yield Ground(node, origin, hub)


def token_file(guarded: Ground) -> Path:
    return Path(guarded.node.options["token_file"])


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


WRITES = [
    ("POST", "/v1/models"),
    ("DELETE", "/v1/models/any"),
    ("PUT", "/v1/models/any/pin"),
    ("DELETE", "/v1/models/any/pin"),
]


def test_reads_are_open_and_writes_want_the_token(guarded: Ground) -> None:
    token_file(guarded).write_text(f"{TOKEN}\n")
    for path in ("/livez", "/readyz", "/metrics", "/v1/models", "/v1/capacity", "/openapi.json"):
        assert guarded.node.ask("GET", path).status == 200, path
    wrong: list[dict[str, str]] = [
        {},
        bearer("wrong"),
        bearer(""),
        bearer(TOKEN + "x"),
        bearer(TOKEN[:-1]),
        bearer("caf\u00e9"),
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
    ]
    for method, path in WRITES:
        for headers in wrong:
            body = {"ref": "hf://org/model"} if method == "POST" else None
            answer = guarded.node.ask(method, path, body, headers=headers)
            assert_problem(answer, 401, "unauthorized")
            assert said(answer, "WWW-Authenticate").startswith("Bearer")
            assert TOKEN not in json.dumps(answer.document)
    assert guarded.node.ask("GET", "/v1/models").document == {"models": []}


def test_the_right_token_may_write_and_a_new_one_is_taken_over_at_once(guarded: Ground) -> None:
    token_file(guarded).write_text(f"{TOKEN}\n")
    pin = ("PUT", "/v1/models/any/pin")
    assert_problem(guarded.node.ask(*pin, headers=bearer(TOKEN)), 404, "no_such_model")
    assert_problem(
        guarded.node.ask(*pin, headers={"Authorization": f"bearer  {TOKEN}"}), 404, "no_such_model"
    )
    token_file(guarded).write_text("another")
    assert_problem(guarded.node.ask(*pin, headers=bearer(TOKEN)), 401, "unauthorized")
    assert_problem(guarded.node.ask(*pin, headers=bearer("another")), 404, "no_such_model")


def test_without_a_readable_token_nobody_may_write(guarded: Ground) -> None:
    token_file(guarded).unlink(missing_ok=True)
    missing = guarded.node.ask("DELETE", "/v1/models/any", headers=bearer(TOKEN))
    assert_problem(missing, 401, "token_unreadable")
    for empty in ("", " \n"):
        token_file(guarded).write_text(empty)
        for given in ("", " ", TOKEN):
            answer = guarded.node.ask("DELETE", "/v1/models/any", headers=bearer(given))
            assert_problem(answer, 401, "unauthorized")


def test_a_request_to_a_foreign_host_name_is_refused(guarded: Ground) -> None:
    port = urlsplit(guarded.node.url).port
    ours = ["127.0.0.1", f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", "[::1]:8470", "10.1.2.3"]
    for host in [*ours, "cache.example", "CACHE.EXAMPLE:80"]:
        assert guarded.node.ask("GET", "/livez", headers={"Host": host}).status == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil@127.0.0.1x", ""):
        assert_problem(guarded.node.ask("GET", "/livez", headers={"Host": host}), 403, "foreign_host")


def test_a_request_from_a_page_of_another_site_is_refused(guarded: Ground) -> None:
    own = guarded.node.url
    assert guarded.node.ask("GET", "/livez", headers={"Origin": own}).status == 200
    port = urlsplit(own).port
    at_its_name = {"Host": f"cache.example:{port}", "Origin": f"http://cache.example:{port}"}
    assert guarded.node.ask("GET", "/livez", headers=at_its_name).status == 200
    for site in ("https://evil.example", "null", "http://192.0.2.66", "http://[2001:db8::66]:8470", ""):
        assert_problem(guarded.node.ask("GET", "/livez", headers={"Origin": site}), 403, "foreign_origin")


def test_a_daemon_open_to_the_network_wants_a_token_or_the_word_of_its_operator(
    ground: Ground, tmp_path: Path, node: Nodes
) -> None:
    (tmp_path / "refused").mkdir(mode=0o755)
    refused = ground.node.cli("serve", "--root", str(tmp_path / "refused"), "--listen", "0.0.0.0:0")
    assert refused.returncode == 5
    assert "0.0.0.0:0" in refused.stderr
    assert "token_file" in refused.stderr
    assert "code: open_writes" in refused.stderr
    assert list((tmp_path / "refused").iterdir()) == []
    running = node(listen="0.0.0.0:0", anonymous_writes=True)
    assert_problem(running.ask("PUT", "/v1/models/any/pin"), 404, "no_such_model")


def test_a_root_has_one_daemon(ground: Ground) -> None:
    second = ground.node.cli("serve", "--root", str(ground.node.root), "--listen", "127.0.0.1:0")
    assert second.returncode == 9
    assert "code: root_locked" in second.stderr
    assert f"pid {ground.node.pid}" in second.stderr
    assert ground.node.ask("GET", "/livez").status == 200


def test_an_address_that_is_taken_is_told(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir(mode=0o755)
    address = urlsplit(ground.node.url).netloc
    second = ground.node.cli("serve", "--root", str(tmp_path / "root"), "--listen", address)
    assert second.returncode == 10
    assert f"cannot listen on {address}" in second.stderr
    assert "code: cannot_listen" in second.stderr
    assert "Traceback" not in second.stderr


# --- what it says of itself ---


def test_the_openapi_document_holds_every_call(ground: Ground) -> None:
    document = ground.node.ask("GET", "/openapi.json").document
    calls = {(method.upper(), path) for path, calls in document["paths"].items() for method in calls}
    assert calls >= {
        ("POST", "/v1/models"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name}"),
        ("DELETE", "/v1/models/{name}"),
        ("GET", "/v1/models/{name}/ready"),
        ("PUT", "/v1/models/{name}/pin"),
        ("DELETE", "/v1/models/{name}/pin"),
        ("GET", "/v1/capacity"),
        ("GET", "/livez"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
    }
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            assert call["description"], f"{method} {path} says what it does"
            assert "application/problem+json" in call["responses"]["4XX"]["content"]
    body = document["components"]["schemas"]["Asked"]["properties"]
    assert set(body) == {"ref", "name", "include", "exclude", "pin", "priority", "refresh"}
    assert ground.node.ask("GET", "/docs").status == 200


def test_requests_are_counted_by_call_and_class_and_nothing_else(ground: Ground) -> None:
    for path in ("/livez", "/nowhere/at/all", "/v1/models/not-a-label"):
        ground.node.ask("GET", path)
    assert ground.node.metric("cachd_requests_total", op="livez", result="2xx") >= 1
    assert ground.node.metric("cachd_requests_total", op="none", result="4xx") >= 1
    text = ground.node.ask("GET", "/metrics").document.decode()
    assert "not-a-label" not in text
    assert "nowhere" not in text


def test_no_secret_is_in_a_log_an_answer_a_metric_or_a_file(
    hub: Hub, s3: S3Server, node: Nodes, tmp_path: Path
) -> None:
    hub.token = "hf_canaryCanaryCanary41"
    hub.add("org/private", {"model.safetensors": noise(6 * MIB)}, private=True)
    hub.add("org/damaged", {"model.safetensors": noise(6 * MIB, 2)})
    hub.add("org/expired", {"model.safetensors": noise(6 * MIB, 3)})
    hub.cdn.fault(hub.cdn_path("org/damaged", "model.safetensors"), Flip(5))
    hub.cdn.fault(hub.cdn_path("org/expired", "model.safetensors"), Status(403))
    s3.put("secrets", "model/model.bin", noise(6 * MIB, 4), checksum="SHA256")
    (tmp_path / "token").write_text(TOKEN)
    options = {"token_file": str(tmp_path / "token"), "hf_endpoint": hub.url, "s3_endpoint_url": s3.url}
    env = {
        "HF_TOKEN": hub.token,
        "AWS_ACCESS_KEY_ID": s3.access_key,
        "AWS_SECRET_ACCESS_KEY": s3.secret_key,
        "AWS_DEFAULT_REGION": s3.region,
    }
    running = node(env=env, retries=0, **options)
    said = []
    expected = {
        "hf://org/private": 200,
        "hf://org/damaged": 503,
        "hf://org/expired": 503,
        "hf://org/absent": 503,
        "s3://secrets/model/": 200,
        "s3://secrets/absent/": 503,
        "s3://no-such-bucket/model/": 503,
    }
    for number, (ref, status) in enumerate(expected.items()):
        asked = {"ref": ref, "name": f"m{number}"}
        said += [
            running.ask("POST", "/v1/models", asked, headers=bearer(f"{TOKEN}x")),
            running.ask("POST", "/v1/models", asked, headers=bearer(TOKEN)),
            running.ready(f"m{number}"),
            running.ask("GET", f"/v1/models/{m}" if (m := f"m{number}") else ""),
        ]
        assert said[-2].status == status, said[-2].document
    paths = ("/v1/models", "/v1/capacity", "/readyz?set=required", "/metrics", "/openapi.json")
    said += [running.ask("GET", path) for path in paths]
    printed = [running.cli(*words, CACHD_TOKEN=TOKEN) for words in (("ls",), ("doctor",), ("show", "m1"))]
    running.stop()

    assert any(hub.token in seen.headers.get("authorization", "") for seen in hub.requests), "it was used"
    assert not hub.leaked
    texts = {"the log": running.output, "the options": running.config.read_text()}
    texts |= {f"answer {n}": repr(answer) for n, answer in enumerate(said)}
    texts |= {f"command {n}": ended.stdout + ended.stderr for n, ended in enumerate(printed)}
    files = [path for path in running.root.rglob("*") if path.is_file()]
    texts |= {str(path): path.read_bytes().decode("latin-1") for path in files}
    secrets = (hub.token, TOKEN, s3.secret_key, "X-Amz-Signature", "X-Amz-Credential", "Signature=")
    found = [(where, secret) for where, text in texts.items() for secret in secrets if secret in text]
    assert found == []


# --- small things of the tests ---


def assert_problem(answer: Answer, status: int, code: str) -> None:
    """The answer is a problem document (RFC 9457) with this status and code."""
    assert said(answer, "Content-Type") == "application/problem+json", answer
    assert (answer.status, answer.document["code"]) == (status, code), answer.document
    assert answer.document["status"] == status
    assert answer.document["title"]
    assert answer.document["detail"]


def said(answer: Answer, header: str) -> str:
    """A header of the answer, whatever its case; empty when there is none."""
    return {name.lower(): value for name, value in answer.headers.items()}.get(header.lower(), "")


def names(ground: Ground) -> list[str]:
    return [model["name"] for model in ground.node.ask("GET", "/v1/models").document["models"]]


def files_left(root: Path) -> list[str]:
    """What is in a root beside what every root has."""
    always = {"CACHEDIR.TAG", "hub/CACHEDIR.TAG", ".cachd/format", ".cachd/lock"}
    return sorted({*digests(root)} - always)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    return call(), time.monotonic() - began


def send(node: Node, method: str, path: str, body: bytes = b"") -> socket.socket:
    """Send a request and leave its answer unread."""
    url = urlsplit(node.url)
    connection = socket.create_connection((url.hostname or "", url.port or 0), timeout=PATIENCE_SECONDS)
    head = f"{method} {path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def received(response: http.client.HTTPResponse) -> Answer:
    """An answer that did not come through `Node.ask`."""
    content = response.read()
    is_json = "json" in (response.getheader("Content-Type") or "")
    return Answer(response.status, json.loads(content) if is_json else content, dict(response.getheaders()))


def hang_up(node: Node, method: str, path: str, body: bytes = b"") -> None:
    """Send a request and close before its answer."""
    send(node, method, path, body).close()


@contextmanager
def mapped(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has mapped a file and closed it; told to end, it prints the sha256 of what it sees."""
    script = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as opened:
    seen = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.read()
print(hashlib.sha256(seen).hexdigest())
"""
    command = [sys.executable, "-c", script, file]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "mapped\n"
            yield reader
        finally:
            reader.kill()
