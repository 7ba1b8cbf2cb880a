"""Clients of the Hub's cache load models from a read-only mount: the light rows of `make conformance`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.clients import ALL, HUB, LIGHT, NO_NETWORK, NOT_TRIED, OFFLINE, PLAIN, TENSORS, Client
from tests.conformance.made import model
from tests.conformance.table import Field, field
from tests.ground.needs import needs

PAGE = Path(__file__).parent.parent / "docs/engines.md"
pytestmark = needs("pods")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    made = tmp_path_factory.mktemp("made")
    root = tmp_path_factory.mktemp("root")
    root.chmod(0o755)
    with field(root, {TENSORS: model(TENSORS, made / "model", "python")}) as opened:
        yield opened


@pytest.mark.parametrize(
    ("view", "network", "user"),
    [(PLAIN, OFFLINE, "random uid"), (HUB, OFFLINE, "root"), (HUB, NO_NETWORK, "random uid")],
)
@pytest.mark.parametrize("client", LIGHT, ids=[client.name for client in LIGHT])
def test_a_client_loads_a_model_that_it_has_never_seen(
    ground: Field, client: Client, view: str, network: str, user: str
) -> None:
    assert ground.tried(client, sys.executable, view, network, user).failure == ""


def test_the_page_names_every_client() -> None:
    page = PAGE.read_text()
    assert [c.name for c in ALL if f"| {c.name} |" not in page] == []
    assert [name for name in NOT_TRIED if name not in page] == []
