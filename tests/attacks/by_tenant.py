"""What another tenant tries, who may ask for pulls."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.attacks.target import (
    MIB,
    PATIENCE_SECONDS,
    PEAK_BYTES,
    ROLE_TOKENS,
    SERVED,
    TEAM_TOKEN,
    TOKEN,
    Target,
    attack,
)
from tests.ground.bucket import Bucket, Metadata
from tests.ground.models import noise
from tests.ground.node import Answer, Node
from tests.ground.origin import Hold, Reset, Trickle
from tests.ground.site import until


@attack("hub-folder")
def a_model_in_the_folder_of_a_repository(target: Target) -> None:
    evil = target.origin.add_model("evil", {"config.json": b'{"model_type": "evil"}'})
    for name in ("org--model", "Org--model"):
        target.pull(evil, name)
    taken = target.pull(evil, "attack-hub", hub_id="org/model")
    assert (taken.status, taken.document["code"]) == (409, "hub_id_taken")
    target.pull(evil, "attack--model")
    target.ended("attack--model")
    shown = (target.node.root / "hub").rglob("config.json")
    assert not any(path.read_bytes().endswith(b'"evil"}') for path in shown if "org--model" in str(path))
    target.delete("Org--model")


@attack("encoded-path")
def another_path_under_an_allowed_prefix(target: Target) -> None:
    asked: list[bytes] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = target.guarded.accept()
                with connection:
                    asked.append(connection.recv(65536))

    threading.Thread(target=serve, daemon=True).start()
    host, port = target.guarded.getsockname()
    for path in (
        "/secret/..%2fok/x",
        "/admin;a/%2e%2e/ok/x",
        "/ok/../secret",
        "/ok/%2e%2e/secret",
        "/okay/x",
    ):
        final = target.outcome(f"http://{host}:{port}{path}", "attack-path")
        assert final.status in (400, 403), (path, final)
    assert not asked
    target.pull(f"http://{host}:{port}/ok/x", "attack-path")
    until(lambda: asked)


@attack("taken-name")
def another_model_under_a_name_that_exists(target: Target) -> None:
    ref = target.origin.add("/evil", b"evil")
    for name in ("served", "org--model", "many"):
        answer = target.pull(ref, name)
        assert (answer.status, answer.document["code"]) == (409, "name_taken")


@attack("hostile-field")
def surrogates_commands_and_megabytes_in_every_field(target: Target) -> None:
    ref = target.origin.add("/fields", b"x")
    for text in ("\ud800", "a\x1b[2Jb", "x" * 900_000, "\u202etxt.exe", ""):
        for field, value in {"include": [text], "exclude": [text], "hub_id": text, "ref": text}.items():
            body = {"ref": ref, "name": "attack-fields", field: value}
            assert target.ask("POST", "/v1/models", body, token=TOKEN).status < 500
        lease = {"seconds": 60, "holder": text}
        assert target.ask("POST", f"/v1/models/{SERVED}/leases", lease, token=TOKEN).status < 500
    assert target.ask("GET", "/v1/models").status == 200
    assert target.node.cli("ls").stdout.replace("\n", "").isprintable()


@attack("branch-beside-branch")
def a_branch_beside_a_branch(target: Target) -> None:
    target.hub.add("org/model", {"config.json": b"{}"}, revision="main/x")
    answer = target.pull("hf://org/model@main%2Fx", "attack-branch")
    assert (answer.status, answer.document["code"]) == (409, "branch_taken")


@attack("claimed-digest")
def a_digest_of_a_model_that_is_here(target: Target) -> None:
    """An origin that lists the sha256 of a served file, and has other bytes, gets no model of them."""
    content = noise(6 * MIB, seed=6)
    target.origin.add_model("claims", {"x": content})
    target.origin.add("/claims/x", bytes(len(content)))
    target.pull(f"{target.origin.url}/claims/", "attack-claims")
    assert target.ended("attack-claims").status == 502


@attack("bad-supplier")
def a_file_of_a_healthy_origin_that_drips(target: Target) -> None:
    """An origin that lists the sha256 of a file of another one, and drips it, does not hold that one up."""
    content = noise(6 * MIB, seed=7)
    target.origin.fault("/drips/x", Trickle(2400))
    target.pull(target.origin.add_model("drips", {"x": content}), "attack-drips")
    until(lambda: target.origin.bytes_sent("/drips/x"))
    target.pull(target.origin.add_model("healthy", {"x": content}), "attack-healthy")
    assert target.ended("attack-healthy").status == 200
    assert target.ask("GET", "/v1/models/attack-drips/ready").status != 200
    target.delete("attack-drips")


@attack("two-sizes")
def another_size_for_the_digest_of_a_file(target: Target) -> None:
    """An origin that lists the sha256 of a healthy origin's file, and has a longer one, fails alone."""
    for first, then in (("longer", "exact"), ("exact", "longer")):
        content = noise(6 * MIB, seed=len(first) + 8)
        for name in ("longer", "exact"):
            target.origin.add_model(name, {"x": content})
        target.origin.add("/longer/x", content + b"x")
        hold = target.origin.hold(f"/{first}/x", after=MIB)
        target.pull(f"{target.origin.url}/{first}/", f"attack-{first}")
        assert hold.reached.wait(PATIENCE_SECONDS)
        target.pull(f"{target.origin.url}/{then}/", f"attack-{then}")
        assert target.ended(f"attack-{then}").status == (200 if then == "exact" else 502)
        hold.release()
        assert target.ended(f"attack-{first}").status == (200 if first == "exact" else 502)
        target.delete("attack-exact")
        target.delete("attack-longer")


