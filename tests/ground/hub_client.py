"""Clients of the Hub endpoint of a node: the real ones, and one that shows every step."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.ground.hub import Hub
from tests.ground.node import PATIENCE_SECONDS, Node
from tests.ground.origin import Late, Seen

HF = Path(sys.executable).with_name("hf")
NEVER_RESUMES = "unknown/None; hf_hub/2.4.0"  # the User-Agent of a client that may get unverified bytes


def endpoint_node(root: Path, hub: Hub, **options: Any) -> Node:
    """A node whose endpoint is on, and that pulls from `hub`."""
    plain = {"allow": ["127.0.0.0/8"], "listen": "127.0.0.1:0", "reserve_free": 0, "retries": 100}
    own = {"hf_endpoint": hub.url, "hub_listen": "127.0.0.1:0"}
    return Node(root, {**plain, **own, **options})


def endpoint_of(node: Node) -> str:
    """What a pod sets HF_ENDPOINT to."""
    found = node.wait_for("hub endpoint listening")
    return f"http://{found['host']}:{found['port']}"


def client_env(node: Node, home: Path, **env: str) -> dict[str, str]:
    """The environment of a client of the endpoint, with a cache of its own."""
    plain = {"HF_ENDPOINT": endpoint_of(node), "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    patience = {"HF_HUB_DOWNLOAD_TIMEOUT": "60", "HF_HUB_ETAG_TIMEOUT": "60"}
    return {**os.environ, **plain, **patience, **env}


def hf(node: Node, home: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line of huggingface_hub against the endpoint."""
    said = client_env(node, home, **env)
    return subprocess.run([HF, *words], env=said, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def script(node: Node, home: Path, text: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program in Python against the endpoint."""
    said, command = client_env(node, home, **env), [sys.executable, "-c", text, *words]
    return subprocess.run(command, env=said, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def withhold(hub: Hub, repo: str, path: str, start: int) -> None:
    """Let no byte of a large file arrive from `start` on, until the faults of the CDN are cleared."""

    def is_late(seen: Seen) -> bool:
        return int(seen.headers.get("range", "bytes=0-")[6:].split("-")[0]) >= start

    hub.cdn.fault(hub.cdn_path(repo, path), Late(), when=is_late)


@dataclass(frozen=True)
class Got:
    """One answer of the endpoint."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Reader:
    """One request whose body is read bit by bit. It says that it is a huggingface_hub that never resumes."""

    def __init__(
        self, node: Node, target: str, method: str = "GET", body: bytes | None = None, **headers: str
    ):
        place = urlsplit(endpoint_of(node)).netloc
        self.connection = http.client.HTTPConnection(place, timeout=PATIENCE_SECONDS)
        said = {"User_Agent": NEVER_RESUMES, **headers}
        self.connection.request(method, target, body, {k.replace("_", "-"): v for k, v in said.items()})
        self.response = self.connection.getresponse()
        self.status = self.response.status
        self.headers = {name.lower(): value for name, value in self.response.getheaders()}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def read(self, count: int | None = None) -> bytes:
        """The next `count` bytes, or all that follow. Raises IncompleteRead if fewer follow."""
        return self.response.read() if count is None else self.response.read(count)


def get(node: Node, target: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Got:
    """One complete answer."""
    with Reader(node, target, method, body, **headers) as reader:
        return Got(reader.status, reader.headers, reader.read())
