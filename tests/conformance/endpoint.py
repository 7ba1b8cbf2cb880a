"""Tries clients on the Hub endpoint of a real daemon, which pulls from the Hub of the tests.

cold        the daemon has no model: it pulls it while the client reads
warm        the daemon has all models: nobody asks the Hub
restarted   cold, and the daemon is killed and started again when the client has a part of a file
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from subprocess import CompletedProcess, Popen

from tests.conformance.clients import RESTARTED, WARM, Client
from tests.ground.hub import Hub
from tests.ground.hub_client import endpoint_node, endpoint_of, withhold
from tests.ground.node import Node
from tests.ground.s3 import free_ports

# What docs/hub-endpoint.md says that pods set, besides HF_ENDPOINT.
VARIABLES = {
    "HF_HUB_DOWNLOAD_TIMEOUT": "300",
    "HF_HUB_ETAG_TIMEOUT": "60",
    "HF_HUB_DISABLE_XET": "1",
}
_BEGINNING = 4 << 20
_STEP_SECONDS = 0.05
Ended = tuple[CompletedProcess[str], float]
Pod = Callable[[Path, dict[str, str]], AbstractContextManager[Popen[str]]]


class NotAsPromised(Exception):
    """The client has loaded its model, but the daemon has not done what the case promises."""


def ran(hub: Hub, client: Client, case: str, pod: Pod, timeout: float) -> Ended:
    """The ended program of a client, and the seconds from its start to its end.

    `pod`: starts it, with an empty mount and these variables.

    Raises NotAsPromised, and subprocess.TimeoutExpired after `timeout` seconds.
    """
    with _node(hub, case) as node, tempfile.TemporaryDirectory(prefix="empty-") as empty:
        repos = (client.model, *client.needs)
        if case == WARM:
            for repo in repos:
                node.pull(f"hf://{repo}")
            _await_ready(node, repos)
            hub.forget()
        Path(empty).chmod(0o755)
        began = time.monotonic()
        with pod(Path(empty), {"HF_ENDPOINT": endpoint_of(node), **VARIABLES}) as process:
            if case == RESTARTED:
                _restart(hub, node, client, process, timeout)
            output, errors = process.communicate(timeout=timeout)
            seconds = time.monotonic() - began
        if process.returncode == 0:
            if case == WARM and hub.requests:
                raise NotAsPromised(f"the daemon asked the Hub for {hub.requests[0].target}")
            _await_ready(node, repos)
        return CompletedProcess("pod", process.returncode, output, errors), seconds


@contextmanager
def _node(hub: Hub, case: str) -> Iterator[Node]:
    (port,) = free_ports(1)  # the same after a restart
    options = {"stall_seconds": 2} if case == RESTARTED else {}
    with (
        tempfile.TemporaryDirectory(prefix="endpoint-") as place,
        endpoint_node(Path(place) / "root", hub, hub_listen=f"127.0.0.1:{port}", **options) as node,
    ):
        yield node


def _await_ready(node: Node, repos: tuple[str, ...]) -> None:
    for repo in repos:
        answer = node.ready(repo.replace("/", "--"))
        if answer.status != 200:
            raise NotAsPromised(f"{repo} is not ready: {answer.document}")


def _restart(hub: Hub, node: Node, client: Client, process: Popen[str], timeout: float) -> None:
    """Kill the daemon when the client has the beginning of a file whose rest does not arrive."""
    withhold(hub, client.model, client.interrupted, _BEGINNING)
    try:
        deadline, scratch = time.monotonic() + timeout, _scratch(process)
        while process.poll() is None and not _has_part(scratch):
            if time.monotonic() > deadline:
                raise NotAsPromised(f"the client got no byte of {client.interrupted}")
            time.sleep(_STEP_SECONDS)
        node.kill()
    finally:
        hub.cdn.clear()
    node.start()


def _scratch(process: Popen[str]) -> Path:
    """The directory that a pod writes to, which only its own namespace has."""
    top = Path(f"/proc/{process.pid}")
    variables = (top / "environ").read_text().split("\0")
    (place,) = (each.removeprefix("TMPDIR=/") for each in variables if each.startswith("TMPDIR=/"))
    return top / "root" / place


def _has_part(scratch: Path) -> bool:
    """Whether the client has bytes of a file that is not complete."""
    with suppress(FileNotFoundError):  # one has just become complete
        return any(part.stat().st_size for part in scratch.rglob("*.incomplete"))
    return False