# --- space ---


@contextmanager
def full(target: Target, name: str) -> Iterator[Node]:
    """Another daemon, with four models of 8 MiB and space for 8 MiB more. It evicts a first, and d last."""
    with target.another(name, limit_bytes="40MiB", retries=0) as node:
        for letter in "abcd":
            node.pull(target.origin.add(f"/{letter}", noise(8 * MIB, seed=ord(letter))))
            assert node.ready(letter).status == 200
        yield node


def begun(target: Target, node: Node, name: str, content: bytes, *, after: int) -> Hold:
    """A pull that stands still after some bytes."""
    ref = target.origin.add_model(name, {"f": content})
    hold = target.origin.hold(f"/{name}/f", after=after)
    assert node.pull(ref).status == 202
    assert hold.reached.wait(PATIENCE_SECONDS)
    return hold


def kept(node: Node) -> str:
    """Which of the models of one letter are ready."""
    models = node.ask("GET", "/v1/models").document["models"]
    return "".join(m["name"] for m in models if len(m["name"]) == 1 and m["state"] == "ready")


def code_of(node: Node, name: str) -> str | None:
    """The code of the error that a pull ended with."""
    code: str | None = node.wait_for("pull ended", name=name).get("code")
    return code


@attack("chosen-twice")
def two_pulls_for_the_same_models_and_a_pin(target: Target) -> None:
    with full(target, "chosen") as node:
        hold = begun(target, node, "first", noise(20 * MIB, 1), after=0)
        try:
            node.pull(target.origin.add("/second", noise(24 * MIB, 2)))
            assert code_of(node, "second") == "no_space"
            assert kept(node) == "abcd"
            assert node.ask("PUT", "/v1/models/a/pin").status == 204
        finally:
            hold.release()
        assert node.ready("first").status == 200
        assert kept(node) == "ad", "b and c went in the place of a"


@attack("partial-download")
def deleting_what_names_the_file_of_another_and_leaving_parts(target: Target) -> None:
    with full(target, "partial") as node:
        ingests, content = node.root / ".cachd/ingest", noise(7 * MIB, 3)
        target.origin.fault("/left/f", Reset(3 * MIB))
        node.pull(target.origin.add_model("left", {"f": content}))
        assert code_of(node, "left")
        left = [*ingests.iterdir()]
        hold = begun(target, node, "mine", content, after=0)
        try:
            assert node.ask("DELETE", "/v1/models/mine?force=true").status == 200
            assert [*ingests.iterdir()] == left
        finally:
            hold.release()
        assert len(left) == 1
        node.pull(target.origin.add("/e", noise(7 * MIB, 4)))
        assert node.ready("e").status == 200
        assert kept(node) == "abcde"
        assert not [*ingests.iterdir()]


# --- what is remembered ---


@attack("remembered-for-ever")
def models_that_never_come(target: Target) -> None:
    """Of 1,000 names is told, and of 16 MiB: fewer than 130 with the longest patterns there may be."""
    ref = "file:///nowhere/model"
    megabyte = [f"{'x' * 900}{number}" for number in range(1000)]
    assert target.pull(ref, "attack-long", include=megabyte).status in (400, 413, 422)
    names = [f"attack-name-{number}" for number in range(target.many(1100))]
    names += [f"attack-long-{number}" for number in range(140)]
    longest = [f"{'x' * 1000}{number:04}" for number in range(32)]

    def ask(name: str) -> None:
        target.pull(ref, name, include=longest if "long" in name else [])
        assert target.ended(name).status in (400, 403, 404)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, names))
    told = [target.ask("GET", f"/v1/models/{name}").status for name in names]
    assert told[-1] == 200
    assert told[0] == 404
    assert told.count(200) < 130


