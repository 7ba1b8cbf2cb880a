"""Takes the README's pictures of the web pages: `make pictures`.

The daemon is real, over a Hub of the tests: it serves two models, pulls a third, and cannot pull a fourth. It
listens where a user's does, as its address is in the picture.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.ground.browser import DARK, LIGHT, chromium, visit
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.needs import lacking
from tests.ground.node import Node

DOCS = Path(__file__).parent
MIB = 1 << 20
SIZE = (1060, 1045)
PINNED, LEASED, PULLED, GATED = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "BAAI/bge-m3",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "meta-llama/Llama-3.1-8B-Instruct",
)


def renew() -> None:
    """Write a picture for each colour scheme. Raises SystemExit where the machine has no browser."""
    if reason := lacking("chromium"):
        raise SystemExit(f"{reason}: apt-get install chromium-headless-shell")
    with tempfile.TemporaryDirectory() as place, Hub() as hub:
        options = {"listen": "127.0.0.1:8470", "hf_endpoint": hub.url, "retries": 0}
        with Node(Path(place) / "node", options) as node:
            _fill(hub, node)
            _take(node)


def _fill(hub: Hub, node: Node) -> None:
    for number, repo in enumerate((PINNED, LEASED, PULLED, GATED)):
        files = {"config.json": b"{}", "model.safetensors": noise((number + 1) * 24 * MIB, number)}
        hub.add(repo, files, gated=repo == GATED)
    hub.cdn.hold(hub.cdn_path(PULLED, "model.safetensors"), after=3 * MIB)
    for repo in (PINNED, LEASED, GATED):
        node.pull(f"hf://{repo}")
        node.ready(repo.replace("/", "--"))
    node.ask("PUT", f"/v1/models/{PINNED.replace('/', '--')}/pin")
    lease = {"seconds": 600, "holder": "pod/embeddings-0"}
    node.ask("POST", f"/v1/models/{LEASED.replace('/', '--')}/leases", lease)
    node.pull(f"hf://{PULLED}")
    node.wait_for("part made durable", path="model.safetensors")


def _take(node: Node) -> None:
    with chromium() as browser:
        for scheme in (LIGHT, DARK):
            with visit(browser, node.url, size=SIZE, scheme=scheme) as page:
                page.locator(".failure:visible").wait_for()
                page.locator("progress:visible").wait_for()
                page.locator("#disk-text:visible").wait_for()
                page.screenshot(path=DOCS / f"status-{scheme}.png", animations="disabled")


if __name__ == "__main__":
    renew()
