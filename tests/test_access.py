"""Who may ask the API for what, what is never said, and the document that describes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi.routing import APIRoute

from cachd.api.app import ROUTERS
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Flip, Origin, Status
from tests.ground.s3 import S3Server
from tests.ground.site import (
    Ground,
    assert_problem,
    said,
)

MIB = 1 << 20
PATIENCE_SECONDS = 120
Nodes = Callable[..., Node]


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


def writes(node: Node) -> list[tuple[str, str]]:
    """Every call of the API that changes something, on a model called `any`."""
    paths = node.ask("GET", "/openapi.json").document["paths"]
    calls = [(method.upper(), path.format(name="any", lease="0")) for path in paths for method in paths[path]]
    return [(method, path) for method, path in calls if method != "GET"]


def test_reads_are_open_and_writes_want_the_token(guarded: Ground) -> None:
    token_file(guarded).write_text(f"{TOKEN}\n")
    for path in (
        "/livez",
        "/readyz",
        "/metrics",
        "/v1/models",
        "/v1/capacity",
        "/v1/limits",
        "/openapi.json",
    ):
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
    assert len(writes(guarded.node)) > 10
    for method, path in writes(guarded.node):
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
    foreign = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil@127.0.0.1x", ""]
    malformed = ["http://localhost", "localhost/", "a@localhost", "localhost?x", "localhost:x", "//localhost"]
    for host in [*foreign, *malformed, "http://127.0.0.1", "[::1", "[localhost]", "127.0.0.1#"]:
        assert_problem(guarded.node.ask("GET", "/livez", headers={"Host": host}), 403, "foreign_host")


def test_a_request_from_a_page_of_another_site_is_refused(guarded: Ground) -> None:
    own = guarded.node.url
    assert guarded.node.ask("GET", "/livez", headers={"Origin": own}).status == 200
    port = urlsplit(own).port
    at_its_name = {"Host": f"cache.example:{port}", "Origin": f"http://cache.example:{port}"}
    assert guarded.node.ask("GET", "/livez", headers=at_its_name).status == 200
    by_localhost = {"Origin": f"http://localhost:{port}"}
    assert guarded.node.ask("GET", "/livez", headers=by_localhost).status == 200
    behind_tls = {"Host": "cache.example", "Origin": "https://cache.example"}
    assert guarded.node.ask("GET", "/livez", headers=behind_tls).status == 200
    others = ["https://evil.example", "null", "http://192.0.2.66", "http://[2001:db8::66]:8470", ""]
    neighbours = [
        "http://localhost:3000",
        "http://localhost",
        "http://127.0.0.1:3000",
        f"file://localhost:{port}",
    ]
    neighbours += ["http://cache.example:3000", "http://localhost:99999", f"http://:{port}"]
    for site in (*others, *neighbours):
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
    root = str(ground.node.root)
    second = ground.node.cli("serve", "--no-wait", "--root", root, "--listen", "127.0.0.1:0")
    assert second.returncode == 9
    assert "code: root_locked" in second.stderr
    assert f"pid {ground.node.pid}" in second.stderr
    assert ground.node.ask("GET", "/livez").status == 200


def test_an_address_that_is_taken_is_told(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir(mode=0o755)
    address = urlsplit(ground.node.url).netloc
    second = ground.node.cli("serve", "--root", str(tmp_path / "root"), "--listen", address)
    assert second.returncode == 9
    assert f"cannot listen on {address}" in second.stderr
    assert "code: cannot_listen" in second.stderr
    assert "Traceback" not in second.stderr


# --- what it says of itself ---


def test_the_openapi_document_holds_every_call(ground: Ground) -> None:
    document = ground.node.ask("GET", "/openapi.json").document
    calls = {(method.upper(), path) for path, calls in document["paths"].items() for method in calls}
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    shown = {(m, route.path) for route in routes if route.include_in_schema for m in route.methods or ()}
    assert calls == shown
    assert {route.name for route in routes if not route.include_in_schema} == {
        "openapi",
        "page",
        "docs",
        "asset",
    }
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            assert call["description"], f"{method} {path} says what it does"
            assert "application/problem+json" in call["responses"]["4XX"]["content"]
    body = document["components"]["schemas"]["Asked"]["properties"]
    assert set(body) == {
        "ref",
        "name",
        "include",
        "exclude",
        "weights",
        "copy",
        "formats",
        "layout",
        "hub_id",
        "pin",
        "priority",
        "refresh",
        "replace",
    }
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
        "hf://org/damaged": 502,
        "hf://org/expired": 403,
        "hf://org/absent": 404,
        "s3://secrets/model/": 200,
        "s3://secrets/absent/": 404,
        "s3://no-such-bucket/model/": 404,
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