@attack("pinned-meanwhile")
def a_pull_of_another_revision_that_a_pin_meets(target: Target) -> None:
    first = target.hub.add("attack/pinned", {"f": b"one"})
    target.pull(f"hf://attack/pinned@{first}", "attack-pinned")
    assert target.ended("attack-pinned").status == 200
    second = target.hub.add("attack/pinned", {"f": b"two"})
    hold = target.hub.hold(f"/api/models/attack/pinned/revision/{second}", after=0)
    try:
        assert target.pull(f"hf://attack/pinned@{second}", "attack-pinned").status == 202
        assert hold.reached.wait(PATIENCE_SECONDS)
        assert target.ask("PUT", "/v1/models/attack-pinned/pin", token=TOKEN).status == 204
    finally:
        hold.release()
    target.node.wait_for("pull ended", name="attack-pinned", code="name_taken")
    assert target.ended("attack-pinned").document["revision"] == first
    assert (target.node.root / "models/attack-pinned/f").read_bytes() == b"one"


# --- the table of sources ---


@attack("look-alike")
def refused_prefixes_written_otherwise(target: Target) -> None:
    url = target.origin.url
    target.origin.add_model("secret", {"x": b"x"})
    for repository in ("good/model", "goodother/model", "good/secret"):
        target.hub.add(repository, {"config.json": b"{}"})
    entries = [
        {"prefix": f"{url}/", "allow": True},
        {"prefix": f"{url}/secret/", "refuse": True},
        {"prefix": "hf://", "allow": ["good/"]},
        {"prefix": "hf://good/secret", "refuse": True},
    ]
    paths = ("secret/x", "%73ecret/x", "/secret/x", "open%2F..%2Fsecret/x", "secret;a/x", "%2573ecret/x")
    refs = [f"{url}/{path}" for path in paths] + [url.replace("127.0.0.1", "127.1") + "/secret/x"]
    refs += ["hf://goodother/model", "hf://GOODOTHER/model", "hf://good/secret", "hf://Good/Secret"]
    with target.another("looks", sources=entries, allow=[]) as node:
        node.pull("hf://good/model", name="good")
        assert node.ready("good").status == 200
        asked = len(target.origin.requests), len(target.hub.requests)
        for number, ref in enumerate(refs):
            answer = node.pull(ref, name=f"alike-{number}")
            final = node.ready(f"alike-{number}") if answer.status == 202 else answer
            assert final.document.get("code") in ("source_refused", "ambiguous_path", "bad_ref"), (ref, final)
        assert (len(target.origin.requests), len(target.hub.requests)) == asked, "nobody was asked"


@attack("keys-of-the-machine")
def a_bucket_that_only_the_role_of_the_machine_reads(target: Target) -> None:
    with Bucket() as bucket, Metadata() as metadata:
        bucket.put("m/it", noise(1024))
        env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url, "HOME": str(target.share)}
        options = {"s3_endpoint_url": bucket.url, "retries": 0}
        for entries in ([], [{"prefix": "s3://models/"}]):
            with target.another("keyless", env, **options, sources=entries) as node:
                node.pull("s3://models/m/")
                assert node.ready("m").status != 200
            assert not metadata.requests
        may = [{"prefix": "s3://models/", "instance_role": True}]
        with target.another("role", env, **options, sources=may) as node:
            node.pull("s3://models/m/")
            assert node.ready("m").status == 200, "who may is given keys: it is the service of this machine"
        assert metadata.requests


# --- tokens ---

# What a token that may pull may ask.
NAMED_IN_BODY = (("POST", "/v1/models"), ("POST", "/v1/resolve"), ("POST", "/v1/preflight"))
MAY_WRITE = {"read": (), "lease": ("leases", "{lease}"), "pull": ("leases", "{lease}", "warm", "verify")}


def writes(target: Target) -> list[tuple[str, str]]:
    """Method and path of every call of the API that writes, and of a few that no route knows."""
    paths = target.ask("GET", "/openapi.json").document["paths"]
    calls = [(method.upper(), path) for path, said in paths.items() for method in said if method != "get"]
    assert len(calls) > 10
    return [*calls, ("DELETE", "/v1/models"), ("PATCH", "/v1/models/{name}"), ("POST", "/livez")]


