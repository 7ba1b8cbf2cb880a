"""What a request passes before the guard, or in place of it: narrow listeners, bursts, probes, a standby."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cachd.api import load
from cachd.api.narrow import Narrow
from cachd.api.probe import _KEPT, Probe
from cachd.api.stagger import _AT_ONCE, Stagger
from cachd.api.standby import standby
from cachd.errors import InUse
from cachd.model.listener import Serves
from tests.ground.in_process import Api
from tests.ground.origin import Origin
from tests.test_api_node import pulled

EVERYTHING, READS, PROBES = Serves.everything, Serves.reads, Serves.probes


class App:
    """Notes the requests that it gets."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body"})


async def asked(
    app: ASGIApp, method: str, path: str, query: bytes = b"", kind: str = "http"
) -> list[Message]:
    """What an application sends for a request."""
    scope = {"type": kind, "method": method, "path": path, "query_string": query, "headers": []}
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


# --- listeners ---


@pytest.mark.parametrize(
    ("method", "path", "served_by"),
    [
        ("GET", "/livez", [EVERYTHING, READS, PROBES]),
        ("HEAD", "/readyz", [EVERYTHING, READS, PROBES]),
        ("GET", "/v1/models/m/ready", [EVERYTHING, READS, PROBES]),
        ("GET", "/v1/models", [EVERYTHING, READS]),
        ("GET", "/livez/more", [EVERYTHING, READS]),
        ("POST", "/livez", [EVERYTHING]),
        ("DELETE", "/v1/models/m", [EVERYTHING]),
    ],
)
async def test_a_listener_passes_on_only_what_it_serves(
    method: str, path: str, served_by: list[Serves]
) -> None:
    for serves in Serves:
        app = App()
        sent = await asked(Narrow(app, serves), method, path)
        if serves in served_by:
            assert sent[0]["status"] == 299
            assert app.scopes[0]["method"] == ("GET" if method == "HEAD" else method)
            assert app.scopes[0].get("state", {}).get("is_head", False) is (method == "HEAD")
        else:
            refusal = json.loads(sent[1]["body"])
            assert (app.scopes, sent[0]["status"], refusal["code"]) == ([], 403, "not_on_this_listener")
            assert refusal["detail"].endswith("reads" if serves is READS else "/livez, /readyz and …/ready")


async def test_what_is_no_request_passes_every_listener() -> None:
    for serves in Serves:
        app = App()
        await asked(Narrow(app, serves), "POST", "/", kind="lifespan")
        assert [scope["type"] for scope in app.scopes] == ["lifespan"]


# --- bursts ---


async def test_a_burst_starts_a_few_at_a_time_and_probes_at_once() -> None:
    app = App()
    stagger = Stagger(app)
    burst = [asyncio.ensure_future(asked(stagger, "GET", "/v1/models")) for _ in range(3 * _AT_ONCE)]
    late = asyncio.ensure_future(asked(stagger, "GET", "/livez", b"wait=1"))
    probe = asyncio.ensure_future(asked(stagger, "GET", "/livez"))
    other = asyncio.ensure_future(asked(stagger, "GET", "/", kind="lifespan"))
    await asyncio.wait([probe, other])
    assert [scope["path"] for scope in app.scopes[:2]] == ["/livez", "/"]
    assert len(app.scopes) <= 2 + _AT_ONCE
    assert not late.done()
    await asyncio.wait([*burst, late])
    assert len(app.scopes) == 3 * _AT_ONCE + 3


# --- a daemon that waits ---


async def test_a_daemon_that_waits_lives_and_refuses_all_else() -> None:
    app = standby(InUse("pid 7 has it", code="root_locked", hint="stop it"))
    alive = await asked(app, "GET", "/livez")
    assert (alive[0]["status"], json.loads(alive[1]["body"])) == (200, {"status": "alive"})
    for method, path in (("POST", "/livez"), ("GET", "/readyz")):
        head, body = await asked(app, method, path)
        refusal = json.loads(body["body"])
        assert (head["status"], refusal["code"], refusal["hint"]) == (503, "root_locked", "stop it")
        assert (b"retry-after", b"5") in head["headers"]
    assert await asked(app, "GET", "/livez", kind="lifespan") == []


# --- probes of ready models ---


async def test_only_the_plain_probe_of_a_ready_model_is_answered_here(api: Api, origin: Origin) -> None:
    await pulled(api, origin, "m")
    app = App()
    probe = Probe(app, models=api.daemon.models)
    first, second = [await asked(probe, "GET", "/v1/models/m/ready") for _ in range(2)]
    assert (first[0]["status"], json.loads(first[1]["body"])["name"]) == (200, "m")
    assert (first, app.scopes) == (second, [])
    for method, path, query, kind in (
        ("POST", "/v1/models/m/ready", b"", "http"),
        ("GET", "/v1/models/m/ready", b"wait=1", "http"),
        ("GET", "/v1/models/m/ready/x", b"", "http"),
        ("GET", "/v1/models/absent/ready", b"", "http"),
        ("GET", "/v1/models/m/ready", b"", "websocket"),
    ):
        assert (await asked(probe, method, path, query, kind))[0]["status"] == 299
    assert len(app.scopes) == 5


async def test_a_probe_counts_as_a_use_and_its_answer_is_kept(api: Api, origin: Origin) -> None:
    await pulled(api, origin, "m")
    probe = Probe(App(), models=api.daemon.models)
    used = api.daemon.store.usage_log
    before = used.of("m")
    answers = {id(probe._ready("m")) for _ in range(3)}
    assert len(answers) == 1
    assert used.of("m") != before
    for number in range(1, _KEPT):
        probe._kept[f"other {number}"] = probe._kept["m"]
    assert probe._ready("m")
    assert len(probe._kept) == _KEPT
    probe._kept["another"] = probe._kept.pop("m")
    assert probe._ready("m")
    assert list(probe._kept) == ["m"], "so many are kept at most"


# --- libraries ---

LOADED = """
import sys, {before}
from {module} import load_libraries
load_libraries()
from pydantic import BaseModel
import fastapi.openapi.models, structlog.dev
assert sys.modules["pydantic.v1"] is None
assert structlog.dev.rich is None
assert "defer_build" not in BaseModel.model_config
assert fastapi.openapi.models.OpenAPI.model_config["defer_build"]
assert ("rich" in sys.modules) is ("{before}" == "rich")
import rich
print(rich.__name__)
"""


@pytest.mark.parametrize("before", ["json", "rich"])
def test_libraries_are_loaded_without_what_is_not_used_and_others_can_still_load_that(before: str) -> None:
    script = LOADED.format(before=before, module=load.__name__)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("rich\n", "")
