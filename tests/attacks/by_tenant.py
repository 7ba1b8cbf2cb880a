"""What another tenant tries, who may ask for pulls."""

from __future__ import annotations

import threading
from contextlib import suppress

from tests.attacks.target import SERVED, TOKEN, Target, attack
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
        answer = target.pull(f"http://{host}:{port}{path}", "attack-path")
        final = target.ended("attack-path") if answer.status == 202 else answer
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
