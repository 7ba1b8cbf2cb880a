"""What the API refuses, and how it says so; a full disk among it. The daemon goes on."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.ground.disks import fill
from tests.ground.models import noise
from tests.ground.needs import require
from tests.ground.node import Node
from tests.ground.origin import Origin, Status
from tests.ground.site import (
    Ground,
    assert_problem,
    names,
    received,
    said,
)

MIB = 1 << 20
PATIENCE_SECONDS = 120
Nodes = Callable[..., Node]


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
    "a scheme of another tool": ({"ref": "gs://bucket/model"}, 400, "unknown_scheme"),
    "a path of the node": ({"ref": "/models/llama"}, 400, "unknown_scheme"),
    "a model with no owner": ({"ref": "gpt2"}, 400, "bad_ref"),
    "a space of the Hub": ({"ref": "hf://spaces/a/b"}, 400, "bad_ref"),
    "a path in a ref that climbs": ({"ref": "hf://a/b/../c"}, 400, "bad_ref"),
    "a path in a ref that climbs in disguise": (
        {"ref": "https://huggingface.co/a/b/blob/main/%2e%2e/c"},
        400,
        "bad_ref",
    ),
    "a path in a ref and include": ({"ref": "hf://a/b/c", "include": ["d"]}, 400, "bad_ref"),
    "a repo with --": ({"ref": "hf://a--b/c"}, 400, "bad_ref"),
    "a repo that ends in .git": ({"ref": "hf://a/b.git"}, 400, "bad_ref"),
    "a revision that climbs": ({"ref": "hf://a/b@../main"}, 400, "bad_revision"),
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
    ("GET", "/index.html"): (404, "no_such_path"),
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
        assert_problem(answer, 403, code)
        assert answer.document["error"]["error_class"] == "Forbidden", ref
    assert running.ask("GET", "/livez").status == 200


def test_a_link_on_a_share_does_not_lead_out_of_what_is_allowed(tmp_path: Path, node: Nodes) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "shadow").symlink_to("/etc/shadow")
    running = node(allow=[f"file://{share}/"])
    running.pull(f"file://{share}/shadow")
    assert_problem(running.ready("shadow"), 403, "path_refused")


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
        assert_problem(answer, 404 if "absent" in ref and "@" in ref else 403, answer.document["code"])
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
    require("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=0755", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_model_that_does_not_fit_is_refused_before_its_first_byte(
    small_disk: Path, origin: Origin, node: Nodes
) -> None:
    refs = {size: origin.add(f"/{size}.bin", noise(size * MIB)) for size in (40, 41, 70)}
    running = node(root="disk")
    running.pull(refs[70])
    big = running.ready("70.bin")
    assert_problem(big, 413, "too_big")
    assert big.document["error"]["need"] == 70 * MIB
    assert big.document["error"]["error_class"] == "TooBig"
    running.pull(refs[40], pin=True)
    assert running.ready("40.bin").status == 200
    running.pull(refs[41])
    none = running.ready("41.bin")
    assert_problem(none, 503, "no_space")
    assert none.document["error"]["free"] < none.document["error"]["need"] == 41 * MIB
    assert "cachd rm" in none.document["hint"]
    assert origin.bytes_sent() == 40 * MIB
    assert running.ask("DELETE", "/v1/models/40.bin?force=true").status == 200
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
    running.pull(f"{origin.url}/kept.bin", pin=True)
    assert running.ready("kept.bin").status == 200
    hold = origin.hold("/pulled.bin", after=MIB)
    running.pull(f"{origin.url}/pulled.bin")
    assert hold.reached.wait(PATIENCE_SECONDS)
    running.kill()
    hold.release()
    fill(small_disk)
    running.start()
    assert running.ready("kept.bin", wait=0).status == 200
    answer = running.ask("DELETE", "/v1/models/kept.bin?force=true")
    assert answer.status == 200, "an operator can make room"
