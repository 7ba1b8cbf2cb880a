"""Tries clients on both views, with and without a network, as root and as another user."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.model import ModelSpec
from tests.conformance.clients import HUB, NO_NETWORK, OFFLINE, ONLINE, PLAIN, Client
from tests.ground.hub import Hub
from tests.ground.pod import run_in_pod

USERS = {"root": 0, "random uid": 12345}
VIEWS, NETWORKS = (PLAIN, HUB), (OFFLINE, NO_NETWORK, ONLINE)
_PATIENCE_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Cell:
    """One trial. `failure` is the last line of what the client printed; "" if it loaded the model."""

    client: Client
    view: str
    network: str
    user: str
    seconds: float
    failure: str

    @property
    def is_as_documented(self) -> bool:
        """Whether the client works, or fails by a fault of its own that the table names."""
        return not self.failure or (self.view, self.network) in (self.client.faults or {})


@dataclass(frozen=True, slots=True)
class Field:
    """A root with models, and the Hub that they came from."""

    root: Path
    hub: Hub

    def tried(self, client: Client, python: str, view: str, network: str, user: str) -> Cell:
        """Load the client's model in a pod."""
        name = client.repo.replace("/", "--")
        env = {
            "MODEL": f"$CACHE/models/{name}" if view == PLAIN else client.repo,
            "HF_HUB_OFFLINE": "1" if network == OFFLINE else "0",
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        began = time.monotonic()
        try:
            ended = run_in_pod(
                self.root,
                client.script,
                env=env,
                uid=USERS[user],
                python=python,
                network=network == ONLINE,
                timeout=_PATIENCE_SECONDS,
            )
            last = ended.stderr.strip().splitlines()[-1:] or [f"status {ended.returncode}"]
            failure = last[0] if ended.returncode else ""
        except subprocess.TimeoutExpired:
            failure = f"not ended after {_PATIENCE_SECONDS} s"
        return Cell(client, view, network, user, time.monotonic() - began, failure)

    def cells(
        self, client: Client, python: str = sys.executable, *, networks: Sequence[str] = NETWORKS
    ) -> Iterator[Cell]:
        """Try one client everywhere."""
        for view, network, user in itertools.product(client.views, networks, USERS):
            yield self.tried(client, python, view, network, user)


@contextmanager
def field(root: Path, models: dict[str, dict[str, bytes | Path]]) -> Iterator[Field]:
    """A root into which an engine has pulled these models, by repository, from a Hub that is still there."""
    with Hub() as hub:
        with assembled(
            Config(root=root, hf_endpoint=hub.url, allow=("127.0.0.0/8",), reserve_free=0)
        ) as engine:
            for repo, files in models.items():
                hub.add(repo, files)
                running = engine.pulls.start(ModelSpec.asked(f"hf://{repo}"))
                assert running is not None
                running.done.result(_PATIENCE_SECONDS)
        yield Field(root, hub)
