"""Takes the pictures of the pages anew: `make pictures`.

    docs/first-hour/*.svg    the screens of docs/first_hour.py
    docs/status-*.png        the status page, in Chromium

Paths, addresses, times, rates and the figures of the disk in them are always the same, so a picture changes
when what it shows has changed. On another machine, two things may differ: what the doctor says about it (its
file system, its user, its certificates), and how its Chromium draws.
"""

from __future__ import annotations

import io
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from docs.first_hour import SIZE, Screen, play
from tests.ground.browser import DARK, LIGHT, chromium, visit
from tests.ground.hub import Hub
from tests.ground.needs import NEEDS, lacking
from tests.ground.node import Node
from tests.ground.weights import safetensors

if TYPE_CHECKING:
    from playwright.sync_api import Route

DOCS = Path(__file__).parent
SCREENS = DOCS / "first-hour"
MIB = 1 << 20
PAGE_SIZE = (1060, 1045)
DISK = {
    "total_bytes": 1_900_000_000_000,
    "free_bytes": 1_200_000_000_000,
    "available_bytes": 1_100_000_000_000,
    "used_bytes": 94_400_000,
    "reserved_bytes": 56_600_000,
}
PINNED, LEASED, PULLED, GATED = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "BAAI/bge-m3",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "meta-llama/Llama-3.1-8B-Instruct",
)


def renew() -> None:
    """Write every picture. Raises SystemExit where the machine lacks what takes them."""
    for need in ("tmux", "chromium"):
        if reason := lacking(need):
            raise SystemExit(f"{reason}: apt-get install {NEEDS[need].debian}")
    SCREENS.mkdir(exist_ok=True)
    for screen in play():
        (SCREENS / f"{screen.name}.svg").write_text(drawn(screen))
    _status_page()


def drawn(screen: Screen) -> str:
    """A screen as SVG, in the fonts of who looks at it."""
    text = Text.from_ansi(screen.colours)
    width = max(SIZE[0], *map(len, text.plain.splitlines()))
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(text)
    svg = console.export_svg(title="cachd", unique_id=screen.name)
    return re.sub(r"\s*@font-face \{.*?\}(?=\n)", "", svg, flags=re.DOTALL)


# --- the status page ---


def _status_page() -> None:
    with tempfile.TemporaryDirectory() as place, Hub() as hub:
        options = {"listen": "127.0.0.1:8470", "hf_endpoint": hub.url, "retries": 0}
        with Node(Path(place) / "node", options) as node:
            _fill(hub, node)
            _take(node)


def _fill(hub: Hub, node: Node) -> None:
    """Let the node serve two models, pull a third, and fail to pull a fourth."""
    for number, repo in enumerate((PINNED, LEASED, PULLED, GATED)):
        files = {"config.json": b"{}", "model.safetensors": safetensors((number + 1) * 24 * MIB)}
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
            with visit(browser, node.url, size=PAGE_SIZE, scheme=scheme) as page:
                page.route(re.compile(r"/v1/(models\?|capacity)"), _always_same)
                page.reload()
                page.locator(".failure:visible").wait_for()
                page.locator("progress:visible").wait_for()
                page.locator("#disk-text:visible").wait_for()
                page.screenshot(path=DOCS / f"status-{scheme}.png", animations="disabled")


def _always_same(route: Route) -> None:
    """The daemon's answer, with other figures where they differ from run to run."""
    answer = route.fetch()
    document = answer.json()
    if "models" not in document:
        document |= DISK
    for model in document.get("models", ()):
        for lease in model["leases"]:
            lease["expires_at"] = f"{datetime.now(UTC):%Y-%m-%d}T11:20:47Z"
        if model["ready"]:
            model["resident_bytes"] = model["ready"]["bytes"]
        if model["state"] == "downloading":
            model["pull"] |= {"rate_bytes_per_second": 9_400_000, "eta_seconds": 6, "waits": None}
            model["pull"]["bytes"]["done"] = 18_900_000
            model["pull"]["files"]["done"] = 1
    route.fulfill(response=answer, json=document)


if __name__ == "__main__":
    renew()
