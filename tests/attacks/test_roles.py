"""Whoever asks the API learns and does what their role covers, and every attempt to write is on record."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from cachd.errors import Forbidden
from cachd.model import Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.cancel import CancelToken
from cachd.sources.shared_volume import SharedVolumeSource
from tests.ground.node import Node
from tests.ground.origin import Origin, Redirect
from tests.ground.site import assert_problem, until

Nodes = Callable[..., Node]
CANARY = "canary-admin-5b1d"
LEASE = "canary-lease-77aa"
TOKENS = [
    {"name": "ops", "role": "admin", "token": CANARY},
    {"name": "pod", "role": "lease", "token": LEASE},
]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "tokens").write_text(json.dumps({"tokens": TOKENS}))
    return {"token_file": str(tmp_path / "tokens")}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    place = tmp_path_factory.mktemp("guarded")
    (place / "tokens").write_text(json.dumps({"tokens": TOKENS}))
    with Node(place / "node", {"token_file": str(place / "tokens"), "allow": []}) as node:
        yield node


def audits(node: Node) -> list[dict[str, Any]]:
    return [entry for entry in node.log if entry.get("event") == "audit"]


# --- tokens where none belongs ---


def test_a_token_in_the_query_a_cookie_or_the_body_opens_nothing(guarded: Node) -> None:
    for key in ("token", "access_token", "authorization", "Authorization", "api_key"):
        for path in (f"/v1/models/any/pin?{key}={CANARY}", f"/v1/models/any/pin?{key}=Bearer%20{CANARY}"):
            assert_problem(guarded.ask("PUT", path), 401, "unauthorized")
        assert_problem(guarded.ask("POST", "/v1/sweeps", {key: CANARY}), 401, "unauthorized")
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = guarded.ask("POST", "/v1/sweeps", f"{key}={CANARY}".encode(), headers=form)
        assert_problem(answer, 401, "unauthorized")
    for name in ("Cookie", "X-Auth-Token", "Proxy-Authorization", "X-Forwarded-Authorization"):
        for value in (f"Bearer {CANARY}", f"token={CANARY}", f"Authorization=Bearer {CANARY}"):
            assert_problem(
                guarded.ask("PUT", "/v1/models/any/pin", headers={name: value}), 401, "unauthorized"
            )
    guarded.ask("GET", f"/v1/nowhere?token={CANARY}")
    assert CANARY not in guarded.output


def sent(node: Node, *lines: bytes) -> bytes:
    """The answer to a write with these header lines."""
    url = urlsplit(node.url)
    with socket.create_connection((url.hostname or "", url.port or 0), timeout=60) as connection:
        head = [b"PUT /v1/models/any/pin HTTP/1.1", b"Connection: close", b"Content-Length: 0", *lines]
        connection.sendall(b"\r\n".join(head) + b"\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return str(json.loads(answer.read())["code"]).encode()


def test_of_several_authorization_headers_none_counts(guarded: Node) -> None:
    good, bad = f"Authorization: Bearer {CANARY}".encode(), b"Authorization: Bearer x"
    assert sent(guarded, b"Host: localhost", good) == b"no_such_model"
    for lines in ((good, bad), (bad, good), (good, good), (good, b"authorization: Basic eA==")):
        assert sent(guarded, b"Host: localhost", *lines) == b"unauthorized"
    joined = f"Authorization: Bearer x, Bearer {CANARY}".encode()
    assert sent(guarded, b"Host: localhost", joined) == b"unauthorized"


@pytest.mark.parametrize(
    "value",
    [
        b"Bearer",
        b"Bearer ",
        b"bearer\t" + CANARY.encode(),
        b"Bearer \xff\xfe",
        b"Bearer caf\xc3\xa9",
        b"Bearer " + b"x" * 30_000,
        b"Bearer " + CANARY.encode() + b"\xa0",
        b"Bearer=" + CANARY.encode(),
    ],
)
def test_an_odd_authorization_header_opens_nothing_and_breaks_nothing(guarded: Node, value: bytes) -> None:
    assert sent(guarded, b"Host: localhost", b"Authorization: " + value) == b"unauthorized"


def test_a_request_with_several_hosts_is_refused(guarded: Node) -> None:
    """A name that was rebound must not pass beside an address."""
    good = f"Authorization: Bearer {CANARY}".encode()
    for hosts in ((b"Host: localhost", b"Host: evil.example"), (b"Host: evil.example", b"Host: localhost")):
        assert sent(guarded, *hosts, good) in (b"foreign_host", b"invalid_request")


# --- what a reader learns ---


def told_of(node: Node, name: str) -> str:
    """All that who has no token, or only the mount, is told of a model and the node."""
    node.wait_for("pull ended", name=name)
    status = node.root / "status" / f"{name}.json"
    until(lambda: json.loads(status.read_text())["state"] == "failed")
    paths = ("", f"/{name}", f"/{name}/ready")
    answers = [node.ask("GET", f"/v1/models{path}").document for path in paths]
    answers += [
        node.ask("GET", f"/{path}").document for path in ("metrics", "readyz?set=required", "v1/options")
    ]
    return status.read_text() + "".join(map(repr, answers))


def pulled(node: Node, ref: str, name: str) -> None:
    answer = node.ask("POST", "/v1/models", {"ref": ref, "name": name}, headers=bearer(CANARY))
    assert answer.status == 202, answer


def test_a_refusal_does_not_tell_which_address_a_private_name_has(
    node: Nodes, tokens: dict[str, Any]
) -> None:
    """Promised: A refusal does not show a reader which address a private name has."""
    running = node(allow=[], **tokens)
    pulled(running, "https://localhost:1/it", "it")
    told = told_of(running, "it")
    assert "private_address" in told
    for address in ("127.0.0.1", "::1", "127.0.0.0"):
        assert address not in told.replace(running.url, "")
    ended = running.wait_for("pull ended", name="it")
    assert ended["withheld"]["address"] in ("127.0.0.1", "::1"), "the operator finds it in the log"
    asked = {"ref": "https://localhost:1/it"}
    answer = running.ask("POST", "/v1/evictions?dry_run=true", asked, headers=bearer(CANARY))
    assert_problem(answer, 403, "private_address")
    assert "127.0.0.1" not in repr(answer.document)
    assert running.wait_for("request refused")["withheld"]["address"] in ("127.0.0.1", "::1")


def test_a_redirect_does_not_tell_which_address_a_private_name_has(
    node: Nodes, tokens: dict[str, Any]
) -> None:
    with Origin() as origin:
        url = origin.add("/it", b"x" * 100)
        origin.fault("/it", Redirect("https://localhost:1/other?X-Amz-Signature=canary-signed"))
        running = node(**tokens | {"allow": [f"{origin.url}/"]})
        pulled(running, url, "it")
        shown = urlsplit(origin.url).netloc  # the ref has it
        told = told_of(running, "it").replace(shown, "").replace(running.url, "")
        assert "private_address" in told
        assert "127.0.0.1" not in told
        assert "canary-signed" not in told + running.output


def test_a_failure_tells_neither_the_proxy_nor_where_secrets_are(
    node: Nodes, tokens: dict[str, Any], tmp_path: Path
) -> None:
    running = node(allow=[], proxy="http://127.0.0.1:1", retries=0, **tokens)
    pulled(running, "https://192.0.2.1.example.invalid/it", "by-proxy")
    assert "proxy_unreachable" in (told := told_of(running, "by-proxy"))
    assert "127.0.0.1:1'" not in told
    assert running.wait_for("pull ended", name="by-proxy")["withheld"]["proxy"] == "http://127.0.0.1:1"
    secret = str(tmp_path / "absent-hub-token")
    running.stop()
    running.configure(**running.options | {"hf_token_file": secret, "proxy": None})
    running.start()
    pulled(running, "hf://org/model", "no-secret")
    assert "bad_secret" in (told := told_of(running, "no-secret"))
    assert secret not in told
    assert running.wait_for("pull ended", name="no-secret")["withheld"]["secret"] == secret


def test_a_link_on_a_share_tells_neither_where_it_leads_nor_what_is_there(
    node: Nodes, tokens: dict[str, Any], tmp_path: Path
) -> None:
    share, outside = tmp_path / "share", tmp_path / "outside"
    share.mkdir()
    outside.mkdir()
    (outside / "here").write_text("x")
    (outside / "closed").mkdir(mode=0)
    targets = {"here": "here", "absent": "absent", "below": "absent/below", "closed": "closed/x", "dir": "."}
    for name, target in targets.items():
        (share / name).symlink_to(outside / target)
    running = node(allow=[f"file://{share}/"], **tokens)
    told = {}
    for name in targets:
        pulled(running, f"file://{share}/{name}", name)
        told[name] = told_of(running, name)
        assert str(outside) not in told[name]
        assert running.wait_for("pull ended", name=name)["code"] == "path_refused", name
    details = {running.wait_for("pull ended", name=n)["detail"].replace(f"/{n} ", "/NAME ") for n in targets}
    assert len(details) == 1
    os.chmod(outside / "closed", 0o700)


@pytest.mark.parametrize("name", ["x", "SHA256SUMS"])
def test_a_link_in_a_directory_of_a_share_tells_nothing_either(tmp_path: Path, name: str) -> None:
    share, outside = tmp_path / "share", tmp_path / "outside"
    share.mkdir()
    outside.mkdir()
    (outside / "here").write_text("x")
    source = SharedVolumeSource(AddressPolicy([f"file://{share}/"]), stall_seconds=60)
    details = set()
    for target in ("here", "absent", "absent/below", "here/below", "."):
        (share / name).symlink_to(outside / target)
        with pytest.raises(Forbidden) as refused:
            source.resolve(Ref.parse(f"file://{share}/"), CancelToken())
        details.add(str(refused.value))
        (share / name).unlink()
    assert len(details) == 1
    assert str(outside) not in str(details)


def test_options_are_told_to_an_admin_alone(guarded: Node) -> None:
    """They name paths, networks and proxies of the node."""
    assert_problem(guarded.ask("GET", "/v1/options"), 401, "unauthorized")
    assert_problem(guarded.ask("GET", "/v1/options", headers=bearer(LEASE)), 403, "role_too_low")
    told = guarded.ask("GET", "/v1/options", headers=bearer(CANARY))
    assert told.status == 200
    assert CANARY not in repr(told.document)


def test_the_lease_of_another_is_released_by_nobody_who_only_reads_of_it(
    node: Nodes, tokens: dict[str, Any], origin: Origin
) -> None:
    running = node(**tokens)
    pulled(running, origin.add("/it", b"x" * 100), "it")
    assert running.ready("it").status == 200
    path = "/v1/models/it/leases"
    taken = running.ask("POST", path, {"seconds": 60, "holder": "pod/a"}, headers=bearer(LEASE)).document
    listed = running.ask("GET", "/v1/models").document
    assert listed["models"][0]["leases"] == [{"holder": "pod/a", "expires_at": taken["expires_at"]}]
    assert taken["id"] not in repr(listed) + repr(running.ask("GET", "/v1/models/it").document)
    assert taken["id"] not in running.output
    for guess in ("0", "pod/a", "%2e", taken["id"][:-1], taken["id"].upper() + "0"):
        running.ask("DELETE", f"{path}/{guess}", headers=bearer(LEASE))
    assert len(running.ask("GET", "/v1/models/it").document["leases"]) == 1


# --- the record ---

ATTEMPTS: list[tuple[str, str, dict[str, str], int, dict[str, Any]]] = [
    ("PUT", "/v1/models/m/pin", {}, 401, {"who": "anonymous", "action": "pin", "code": "unauthorized"}),
    (
        "DELETE",
        "/v1/models/m",
        bearer(LEASE),
        403,
        {"who": "pod", "action": "delete", "code": "role_too_low"},
    ),
    ("DELETE", "/v1/models/m", bearer(CANARY), 404, {"who": "ops", "action": "delete", "verdict": "failed"}),
    ("PATCH", "/v1/models/m", bearer(CANARY), 405, {"who": "ops", "action": "none", "verdict": "failed"}),
    ("PUT", "/v1/limits", bearer(CANARY), 200, {"who": "ops", "action": "set_limits", "verdict": "accepted"}),
    ("PUT", "/v1/limits", {"Host": "evil.example"}, 403, {"who": "anonymous", "code": "foreign_host"}),
    ("POST", "/v1/models/m/leases", {**bearer(LEASE), "X-Request-Id": "r-1"}, 404, {"request_id": "r-1"}),
]


def test_each_attempt_to_write_has_one_line_that_says_who_what_and_how_it_ended(
    node: Nodes, tokens: dict[str, Any]
) -> None:
    """Promised: Each attempt to write is a line of the log that says who, what, which model, and how it
    ended."""
    running = node(allow=[], **tokens)
    for method, path, headers, status, _ in ATTEMPTS:
        body = {"seconds": 1} if path.endswith("leases") else {} if path.endswith("limits") else None
        assert running.ask(method, path, body, headers=headers).status == status
    asked = {"ref": "https://10.0.0.1/org/it"}
    assert running.ask("POST", "/v1/models", asked, headers=bearer(CANARY)).status == 202
    for path in ("/v1/models", "/livez", "/v1/models/m/ready"):
        running.ask("GET", path)
    running.stop()
    lines = audits(running)
    assert len(lines) == len(ATTEMPTS) + 1, "one each, and none for a read"
    for (method, path, _, status, said), line in zip(ATTEMPTS, lines, strict=False):
        wanted = {"method": method, "status": status, "peer": "127.0.0.1", **said}
        assert wanted.items() <= line.items(), line
        assert line.get("model", "") == ("m" if "/m" in path and line["action"] != "none" else ""), line
    assert lines[-1]["action"] == "pull"
    assert lines[-1]["model"] == "10.0.0.1--org--it"
    assert lines[-1]["ref"] == asked["ref"]
    assert CANARY not in running.output
    assert LEASE not in running.output


def test_nobody_says_in_a_header_where_they_ask_from(guarded: Node) -> None:
    claims = ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Forwarded-Host", "X-Forwarded-Proto")
    headers = {**bearer(CANARY), **dict.fromkeys(claims, "192.0.2.66"), "X-Request-Id": "forged"}
    assert_problem(guarded.ask("PUT", "/v1/models/any/pin", headers=headers), 404, "no_such_model")
    line = guarded.wait_for("audit", request_id="forged")
    assert line["peer"] == "127.0.0.1"
    assert "192.0.2.66" not in repr(line)


def test_tokens_that_are_not_in_force_show_in_the_metrics_and_in_the_log(
    node: Nodes, tokens: dict[str, Any]
) -> None:
    running = node(**tokens)
    assert running.metric("cachd_tokens_in_force") == 1
    Path(tokens["token_file"]).write_text(f"tokens: [{{name: {CANARY}")
    assert running.metric("cachd_tokens_in_force") == 0
    said = running.wait_for("tokens not taken over: those that were in force before stay")
    assert said["kept"] == ["ops", "pod"]
    assert CANARY not in running.output
    assert_problem(running.ask("PUT", "/v1/models/any/pin", headers=bearer(CANARY)), 404, "no_such_model")


def test_attempts_are_counted_by_role_and_verdict(node: Nodes, tokens: dict[str, Any]) -> None:
    running = node(**tokens)
    running.ask("PUT", "/v1/limits", {}, headers=bearer(CANARY))
    running.ask("PUT", "/v1/limits", {}, headers=bearer(LEASE))
    running.ask("PUT", "/v1/limits", {}, headers=bearer("who"))
    running.ask("DELETE", "/v1/models/none", headers=bearer(CANARY))
    for role, verdict in (
        ("admin", "accepted"),
        ("lease", "refused"),
        ("anonymous", "refused"),
        ("admin", "failed"),
    ):
        assert running.metric("cachd_writes_total", role=role, verdict=verdict) == 1
    assert running.metric("cachd_writes_total") == 4


def test_strangers_cannot_flood_the_log(node: Nodes, tokens: dict[str, Any]) -> None:
    running = node(**tokens)
    for number in range(100):
        running.ask("DELETE", f"/v1/models/m{number}", headers=bearer(f"guess-{number}"))
    for _ in range(40):
        running.ask("DELETE", "/v1/models/m", headers=bearer(LEASE))
    running.stop()
    lines = audits(running)
    strangers = [line for line in lines if line["who"] == "anonymous"]
    assert [line["more"] for line in strangers if "more" in line] == [70]
    assert len(strangers) == 31
    assert len([line for line in lines if line["who"] == "pod"]) == 40, "who has a token is always on record"


@pytest.mark.parametrize("name", ["\x1b[2Jx", "\u202ex", "x" * 20_000, "a\nlevel=fake", "\ud800"], ids=ascii)
def test_a_name_in_the_record_commands_no_terminal_and_is_short(guarded: Node, name: str) -> None:
    before = len(audits(guarded))
    path = f"/v1/models/{quote(name.encode('utf-8', 'surrogatepass'))}"
    headers = {**bearer(CANARY), "X-Request-Id": "x y"}
    assert guarded.ask("DELETE", path, headers=headers).status == 400
    guarded.ask("GET", "/livez")
    with guarded._logged:
        assert guarded._logged.wait_for(lambda: len(audits(guarded)) > before, 60)
    line = audits(guarded)[-1]
    assert line["model"].isprintable()
    assert len(line["model"]) <= 1200
    assert "request_id" not in line
