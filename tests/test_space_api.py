"""Capacity, evictions and leases in the API and on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import assert_problem
from tests.ground.small import MIB, Nodes, on_disk, ready_names


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Origin]]:
    """A daemon with 40 MiB for models, and four models of 8 MiB that are used now and then."""
    place = tmp_path_factory.mktemp("served")
    with Origin() as origin, Node(place / "node", {"limit_bytes": "40MiB", "retries": 0}) as running:
        for name in ("a", "b", "c", "d"):
            running.pull(origin.add(f"/{name}", noise(8 * MIB, seed=ord(name))))
            assert running.ready(name).status == 200
        running.ask("PUT", "/v1/models/d/pin")
        yield running, origin


def test_a_dry_run_tells_what_would_go_in_order_and_why_and_changes_nothing(
    served: tuple[Node, Origin],
) -> None:
    running, origin = served
    before = ready_names(running)
    told = running.ask("POST", "/v1/evictions?dry_run=true", {"bytes": "14MiB"}).document
    assert (told["dry_run"], told["enough"]) == (True, True)
    assert told["short_bytes"] == 14 * MIB - running.ask("GET", "/v1/capacity").document["available_bytes"]
    assert [e["frees_bytes"] // MIB for e in told["evictions"]] == [8]
    assert told["frees_bytes"] >= told["short_bytes"]
    assert "last used" in told["evictions"][0]["why"]
    assert [(p["names"], p["protected_by"]) for p in told["protected"]] == [(["d"], "pinned as d")]
    ref = origin.add("/e", noise(18 * MIB, seed=5))
    for_ref = running.ask("POST", "/v1/evictions?dry_run=true", {"ref": ref}).document
    assert 18 * MIB <= for_ref["need_bytes"] < 19 * MIB
    assert len(for_ref["evictions"]) == 2
    never = running.ask("POST", "/v1/evictions?dry_run=true", {"bytes": "39MiB"}).document
    assert (never["enough"], len(never["evictions"])) == (False, 3)
    assert_problem(running.ask("POST", "/v1/evictions", {"bytes": "39MiB"}), 507, "no_space")
    assert ready_names(running) == before
    assert running.ask("GET", "/v1/evictions").document == {"evictions": []}


@pytest.mark.parametrize("body", [{}, {"bytes": 1, "ref": "hf://o/m"}, {"bytes": -1}, {"bytes": "much"}])
def test_room_asked_for_without_sense_is_refused(served: tuple[Node, Origin], body: dict[str, Any]) -> None:
    assert_problem(served[0].ask("POST", "/v1/evictions", body), 422, "invalid_request")


def test_capacity_tells_each_snapshot_and_what_protects_it(served: tuple[Node, Origin]) -> None:
    running, _ = served
    told = running.ask("GET", "/v1/capacity").document
    assert told["limit_bytes"] == told["usable_bytes"] == 40 * MIB
    assert told["used_bytes"] == told["blob_bytes"] == on_disk(running.root / ".cachd/blobs")
    assert told["available_bytes"] == 40 * MIB - told["used_bytes"]
    assert told["in_use_reported_by"] == "kernel"
    protected = {s["names"][0]: s["protected_by"] for s in told["snapshots"]}
    assert protected == {"a": None, "b": None, "c": None, "d": "pinned as d"}
    assert all(s["last_used"] for s in told["snapshots"])
    assert running.metric("cachd_cache_size_bytes") == told["used_bytes"]
    assert running.metric("cachd_cache_limit_bytes") == 40 * MIB
    assert running.metric("cachd_available_bytes") == told["available_bytes"]


def test_a_lease_is_taken_renewed_and_released_over_the_api(served: tuple[Node, Origin]) -> None:
    running, _ = served
    taken = running.ask("POST", "/v1/models/a/leases", {"seconds": 60, "holder": "pod/x"})
    assert taken.status == 201
    where = taken.headers["location"]
    assert where == f"/v1/models/a/leases/{taken.document['id']}"
    assert [lease["holder"] for lease in running.ask("GET", "/v1/models/a").document["leases"]] == ["pod/x"]
    assert_problem(running.ask("DELETE", "/v1/models/a"), 409, "leased")
    assert running.metric("cachd_leases") == 1
    renewed = running.ask("PUT", where, {"seconds": 600})
    assert renewed.document["expires_at"] > taken.document["expires_at"]
    assert_problem(running.ask("PUT", where.replace("/a/", "/b/"), {"seconds": 1}), 404, "no_such_lease")
    assert running.ask("DELETE", where).status == 204
    assert running.ask("DELETE", where).status == 204
    assert_problem(running.ask("PUT", where, {"seconds": 1}), 404, "no_such_lease")
    assert running.ask("GET", "/v1/models/a").document["leases"] == []
    assert_problem(running.ask("POST", "/v1/models/none/leases", {"seconds": 1}), 404, "no_such_model")
    for seconds in (0, -1, 1e9, "long"):
        refused = running.ask("POST", "/v1/models/a/leases", {"seconds": seconds})
        assert_problem(refused, 422, "invalid_request")


def test_a_lease_outlives_a_killed_daemon_and_a_dead_holder_for_its_time_only(
    node: Nodes, origin: Origin
) -> None:
    running = node(limit_bytes="10MiB")
    running.pull(origin.add("/a", noise(8 * MIB)))
    assert running.ready("a").status == 200
    long = running.ask("POST", "/v1/models/a/leases", {"seconds": 600, "holder": "dead"}).document
    running.kill()
    running.start()
    assert [lease["holder"] for lease in running.ask("GET", "/v1/models/a").document["leases"]] == ["dead"]
    room = {"bytes": "9MiB"}
    assert_problem(running.ask("POST", "/v1/evictions", room), 507, "no_space")
    running.ask("PUT", f"/v1/models/a/leases/{long['id']}", {"seconds": 0.2})
    running.wait_for("lease expired", holder="dead")
    assert running.ask("POST", "/v1/evictions", room).document["freed_bytes"] >= 8 * MIB
    assert list((running.root / ".cachd/leases").iterdir()) == []


def test_the_command_line_shows_capacity_and_frees_space(served: tuple[Node, Origin]) -> None:
    """Last of those that share the daemon: it evicts."""
    running, _ = served
    text = running.cli("capacity").stdout
    assert "reported by kernel" in text
    assert any(re.fullmatch(r"d .* pinned as d *", line) for line in text.splitlines())
    assert json.loads(running.cli("capacity", "-o", "json").stdout)["limit_bytes"] == 40 * MIB
    for command in ("evict", "gc"):
        dry = running.cli(command, "20MiB", "--dry-run")
        assert dry.returncode == 0
        assert re.search(r"12\.6 MB short, 16\.8 MB would be freed: enough", dry.stdout)
        assert "last used" in dry.stdout
        assert "pinned as d" in dry.stdout
    refused = running.cli("evict", "39MiB")
    assert refused.returncode == 7
    assert "pinned as d" in refused.stderr
    done = json.loads(running.cli("evict", "14MiB", "-o", "json").stdout)
    assert 8 * MIB <= done["freed_bytes"] < 9 * MIB
    (gone,) = (e["names"][0] for e in done["evictions"])
    assert gone not in ready_names(running)
    assert gone in running.cli("evictions").stdout
    assert_problem(running.ask("GET", f"/v1/models/{gone}"), 404, "no_such_model")
    assert running.metric("cachd_evictions_total", reason="asked") == 1
