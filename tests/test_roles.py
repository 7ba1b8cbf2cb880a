"""Roles: each call of the API, with each kind of caller, does what the written table says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cachd.api.access import RULES, check_complete
from cachd.policy.roles import Grant, Namespaces, Role
from tests.ground.hub import Hub
from tests.ground.node import Answer, Node
from tests.ground.origin import Origin
from tests.ground.site import assert_problem, said, until

ROLES = [role.name for role in Role]
OPEN = "open"
# The table, written a second time: a change of the code's must be meant.
NEEDS = {
    ("GET", "/livez"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("GET", "/v1/models/{name}/ready"): OPEN,
    ("GET", "/metrics"): "read",
    ("GET", "/v1/models"): "read",
    ("GET", "/v1/models/{name}"): "read",
    ("GET", "/v1/models/{name}/files"): "read",
    ("GET", "/v1/capacity"): "read",
    ("GET", "/v1/evictions"): "read",
    ("GET", "/v1/events"): "read",
    ("GET", "/v1/limits"): "read",
    ("GET", "/v1/scrubs"): "read",
    ("GET", "/v1/options"): "admin",
    ("GET", "/v1/sources"): "admin",
    ("POST", "/v1/models/{name}/leases"): "lease",
    ("PUT", "/v1/models/{name}/leases/{lease}"): "lease",
    ("DELETE", "/v1/models/{name}/leases/{lease}"): "lease",
    ("POST", "/v1/models"): "pull",
    ("POST", "/v1/resolve"): "pull",
    ("POST", "/v1/preflight"): "pull",
    ("POST", "/v1/models/{name}/warm"): "pull",
    ("POST", "/v1/models/{name}/verify"): "pull",
    ("GET", "/v1/models/{name}/preflight"): "pull",
    ("DELETE", "/v1/models/{name}/pull"): "admin",
    ("PUT", "/v1/models/{name}/pin"): "admin",
    ("DELETE", "/v1/models/{name}/pin"): "admin",
    ("POST", "/v1/models/{name}/rollback"): "admin",
    ("DELETE", "/v1/models/{name}"): "admin",
    ("PUT", "/v1/limits"): "admin",
    ("POST", "/v1/evictions"): "admin",
    ("POST", "/v1/sweeps"): "admin",
}
OF_THE_NODE = {
    ("GET", "/v1/options"),
    ("GET", "/v1/sources"),
    ("PUT", "/v1/limits"),
    ("POST", "/v1/evictions"),
    ("POST", "/v1/sweeps"),
}
WRITES = [call for call in NEEDS if call[0] != "GET"]
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/models"): {"ref": "https://10.0.0.1/it", "name": "any"},
    ("POST", "/v1/resolve"): {"ref": "hf://org/model", "name": "any", "seconds": 1},
    ("POST", "/v1/preflight"): {"ref": "hf://org/model", "name": "any", "seconds": 1},
    ("POST", "/v1/models/{name}/leases"): {"seconds": 1},
    ("PUT", "/v1/models/{name}/leases/{lease}"): {"seconds": 1},
    ("PUT", "/v1/limits"): {},
    ("POST", "/v1/evictions"): {"bytes": 1},
    ("POST", "/v1/sweeps"): {"dry_run": True},
}


def token_of(name: str) -> str:
    return f"canary-token-of-{name}"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_of(name)}"}


def listed(name: str, role: str, *namespaces: str) -> dict[str, Any]:
    limits = {"namespaces": list(namespaces)} if namespaces else {}
    return {"name": name, "role": role, "token": token_of(name), **limits}


TOKENS = [
    *(listed(role, role) for role in ROLES),
    listed("team-pull", "pull", "team-*", "hf://team/"),
    listed("team-admin", "admin", "team-*", "elsewhere-?"),
]
NOWHERE = {
    "allow": [],
    "hf_endpoint": "http://127.0.0.1:1",
    "s3_endpoint_url": "http://127.0.0.1:1",
    "retries": 0,
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Node]]:
    """Two daemons with the same tokens: one whose reads are open to everybody, and one whose are not."""
    place = tmp_path_factory.mktemp("roles")
    (place / "tokens").write_text(json.dumps({"tokens": TOKENS}))
    with ExitStack() as stack:
        yield {
            are_open: stack.enter_context(
                Node(
                    place / f"node-{are_open}",
                    {"token_file": str(place / "tokens"), "anonymous_reads": are_open, **NOWHERE},
                )
            )
            for are_open in (True, False)
        }


@pytest.fixture
def node(nodes: dict[bool, Node]) -> Node:
    return nodes[True]


def asked(node: Node, call: tuple[str, str], headers: dict[str, str], name: str = "any") -> Answer:
    method, path = call
    body = BODIES.get(call)
    body = {**body, "name": name} if body and "name" in body else body
    page = {"Accept": "application/json"}  # a stream would have no end
    return node.ask(method, path.format(name=name, lease="0"), body, headers={**page, **headers})


@pytest.mark.parametrize("are_open", [True, False], ids=["reads open", "reads closed"])
def test_the_table_has_every_route_and_no_other(nodes: dict[bool, Node], are_open: bool) -> None:
    document = nodes[are_open].ask("GET", "/openapi.json", headers=bearer("read")).document
    calls = {(method.upper(), path) for path, calls in document["paths"].items() for method in calls}
    assert calls == set(NEEDS), "give a new route its row here and in cachd/api/access.py"
    told = {call: document["paths"][call[1]][call[0].lower()].get("x-role", OPEN) for call in calls}
    assert told == NEEDS


@pytest.mark.parametrize("are_open", [True, False], ids=["reads open", "reads closed"])
@pytest.mark.parametrize("call", NEEDS, ids=" ".join)
def test_each_call_is_answered_to_its_roles_and_to_no_others(
    nodes: dict[bool, Node], call: tuple[str, str], are_open: bool
) -> None:
    """Promised: A token changes what its role and its namespaces cover, and nothing else."""
    node, needed = nodes[are_open], NEEDS[call]
    is_open = needed == OPEN or (needed == "read" and are_open)
    for headers in ({}, bearer("nobody"), bearer(""), {"Authorization": "Bearer"}):
        answer = asked(node, call, headers)
        if is_open:
            assert answer.status not in (401, 403), (headers, answer)
        else:
            assert_problem(answer, 401, "unauthorized")
            assert said(answer, "WWW-Authenticate").startswith("Bearer")
    for role in ROLES:
        answer = asked(node, call, bearer(role))
        if is_open or ROLES.index(role) >= ROLES.index(needed):
            assert answer.status not in (401, 403), (role, answer)
        else:
            assert_problem(answer, 403, "role_too_low")
            assert (answer.document["role_needed"], answer.document["role"]) == (needed, role)


@pytest.mark.parametrize("call", [call for call in WRITES if "{name}" in call[1]], ids=" ".join)
def test_a_token_with_namespaces_changes_models_of_these_names_alone(
    node: Node, call: tuple[str, str]
) -> None:
    """Promised: A token changes what its role and its namespaces cover, and nothing else."""
    for name in ("team-a", "team-", "elsewhere-1"):
        assert asked(node, call, bearer("team-admin"), name).status not in (401, 403), name
    for name in ("any", "team", "Team-a", "elsewhere-11", "xteam-a", "team%2da2%2f..%2fany"):
        answer = asked(node, call, bearer("team-admin"), name)
        assert answer.status in (403, 404, 405), name
        if "%" not in name:
            assert_problem(answer, 403, "outside_namespaces")


@pytest.mark.parametrize("call", sorted(OF_THE_NODE), ids=" ".join)
def test_a_token_with_namespaces_changes_nothing_of_the_whole_node(node: Node, call: tuple[str, str]) -> None:
    assert_problem(asked(node, call, bearer("team-admin")), 403, "outside_namespaces")


def pulled(node: Node, token: str, ref: str, **asked: Any) -> Answer:
    return node.ask("POST", "/v1/models", {"ref": ref, **asked}, headers=bearer(token))


def test_a_pull_is_refused_outside_the_namespaces_under_its_default_name_too(node: Node) -> None:
    for ref, name in (
        ("https://10.0.0.1/it", "any"),
        ("https://10.0.0.1/it", None),
        ("s3://bucket/a/", None),
    ):
        assert_problem(pulled(node, "team-pull", ref, name=name), 403, "outside_namespaces")
    assert pulled(node, "team-pull", "https://10.0.0.1/it", name="team-x").status == 202
    assert pulled(node, "team-pull", "s3://team-bucket/a/").status == 202, "named team-bucket--a"


def test_a_pull_of_the_hub_needs_its_folder_among_the_namespaces_too(node: Node) -> None:
    """Else a token for team-* would move hub/models--Qwen--m/refs/main for the pods of every team."""
    answer = pulled(node, "team-pull", "hf://Qwen/m", name="team-q")
    assert_problem(answer, 403, "outside_namespaces")
    assert "hf://Qwen/" in answer.document["hint"]
    assert pulled(node, "team-pull", "hf://team/m", name="team-q").status == 202
    assert pulled(node, "team-pull", "hf://datasets/team/d", name="team-d").status == 202
    assert_problem(pulled(node, "team-pull", "hf://teams/m", name="team-r"), 403, "outside_namespaces")


def test_a_name_of_ones_own_that_shows_in_a_foreign_folder_of_the_hub_is_not_ones_own(tmp_path: Path) -> None:
    """What an operator pulled from Qwen under a team's name stands in Qwen's folder, for all pods."""
    (tmp_path / "tokens").write_text(json.dumps({"tokens": TOKENS}))
    with (
        Hub() as hub,
        Node(
            tmp_path / "node", NOWHERE | {"token_file": str(tmp_path / "tokens"), "hf_endpoint": hub.url}
        ) as node,
    ):
        hub.add("Qwen/m", {"config.json": b"{}"})
        hub.add("team/m", {"config.json": b"[]"})
        assert pulled(node, "admin", "hf://Qwen/m", name="team-q").status == 202
        assert node.ready("team-q").status == 200
        refused = [
            node.ask("DELETE", "/v1/models/team-q?force=true", headers=bearer("team-admin")),
            pulled(node, "team-admin", "hf://team/m", name="team-q", replace=True),
        ]
        assert pulled(node, "admin", "hf://team/m", name="team-q", replace=True).status == 202
        until(lambda: node.ready("team-q").document["ref"] == "hf://team/m")
        rollback = ("POST", "/v1/models/team-q/rollback")
        refused.append(node.ask(*rollback, headers=bearer("team-admin")))
        for answer in refused:
            assert_problem(answer, 403, "outside_namespaces")
            assert "models--Qwen--m" in answer.document["detail"]
        assert node.ask(*rollback, headers=bearer("admin")).status == 200
        assert node.ready("team-q").document["ref"] == "hf://Qwen/m"


def test_a_pull_that_pins_or_replaces_needs_the_role_that_may(node: Node) -> None:
    for field in ("pin", "replace"):
        answer = pulled(node, "pull", "https://10.0.0.1/it", name="any", **{field: True})
        assert_problem(answer, 403, "role_too_low")
        assert answer.document["role_needed"] == "admin"
        answer = pulled(node, "team-admin", "https://10.0.0.1/it", name="any", **{field: True})
        assert_problem(answer, 403, "outside_namespaces")
        answer = pulled(node, "team-admin", "https://10.0.0.1/it", name="team-y", **{field: True})
        assert answer.status == 202


def test_a_mirror_of_a_repository_needs_an_admin_whose_namespaces_cover_that_repository(node: Node) -> None:
    """Pods load the mirror by the repository's name, whatever the name of the model."""
    mirror = "https://10.0.0.1/it"
    for token in ("pull", "team-pull"):
        answer = pulled(node, token, mirror, name="team-m", hub_id="team/m")
        assert_problem(answer, 403, "role_too_low")
        assert answer.document["role_needed"] == "admin"
    answer = pulled(node, "team-admin", mirror, name="team-m", hub_id="Qwen/m")
    assert_problem(answer, 403, "outside_namespaces")
    assert "models--Qwen--m" in answer.document["detail"]
    assert pulled(node, "team-admin", mirror, name="team-m", hub_id="team-a/m").status == 202
    assert pulled(node, "admin", mirror, name="mirror", hub_id="Qwen/m").status == 202


