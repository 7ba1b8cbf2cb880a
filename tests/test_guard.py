"""The guard of the API, called as a server calls it: hosts, origins, bodies, callers, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import structlog
from fastapi import Request
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from cachd.api.access import Access, Caller, check_complete, check_pull
from cachd.api.app import ROUTERS
from cachd.api.audit import Audit
from cachd.api.connection import MAX_BODY_BYTES
from cachd.api.guard import Guard
from cachd.api.requests import Asked
from cachd.errors import Forbidden
from cachd.metrics import Metrics
from cachd.policy.roles import Grant, Namespaces, Role
from cachd.settings.tokens import TokenFile

LONG_NAME = "a" * 300
LOCAL = [("host", "localhost")]
TOKENS = [
    {"name": "team", "role": "pull", "namespaces": ["team-*"], "token": "of-the-team"},
    {"name": "boss", "role": "admin", "token": "of-the-boss"},
    {"name": "lead", "role": "admin", "namespaces": ["team-*"], "token": "of-the-lead"},
]


class App:
    """Answers with the body, and with the caller that log lines would name; `fails` raises."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.after: list[Message] = []
        self.who: list[str | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.who.append(structlog.contextvars.get_contextvars().get("who"))
        if scope["type"] != "http":
            await send(await receive())
            return
        if scope["path"] == "/fails":
            raise ZeroDivisionError
        message = await receive()
        self.after.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message.get("body", b"")})


