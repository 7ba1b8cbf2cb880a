"""Clients load models from a read-only mount and the Hub endpoint: the light rows of `make conformance`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator

import pytest

from cachd.pod.recipe import EngineName
from tests.conformance import endpoint
from tests.conformance.clients import (
    ALL,
    COLD,
    ENDPOINT,
    HUB,
    LIGHT,
    NO_NETWORK,
    OFFLINE,
    ONLINE,
    PLAIN,
    TENSORS,
    WARM,
    Client,
)
from tests.conformance.environments import ENVIRONMENTS
from tests.conformance.kept import read, table, undocumented
from tests.conformance.made import MAKERS, model
from tests.conformance.trials import PROGRAMS, Field, field
from tests.ground.needs import needs
from tests.ground.pod import run_in_pod
from tests.ground.program import PROJECT
from tests.ground.site import Ground
from tests.ground.weights import gguf
from tests.test_preflight import TEXT

CHEAP = [
    (PLAIN, OFFLINE, "random uid"),
    (HUB, OFFLINE, "root"),
    (HUB, NO_NETWORK, "random uid"),
    (HUB, ONLINE, "random uid"),
    (ENDPOINT, COLD, "random uid"),
    (ENDPOINT, WARM, "random uid"),
]
CONNECT = """
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname(), timeout=60)
"""
CONNECT_OUTSIDE = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
PRINT = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    root = tmp_path_factory.mktemp("root")
    root.chmod(0o755)
    with field(root, {TENSORS: model(TENSORS, tmp_path_factory.mktemp("made") / "model")}) as opened:
        yield opened


@needs("pods")
@pytest.mark.parametrize(("view", "case", "user"), CHEAP)
@pytest.mark.parametrize("client", LIGHT, ids=[client.name for client in LIGHT])
def test_a_client_loads_a_model_that_it_has_never_seen(
    models: Field, client: Client, view: str, case: str, user: str
) -> None:
    if view in client.views:
        assert models.tried(client, sys.executable, view, case, user).failure == ""


@needs("pods", "ip")
def test_a_pod_without_a_network_has_a_loopback_for_its_own_server(models: Field) -> None:
    assert run_in_pod(models.root, CONNECT, network=False).stderr == ""
    assert "unreachable" in run_in_pod(models.root, CONNECT_OUTSIDE, network=False).stderr


@needs("pods")
@pytest.mark.parametrize("engine", sorted({client.engine for client in ALL}))
def test_a_row_runs_with_exactly_what_cachd_env_prints(
    ground: Ground, models: Field, engine: EngineName
) -> None:
    client = next(client for client in ALL if client.engine == engine)
    ground.hub.add(client.model, {client.file: gguf()} if client.file else dict(TEXT))
    ground.node.pull(f"hf://{client.model}")
    ground.node.ready(client.model.replace("/", "--"))
    ran = models.environment(client, PLAIN, OFFLINE)
    seen = json.loads(run_in_pod(models.root, PRINT, env=ran, network=False).stdout)
    places = ["--cache", seen["CACHE"], "--link", f"{seen['CACHE']}/models", "--scratch", seen["TMPDIR"]]
    words = ["env", client.model.replace("/", "--"), "--for", engine, "-o", "json", *places]
    printed = json.loads(ground.node.cli(*words).stdout)
    assert {name: seen.get(name) for name in printed["env"]} == printed["env"]
    started = [*printed["command"], *printed["args"]]
    ours = shlex.split(seen.get("RUN", ""))
    assert [seen["PORT"] if word == str(printed["port"]) else word for word in started] == ours[
        : len(started)
    ]


def test_a_client_of_the_endpoint_has_the_variables_that_the_page_names() -> None:
    page = (PROJECT / "docs/hub-endpoint.md").read_text()
    table = page.partition("| Variable |")[2].partition("\n\n")[0]
    named = dict(re.findall(r"(?m)^\| `(\w+)` \| `([^`]+)`", table))
    assert named == {**endpoint.VARIABLES, "HF_ENDPOINT": "http://$(HOST_IP):8471"}


def test_every_client_has_its_program_its_packages_and_its_model() -> None:
    for client in ALL:
        assert (PROGRAMS / f"{client.program}.py").read_text().startswith('"""'), client.name
        assert client.environment in ENVIRONMENTS, client.name
        assert {client.model, *client.needs} <= {*MAKERS, TENSORS}, client.name


def test_every_kept_result_is_explained() -> None:
    kept = read()
    assert [name for name in kept if name not in {client.name for client in ALL}] == []
    assert [line for c in ALL if c.name in kept for line in undocumented(c, kept[c.name].cells)] == []
    assert [c.name for c in LIGHT if c.name not in kept] == []
    assert "| not tried |" not in table()
