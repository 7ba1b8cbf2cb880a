"""The Hub endpoint as the options say, in this process: where it listens, for whom, and until when."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.config import load
from cachd.daemon.hub_endpoint import hub_endpoint
from cachd.daemon.parts import assembled
from cachd.errors import Invalid
from tests.conftest import PATIENCE_SECONDS, spec_of
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.test_waiting_for_roots import answered, free_port

CONTENT = noise(64)
FILE = "/org/m/resolve/main/model.bin"


@contextmanager
def serving(root: Path, hub: Hub, **options: object) -> Iterator[list[dict[str, object]]]:
    """The endpoint of these options, with one ready model; what it logs when it begins."""
    config = load(root=root, reserve_free=0, hf_endpoint=hub.url, allow=["127.0.0.0/8"], **options)
    with assembled(config) as daemon:
        pull = daemon.pulls.start(spec_of("hf://org/m"))
        if pull is not None:
            pull.done.result(PATIENCE_SECONDS)
        with capture_logs() as logs, hub_endpoint(config, daemon):
            yield [dict(each) for each in logs if each["event"] == "hub endpoint listening"]


def got(port: int, **headers: str) -> tuple[int, bytes]:
    """The status and body of the answer for the file."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", FILE, headers={"Host": "localhost", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture
def model(hub: Hub) -> Hub:
    hub.add("org/m", {"model.bin": CONTENT})
    return hub


def test_without_an_address_there_is_no_endpoint(root: Path, model: Hub) -> None:
    with serving(root, model) as listening:
        assert listening == []
        assert not [each for each in threading.enumerate() if each.name.startswith("hub")]


def test_models_are_served_at_every_address_while_it_runs(root: Path, model: Hub) -> None:
    one, other = free_port(), free_port()
    with serving(root, model, hub_listen=[f"127.0.0.1:{one}", f"127.0.0.1:{other}"]) as listening:
        assert [each["port"] for each in listening] == [one, other]
        assert [got(port) for port in (one, other)] == [(200, CONTENT)] * 2
        assert got(one, Host="evil.example")[0] == 403
    assert [answered(port) for port in (one, other)] == [False, False]


def test_a_name_that_the_option_allows_is_a_name_of_the_endpoint(root: Path, model: Hub) -> None:
    port = free_port()
    with serving(root, model, hub_listen=[f"127.0.0.1:{port}"], allowed_hosts=["cache.example"]):
        assert got(port, Host=f"cache.example:{port}") == (200, CONTENT)


@pytest.mark.parametrize(("share", "status"), [("node", 200), ("token", 404)])
def test_if_tokens_decide_only_who_has_one_gets_a_private_model(
    root: Path, tmp_path: Path, hub: Hub, share: str, status: int
) -> None:
    hub.add("org/m", {"model.bin": CONTENT}, private=True)
    (tmp_path / "token").write_text(hub.token)
    port = free_port()
    options = {"hub_listen": [f"127.0.0.1:{port}"], "hf_token_file": tmp_path / "token"}
    with serving(root, hub, hub_share=share, **options):
        assert got(port)[0] == status
        assert got(port, Authorization=f"Bearer {hub.token}") == (200, CONTENT)


def test_an_address_of_another_machine_is_refused(root: Path, model: Hub) -> None:
    with pytest.raises(Invalid) as refused, serving(root, model, hub_listen=["192.0.2.1:1"]):
        pass
    assert refused.value.code == "cannot_listen"