@dataclass
class Guarded:
    """A guard over `App`. `sent`: what it sent for the last request."""

    tokens: TokenFile | None = None
    anonymous_reads: bool = True
    app: App = field(default_factory=App)
    metrics: Metrics = field(default_factory=Metrics)
    sent: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        routes = [route for router in ROUTERS for route in router.routes]
        access = Access(routes, self.tokens, anonymous_reads=self.anonymous_reads)
        self.audit = Audit(self.metrics)
        self.guard = Guard(
            self.app,
            allowed_hosts=["Cache.Example", LONG_NAME],
            access=access,
            audit=self.audit,
            metrics=self.metrics,
        )

    async def ask(
        self,
        headers: Iterable[tuple[str, str]] = LOCAL,
        method: str = "GET",
        path: str = "/livez",
        pieces: Iterable[bytes] = (),
    ) -> str:
        """Make a request; the code of its refusal, or the status. `pieces`: its body, as it arrives."""
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        scope = {"type": "http", "method": method, "path": path, "headers": raw, "client": ("192.0.2.7", 1)}
        arriving: list[Message] = [{"type": "http.request", "body": p, "more_body": True} for p in pieces]
        arriving += [{"type": "http.request"}, {"type": "http.disconnect"}]
        self.sent.clear()

        async def receive() -> Message:
            return arriving.pop(0)

        async def send(message: Message) -> None:
            self.sent.append(message)

        await self.guard(scope, receive, send)
        status, body = self.sent[0]["status"], self.sent[1]["body"]
        return str(status) if status == 200 else str(json.loads(body)["code"])

    def counted(self, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value("cachd_requests_total", labels)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    (tmp_path / "tokens").write_text(json.dumps({"tokens": TOKENS}))
    return TokenFile(tmp_path / "tokens")


HOSTS = {
    "localhost": "200",
    "LOCALHOST:8470": "200",
    "localhost:": "200",
    "127.0.0.1": "200",
    "10.1.2.3:80": "200",
    "[::1]:8470": "200",
    "[::1]": "200",
    "cache.example": "200",
    "CACHE.example:1": "200",
    LONG_NAME: "200",
    LONG_NAME + ":": "foreign_host",
    "": "foreign_host",
    ":80": "foreign_host",
    "evil.example": "foreign_host",
    "localhost.evil": "foreign_host",
    "::1": "foreign_host",
    "[localhost]": "foreign_host",
    "localhost:x": "foreign_host",
    "a@localhost": "foreign_host",
    "127.0.0.1.5": "foreign_host",
}


@pytest.mark.parametrize(("host", "answer"), HOSTS.items(), ids=[str(n) for n in range(len(HOSTS))])
async def test_only_an_address_or_a_name_of_the_daemon_is_its_host(host: str, answer: str) -> None:
    guarded = Guarded()
    assert await guarded.ask([("host", host)]) == answer
    assert bool(guarded.app.scopes) is (answer == "200")


@pytest.mark.parametrize("headers", [[], [*LOCAL, *LOCAL], [("x-host", "localhost")]])
async def test_a_request_has_exactly_one_host(headers: list[tuple[str, str]]) -> None:
    assert await Guarded().ask(headers) == "foreign_host"


ORIGINS = [
    ("localhost:8470", "http://localhost:8470", "200"),
    ("localhost", "http://localhost", "200"),
    ("localhost", "http://localhost:80", "200"),
    ("localhost:443", "https://localhost", "200"),
    ("127.0.0.1:8470", "http://127.0.0.1:8470", "200"),
    ("127.0.0.1:8470", "http://cache.example:8470", "200"),
    ("localhost:8470", "http://localhost:8471", "foreign_origin"),
    ("localhost:8470", "http://localhost", "foreign_origin"),
    ("localhost", "http://evil.example", "foreign_origin"),
    ("127.0.0.1:8470", "http://127.0.0.2:8470", "foreign_origin"),
    ("localhost:8470", "file://localhost:8470", "foreign_origin"),
    ("localhost", "http://localhost:x", "foreign_origin"),
    ("localhost", "http://[::1", "foreign_origin"),
    ("localhost:8470", "http://:8470", "foreign_origin"),
    ("localhost", "null", "foreign_origin"),
    ("localhost", "", "foreign_origin"),
]


@pytest.mark.parametrize(("host", "origin", "answer"), ORIGINS)
async def test_a_page_may_ask_only_the_daemon_it_came_from(host: str, origin: str, answer: str) -> None:
    assert await Guarded().ask([("host", host), ("origin", origin)]) == answer


LENGTHS = {
    "0": "200",
    str(MAX_BODY_BYTES): "200",
    str(MAX_BODY_BYTES + 1): "body_too_long",
    "-1": "invalid_request",
    "1x": "invalid_request",
    "": "invalid_request",
}


@pytest.mark.parametrize(("length", "answer"), LENGTHS.items())
async def test_the_stated_length_of_a_body_has_a_bound(length: str, answer: str) -> None:
    assert await Guarded().ask([*LOCAL, ("content-length", length)]) == answer


@pytest.mark.parametrize("header", ["content-length", "transfer-encoding"])
async def test_a_body_is_read_in_pieces_and_passed_on_as_one(header: str) -> None:
    guarded = Guarded()
    assert await guarded.ask([*LOCAL, (header, "3")], pieces=[b"a", b"b", b"c"]) == "200"
    assert guarded.sent[1]["body"] == b"abc"
    assert guarded.app.after == [{"type": "http.disconnect"}], "what comes after it comes as it is"


async def test_without_a_header_of_a_body_nothing_is_read_before_the_application() -> None:
    guarded = Guarded()
    assert await guarded.ask(pieces=[b"a", b"b"]) == "200"
    assert guarded.sent[1]["body"] == b"a"
    assert guarded.app.after[0]["body"] == b"b"


@pytest.mark.parametrize(("last", "answer"), [(0, "200"), (1, "body_too_long")])
async def test_a_body_that_states_no_length_has_the_same_bound(last: int, answer: str) -> None:
    guarded, pieces = Guarded(), [bytes(MAX_BODY_BYTES // 2)] * 2 + [bytes(last)]
    assert await guarded.ask([*LOCAL, ("transfer-encoding", "chunked")], "POST", pieces=pieces) == answer
    assert len(guarded.app.scopes) == (answer == "200")


async def test_what_is_no_request_is_passed_on_as_it_is() -> None:
    guarded = Guarded()

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        guarded.sent.append(message)

    await guarded.guard({"type": "lifespan"}, receive, send)
    assert guarded.sent == [{"type": "lifespan.startup"}]


async def test_each_request_is_counted_by_its_class_and_each_write_is_audited_with_its_status() -> None:
    guarded = Guarded()
    with capture_logs() as logs:
        assert await guarded.ask(method="DELETE", path="/v1/models/m") == "200"
        assert await guarded.ask([("host", "evil")], "PUT", "/v1/models/m/pin") == "foreign_host"
        with pytest.raises(ZeroDivisionError):
            await guarded.ask(method="POST", path="/fails")
        assert await guarded.ask() == "200"
    audited = [(each["action"], each["status"], each["verdict"]) for each in logs if each["event"] == "audit"]
    assert audited == [("delete", 200, "accepted"), ("pin", 403, "refused"), ("none", 500, "failed")]
    counts = [guarded.counted(op="none", result=result) for result in ("2xx", "4xx", "5xx")]
    assert counts == [2, 1, 1]
    guarded.audit.close()


async def test_a_write_with_the_status_400_has_failed() -> None:
    guarded = Guarded()
    with capture_logs() as logs:
        assert await guarded.ask([*LOCAL, ("content-length", "x")], "POST", "/v1/models") == "invalid_request"
    assert [(each["status"], each["verdict"]) for each in logs] == [(400, "failed")]
    guarded.audit.close()


async def test_a_refused_body_is_audited_and_its_route_is_unknown() -> None:
    guarded = Guarded()
    too_long = [*LOCAL, ("content-length", str(MAX_BODY_BYTES + 1))]
    with capture_logs() as logs:
        assert await guarded.ask(too_long, "POST", "/v1/models") == "body_too_long"
    (line,) = [each for each in logs if each["event"] == "audit"]
    assert (line["status"], line["verdict"], line["code"]) == (413, "failed", "body_too_long")
    assert (line["who"], line["role"], line["peer"]) == ("anonymous", "anonymous", "192.0.2.7")
    guarded.audit.close()


# --- callers ---


def bearer(*values: str) -> list[tuple[str, str]]:
    return [*LOCAL, *(("authorization", value) for value in values)]


PIN = ("PUT", "/v1/models/team-a/pin")
WARM = ("POST", "/v1/models/team-a/warm")
OTHERS = ("POST", "/v1/models/other/warm")
LIMITS = ("PUT", "/v1/limits")
UNKNOWN = ("POST", "/v1/no/such/path")
CALLERS: list[tuple[list[str], tuple[str, str], str]] = [
    (["Bearer of-the-team"], WARM, "200"),
    (["bearer  \tof-the-team \t"], WARM, "200"),
    (["Bearer of-the-team"], OTHERS, "outside_namespaces"),
    (["Bearer of-the-team"], PIN, "role_too_low"),
    (["Bearer of-the-team"], UNKNOWN, "role_too_low"),
    (["Bearer of-the-boss"], PIN, "200"),
    (["Bearer of-the-boss"], LIMITS, "200"),
    (["Bearer of-the-lead"], PIN, "200"),
    (["Bearer of-the-lead"], LIMITS, "outside_namespaces"),
    (["Bearer of-the-lead"], UNKNOWN, "outside_namespaces"),
    (["Bearer of-the-boss"], UNKNOWN, "200"),
    ([], WARM, "unauthorized"),
    ([], UNKNOWN, "unauthorized"),
    (["Bearer "], WARM, "unauthorized"),
    (["of-the-boss"], WARM, "unauthorized"),
    (["Basic of-the-boss"], WARM, "unauthorized"),
    (["Bearer \u00a0of-the-boss"], WARM, "unauthorized"),
    (["Bearer of-the-boss", "Bearer of-the-boss"], WARM, "unauthorized"),
]


@pytest.mark.parametrize(("tokens_sent", "call", "answer"), CALLERS)
async def test_a_call_needs_one_token_with_its_role_and_its_model(
    tokens: TokenFile, tokens_sent: list[str], call: tuple[str, str], answer: str
) -> None:
    guarded = Guarded(tokens)
    assert await guarded.ask(bearer(*tokens_sent), *call) == answer
    guarded.audit.close()


@pytest.mark.parametrize("are_open", [True, False])
async def test_reads_are_open_if_the_option_says_so_and_probes_always(
    tokens: TokenFile, *, are_open: bool
) -> None:
    guarded = Guarded(tokens, anonymous_reads=are_open)
    for path in ("/livez", "/readyz", "/v1/models/m/ready", "/", "/docs"):
        assert await guarded.ask(path=path) == "200"
    for method, path in (("GET", "/v1/models"), ("GET", "/v1/models/m"), ("OPTIONS", "/v1/no/such")):
        assert await guarded.ask(LOCAL, method, path) == ("200" if are_open else "unauthorized")
    assert await guarded.ask(path="/v1/options") == "unauthorized"
    assert await guarded.ask(bearer("Bearer of-the-team"), path="/v1/models") == "200"


async def test_a_long_path_needs_the_same_token(tokens: TokenFile) -> None:
    guarded = Guarded(tokens)
    for length in (200, 256, 257, 4000):
        path = f"/v1/models/{'m' * length}/warm"
        assert await guarded.ask(method="POST", path=path) == "unauthorized"
        assert await guarded.ask(bearer("Bearer of-the-boss"), "POST", path) == "200"
        assert await guarded.ask(bearer("Bearer of-the-team"), "POST", path) == "outside_namespaces"
    guarded.audit.close()


async def test_who_is_refused_hears_whether_the_token_is_unknown_or_absent(tokens: TokenFile) -> None:
    guarded = Guarded(tokens)
    for sent, said in (
        (["Bearer other"], "the token of the request is unknown"),
        ([], "the request has none"),
    ):
        assert await guarded.ask(bearer(*sent), *WARM) == "unauthorized"
        assert json.loads(guarded.sent[1]["body"])["detail"].endswith(f"the role pull, and {said}")
    guarded.audit.close()


REF = "https://origin.example/m"
PULLS: list[tuple[Grant, dict[str, object], str]] = [
    (Grant("t", Role.pull), {}, ""),
    (Grant("t", Role.pull), {"pin": True}, "role_too_low"),
    (Grant("t", Role.pull), {"replace": True}, "role_too_low"),
    (Grant("t", Role.pull), {"hub_id": "org/model"}, "role_too_low"),
    (Grant("t", Role.admin), {"pin": True, "replace": True, "hub_id": "org/model"}, ""),
    (Grant("t", Role.pull, Namespaces(("m",))), {}, ""),
    (Grant("t", Role.pull, Namespaces(("other",))), {}, "outside_namespaces"),
    (Grant("t", Role.pull, Namespaces(("m",))), {"ref": "hf://org/model"}, "outside_namespaces"),
    (Grant("t", Role.pull, Namespaces(("m", "hf://org/"))), {"ref": "hf://org/model"}, ""),
    (Grant("t", Role.admin, Namespaces(("m",))), {"hub_id": "org/model"}, "outside_namespaces"),
    (Grant("t", Role.admin, Namespaces(("m", "hf://org/"))), {"hub_id": "org/model"}, ""),
]


@pytest.mark.parametrize(("grant", "more", "code"), PULLS)
def test_a_pull_needs_the_role_of_its_fields_and_the_namespace_of_its_name_and_folder(
    grant: Grant, more: dict[str, object], code: str
) -> None:
    request = Request({"type": "http", "state": {"caller": Caller(grant, "local")}})
    asked = Asked.model_validate({"ref": REF, "name": "m", **more})
    if code:
        with pytest.raises(Forbidden) as refused:
            check_pull(request, asked, asked.spec())
        assert refused.value.code == code
    else:
        check_pull(request, asked, asked.spec())
        assert (request.state.model, request.state.ref) == ("m", str(asked.spec().ref))


async def test_log_lines_of_a_call_and_its_audit_name_the_token_that_it_needed(tokens: TokenFile) -> None:
    guarded = Guarded(tokens)
    with capture_logs() as logs:
        await guarded.ask(bearer("Bearer of-the-boss"), *PIN)
        await guarded.ask(bearer("Bearer of-the-team"), *PIN)
        await guarded.ask(bearer("Bearer of-the-boss"))
    assert guarded.app.who == ["boss", None]
    audited = [(e["who"], e["role"], e["peer"], e["model"], e["verdict"]) for e in logs]
    assert audited == [
        ("boss", "admin", "192.0.2.7", "team-a", "accepted"),
        ("team", "pull", "192.0.2.7", "team-a", "refused"),
    ]


# --- the audit log ---


async def test_strangers_get_thirty_lines_and_then_a_count(tokens: TokenFile) -> None:
    guarded = Guarded(tokens)
    with capture_logs() as logs:
        for _ in range(33):
            await guarded.ask(LOCAL, *WARM)
        await guarded.ask(bearer("Bearer of-the-team"), *WARM)
        assert [each["who"] for each in logs] == ["anonymous"] * 30 + ["team"]
        guarded.audit.close()
        guarded.audit.close()
        assert [each.get("more") for each in logs[31:]] == [3]
        for _ in range(31):
            await guarded.ask(LOCAL, *UNKNOWN)
        guarded.audit.close()
    assert [each.get("more") for each in logs[32:]] == [None] * 30 + [1]
    written = guarded.metrics.registry.get_sample_value
    assert written("cachd_writes_total", {"role": "anonymous", "verdict": "refused"}) == 33 + 31
    assert written("cachd_writes_total", {"role": "pull", "verdict": "accepted"}) == 1


@pytest.mark.parametrize(("given", "logged"), [("abc/1:2", "abc/1:2"), ("a b", None), ("x" * 129, None)])
async def test_the_audit_log_has_a_request_id_of_harmless_characters(given: str, logged: str | None) -> None:
    guarded = Guarded()
    with capture_logs() as logs:
        await guarded.ask([*LOCAL, ("x-request-id", given)], *PIN)
    assert logs[0].get("request_id") == logged
    guarded.audit.close()


async def test_text_of_the_path_is_bounded_in_the_audit_log() -> None:
    guarded = Guarded()
    with capture_logs() as logs:
        await guarded.ask(LOCAL, "PUT", f"/v1/models/{'m' * 121}/pin")
        await guarded.ask(LOCAL, "P" * 21, "/v1/models")
    assert logs[0]["model"] == "m" * 120
    assert (logs[1]["method"], logs[1]["action"]) == ("P" * 20, "none")
    guarded.audit.close()


def test_each_route_has_a_rule_and_each_rule_a_route() -> None:
    routes = [route for router in ROUTERS for route in router.routes]
    check_complete(routes)
    with pytest.raises(RuntimeError):
        check_complete(routes[1:])