def refused(answer: Answer, *codes: str) -> None:
    assert answer.status == (401 if "unauthorized" in codes else 403), answer
    assert answer.document["code"] in codes, answer


@attack("too-low-role")
def every_write_with_every_token_that_may_not(target: Target) -> None:
    for method, path in writes(target):
        called = path.format(name="org--model", lease="0")
        refused(target.ask(method, called, {}), "unauthorized")
        refused(target.ask(method, called, {}, token="nobody's"), "unauthorized")
        for role, token in ROLE_TOKENS.items():
            may_pull = role == "pull" and (method, path) in NAMED_IN_BODY
            if not may_pull and path.rpartition("/")[2] not in MAY_WRITE[role]:
                refused(target.ask(method, called, {}, token=token), "role_too_low")
    body = {"ref": target.origin.add("/low", b"low"), "name": "attack-low"}
    for field, value in {"pin": True, "replace": True, "hub_id": "org/model"}.items():
        answer = target.ask("POST", "/v1/models", {**body, field: value}, token=ROLE_TOKENS["pull"])
        refused(answer, "role_too_low")
    for path in ("options", "sources"):
        refused(target.ask("GET", f"/v1/{path}", token=ROLE_TOKENS["pull"]), "role_too_low")
    assert target.ask("GET", "/v1/models/org--model").document["pinned"]
    assert target.ask("GET", "/v1/models/attack-low").status == 404


@attack("foreign-namespace")
def models_of_others_with_the_token_of_a_team(target: Target) -> None:
    for method, path in writes(target):
        if (method, path) not in NAMED_IN_BODY:
            called = path.format(name="org--model", lease="0") + "?force=true"
            refused(target.ask(method, called, {}, token=TEAM_TOKEN), "outside_namespaces")
    evil = target.origin.add_model("evil", {"config.json": b'{"model_type": "evil"}'})
    own = "attack-team-x"
    for asked in (
        {"ref": evil},
        {"ref": evil, "name": SERVED},
        {"ref": "hf://org/model", "name": own},
        {"ref": "hf://Org/Model", "name": own},
    ):
        for method, path in NAMED_IN_BODY:
            refused(target.ask(method, path, asked, token=TEAM_TOKEN), "outside_namespaces")
    for body in (
        {"ref": evil, "name": SERVED, "replace": True},
        {"ref": evil, "name": own, "hub_id": "org/model"},
        {"ref": evil, "name": own, "hub_id": "attack-teams/model"},
    ):
        refused(target.ask("POST", "/v1/models", body, token=TEAM_TOKEN), "outside_namespaces")
    for path in ("attack-team-a%2f..%2fserved", "attack-team-a/../served", "attack-team-a%2f"):
        answer = target.ask("DELETE", f"/v1/models/{path}", token=TEAM_TOKEN)
        assert answer.status in (400, 403, 404, 405), (path, answer)
    mirror = {"ref": evil, "name": own, "hub_id": "attack-team/model"}
    assert target.ask("POST", "/v1/models", mirror, token=TEAM_TOKEN).status == 202
    assert target.ended(own).status == 200
    assert target.ask("DELETE", f"/v1/models/{own}", token=TEAM_TOKEN).status == 200


@attack("foreign-lease")
def the_lease_of_another_pod_by_what_is_shown_of_it(target: Target) -> None:
    path, body = f"/v1/models/{SERVED}/leases", {"seconds": 600, "holder": "pod/of-another"}
    lease = target.ask("POST", path, body, token=TOKEN).document["id"]
    try:
        places = ["/v1/models", f"/v1/models/{SERVED}", "/v1/capacity", "/v1/evictions", "/metrics"]
        places += [f"/v1/models/{SERVED}/files", "/v1/events?follow=false", "/"]
        shown = repr([target.ask("GET", place).document for place in places])
        files = [f for top in ("status", "ready") for f in (target.node.root / top).iterdir()]
        shown += "".join(file.read_text() for file in files) + target.node.output
        assert "pod/of-another" in shown
        assert lease not in shown
        guesses = {*re.findall(r"[0-9a-f-]{8,64}", shown), "0", "pod%2Fof-another", "%2e", lease[:-1], "*"}
        for guess in sorted(guesses)[: 40 if target.short else 400]:
            target.ask("DELETE", f"{path}/{guess}", token=ROLE_TOKENS["lease"])
        leases = target.ask("GET", f"/v1/models/{SERVED}").document["leases"]
        assert [each["holder"] for each in leases] == ["pod/of-another"]
    finally:
        assert target.ask("DELETE", f"{path}/{lease}", token=TOKEN).status == 204