def test_a_mirror_that_stands_in_a_foreign_folder_of_the_hub_is_not_ones_own(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(json.dumps({"tokens": TOKENS}))
    options = {"token_file": str(tmp_path / "tokens")}
    with Origin() as origin, Node(tmp_path / "node", options) as node:
        mirror = origin.add("/it", b"x" * 1000)
        assert pulled(node, "admin", mirror, name="team-m", hub_id="Qwen/m").status == 202
        assert node.ready("team-m").status == 200
        for answer in (
            node.ask("DELETE", "/v1/models/team-m?force=true", headers=bearer("team-admin")),
            pulled(node, "team-admin", mirror, name="team-m", replace=True),
        ):
            assert_problem(answer, 403, "outside_namespaces")
        assert node.ready("team-m").status == 200


def test_a_refusal_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(json.dumps({"tokens": TOKENS}))
    options = {"token_file": str(tmp_path / "tokens")}
    with Origin() as origin, Node(tmp_path / "node", options) as node:
        ref = origin.add("/it", b"x" * 1000)
        assert pulled(node, "pull", ref, name="any").status == 202
        assert node.ready("any").status == 200
        node.wait_for("pull ended", name="any")  # a model is ready a moment earlier
        before = node.ask("GET", "/v1/models/any").document
        assert before["state"] == "ready"
        for call in WRITES:
            for headers in ({}, bearer("nobody"), bearer("read")):
                assert asked(node, call, headers).status in (401, 403)
        for name in ("lease", "pull"):
            for call in WRITES:
                if NEEDS[call] == "admin":
                    assert asked(node, call, bearer(name)).status == 403
        for field in ("pin", "replace"):
            assert pulled(node, "pull", ref, name="any", **{field: True}).status == 403
        after = node.ask("GET", "/v1/models/any").document
        assert {k: v for k, v in after.items() if k != "last_used"} == {
            k: v for k, v in before.items() if k != "last_used"
        }


def test_a_call_that_no_route_knows_may_write_nothing_and_is_told_to_whoever_may_all(node: Node) -> None:
    for call in (("DELETE", "/v1/models"), ("POST", "/v1/models/"), ("POST", "/livez"), ("PATCH", "/x")):
        assert_problem(asked(node, call, {}), 401, "unauthorized")
        assert_problem(asked(node, call, bearer("pull")), 403, "role_too_low")
        assert asked(node, call, bearer("admin")).status in (307, 404, 405)
    for call in (("GET", "/nowhere"), ("OPTIONS", "/v1/models")):
        assert asked(node, call, {}).status in (404, 405)


class Route:
    """A route as the application has it."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_a_daemon_with_a_route_that_no_rule_names_does_not_start() -> None:
    check_complete(map(Route, RULES))
    for wrong in ([*RULES, "forgotten"], list(RULES)[1:]):
        with pytest.raises(RuntimeError, match=r"access\.py"):
            check_complete(map(Route, wrong))


def test_each_role_includes_those_before_it() -> None:
    assert ROLES == ["read", "lease", "pull", "admin"]
    assert Role.read < Role.lease < Role.pull < Role.admin
    Grant("it", Role.pull).check_role(Role.lease)


@pytest.mark.parametrize("wrong", [[], [""], ["a b"], ["http://x/"], ["hf://"], ["[a]"], ["team/*"], ["*\n"]])
def test_a_pattern_that_covers_no_name_is_refused(wrong: list[str]) -> None:
    with pytest.raises(ValueError, match="write patterns"):
        Namespaces.parse(wrong)


def test_namespaces_cover_names_and_folders_of_the_hub() -> None:
    names = Namespaces.parse(["team-*", "exact"])
    assert names.covers("team-a")
    assert names.covers("exact")
    assert not names.covers("exactly")
    assert not names.covers_repository("Qwen/m")
    assert Namespaces.parse(["Qwen--*"]).covers_repository("Qwen/m")
    hub = Namespaces.parse(["hf://Qwen/", "hf://org/model-?"])
    assert hub.covers_repository("Qwen/m")
    assert hub.covers_repository("org/model-1")
    assert not hub.covers_repository("org/model-12")
    assert not hub.covers_repository("Qwen2/m")
    assert not hub.covers("Qwen--m")
    assert not hub.covers("hf://Qwen/m")
    assert hub.covers_repository("datasets/Qwen/d"), "an organisation has repositories of every kind"
    assert hub.covers_repository("kernels/Qwen/k")
    assert not hub.covers_repository("datasets/Qwen2/d")
    assert not hub.covers_repository("datasets/org/model-1"), "a model is no data set"
    assert Namespaces.parse(["hf://datasets/"]).covers_repository("datasets/Qwen/d")
    assert not Namespaces.parse(["hf://datasets/"]).covers_repository("Qwen/m")
    assert Namespaces().are_all
    assert not hub.are_all