def spoiled(file: Path) -> Iterator[str]:
    """Put one thing after the other where the tokens were."""
    beside = file.with_suffix(".new")
    for put in (
        lambda: os.mkfifo(beside),
        lambda: beside.symlink_to("/dev/zero"),
        lambda: (beside.touch(), os.truncate(beside, 8 << 30)),
        lambda: beside.write_bytes(b"tokens: [{name: \xff, token: " + TOKEN.encode()),
        lambda: beside.write_text(f"{TOKEN}\n- nobody's"),
        lambda: beside.write_text("a: &a [x,x]\nb: &b [*a,*a]\ntokens: [*b,*b]"),
        lambda: beside.write_text("[" * 200_000),
    ):
        put()
        beside.replace(file)
        yield str(put)


@attack("broken-tokens")
def what_is_no_list_of_tokens_in_its_place(target: Target) -> None:
    file = target.share.parent / "own-tokens"
    file.write_text(json.dumps({"tokens": [{"name": "ops", "role": "admin", "token": TOKEN}]}))
    with target.another("broken", token_file=str(file)) as node:

        def write(token: str) -> int:
            return node.ask("PUT", "/v1/models/m/pin", headers={"Authorization": f"Bearer {token}"}).status

        assert (write(TOKEN), write("nobody's")) == (404, 401)
        for _ in spoiled(file):
            assert (write(TOKEN), write("nobody's")) == (404, 401)
            assert node.metric("cachd_tokens_in_force") == 0
        said = node.wait_for("tokens not taken over: those that were in force before stay")
        assert said["kept"] == ["ops"]
        assert TOKEN not in node.output
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{node.pid}/status").read_text())
        assert peak
        assert int(peak[1]) << 10 < PEAK_BYTES
        file.write_text("another")
        assert (write(TOKEN), write("another")) == (401, 404)


@attack("unrecorded-write")
def deletions_that_somebody_hides(target: Target) -> None:
    target.pull(target.origin.add("/recorded", b"recorded"), "attack-recorded")
    assert target.ended("attack-recorded").status == 200
    unknown = target.node.metric("cachd_writes_total", role="anonymous", verdict="refused")
    path = "/v1/models/attack-recorded"
    assert target.ask("DELETE", path, token="nobody's").status == 401
    assert target.node.metric("cachd_writes_total", role="anonymous", verdict="refused") == unknown + 1
    claims = dict.fromkeys(("X-Forwarded-For", "X-Real-IP", "Forwarded"), "192.0.2.66")
    for who, token, status, verdict in (
        ("may-read", ROLE_TOKENS["read"], 403, "refused"),
        ("team", TEAM_TOKEN, 403, "refused"),
        ("operator", TOKEN, 200, "accepted"),
        ("operator", TOKEN, 404, "failed"),
    ):
        headers = {**claims, "X-Request-Id": f"{who}-{verdict}"}
        assert target.ask("DELETE", path, token=token, **headers).status == status
        line = target.node.wait_for("audit", request_id=f"{who}-{verdict}")
        said = {"who": who, "action": "delete", "model": "attack-recorded", "verdict": verdict}
        assert {**said, "status": status, "peer": "127.0.0.1"}.items() <= line.items(), line
        assert "192.0.2.66" not in repr(line)
    assert not [token for token in (TOKEN, TEAM_TOKEN, *ROLE_TOKENS.values()) if token in target.node.output]


# --- questions that wait ---


@attack("slow-dry-runs")
def dry_runs_for_an_origin_that_does_not_answer(target: Target) -> None:
    target.hub.add("attack/slow", {"config.json": b"{}"})
    hold = target.hub.hold("/api/models/attack/slow", after=0)
    path, body = "/v1/evictions?dry_run=true", {"ref": "hf://attack/slow"}
    with ThreadPoolExecutor(66) as threads:
        asking = [threads.submit(target.ask, "POST", path, body, token=TOKEN) for _ in range(66)]
        try:
            assert hold.reached.wait(PATIENCE_SECONDS)
            for _ in range(20):
                for read in (f"/v1/models/{SERVED}", "/v1/evictions", f"/v1/models/{SERVED}/ready"):
                    assert target.ask("GET", read).status == 200
            target.pull(target.origin.add("/beside", b"beside"), "attack-beside")
            assert target.ended("attack-beside").status == 200
        finally:
            hold.release()
        assert {each.result().status for each in asking} <= {200, 503}
