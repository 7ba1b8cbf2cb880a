"""The main job, live: pull a real model, kill the daemon half-way, resume, load it as a pod does.

Everything runs on this machine: a Hub server with a CDN behind it stands in for the internet, at the pace
of a fair one. What is printed was measured in this run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from tests.ground import pod
from tests.ground.hub import Hub
from tests.ground.models import digests, minilm
from tests.ground.node import Node

REPO = "sentence-transformers/all-MiniLM-L6-v2"
NAME = REPO.replace("/", "--")
STREAMS = 4
BYTES_PER_SECOND = 8_000_000
PLACE = Path(__file__).parent.parent / ".demo"

console = Console(highlight=False, record=True, width=int(os.environ.get("COLUMNS", "144")))


def main() -> None:
    """Run the demonstration; any step that fails ends it with an error."""
    began = time.monotonic()
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    model = minilm()
    expected = digests(model)
    with Hub() as hub:
        commit = hub.add(REPO, {path: model / path for path in expected})
        hub.cdn.rate = BYTES_PER_SECOND
        say(
            "origin",
            f"a Hub at {hub.url} serves {REPO} ({len(expected)} files,"
            f" {decimal(sum((model / p).stat().st_size for p in expected))}),"
            f" {decimal(BYTES_PER_SECOND)}/s a connection",
        )
        options = {"hf_endpoint": hub.url, "streams": STREAMS, "listen": "127.0.0.1:0"}
        with Node(PLACE / "cache", options) as node:
            say("daemon", f"pid {node.pid} on {node.url}, root {node.root}")
            pull_and_kill(node)
            ready = resume(node, hub)
            verify(node, expected, ready)
            load(node, model, commit)
            second_pull(node, hub)
            look(node)
    say("done", f"{time.monotonic() - began:.1f} s in all")
    if picture := os.environ.get("DEMO_SVG"):
        svg = console.export_svg(title="make demo")
        Path(picture).write_text(re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL))  # no web fonts


def pull_and_kill(node: Node) -> None:
    """Pull by several streams, and kill -9 in mid-air."""
    node.pull(f"hf://{REPO}")
    say("pull", f"hf://{REPO} over {STREAMS} streams")
    while (moved := bytes_of(node))["done"] < 0.55 * moved["total"] or not moved["total"]:
        time.sleep(0.02)  # a person would watch it, too
    node.kill()
    say("kill -9", f"at {decimal(moved['done'])} of {decimal(moved['total'])}")


def resume(node: Node, hub: Hub) -> dict[str, Any]:
    """Start the daemon again: it goes on by itself. Wait for the ready file as a pod would."""
    before = hub.cdn.bytes_sent()
    node.start()
    answer = node.ready(NAME)
    if answer.status != 200:
        raise SystemExit(f"not ready: {answer.document}")
    moved = bytes_of(node)
    seconds = node.wait_for("pull ended")["seconds"]
    say(
        "resumed",
        f"{decimal(moved['resumed'])} found in the journal, hashed again and believed;"
        f" {decimal(moved['fetched'])} fetched at {decimal(round(moved['fetched'] / seconds))}/s"
        f" (the origin sent {decimal(hub.cdn.bytes_sent() - before)} of weights)",
    )
    ready: dict[str, Any] = json.loads((node.root / "ready" / f"{NAME}.json").read_bytes())
    say("ready", f"{node.root}/ready/{NAME}.json, {seconds:.1f} s after the start")
    return ready


def verify(node: Node, expected: dict[str, str], ready: dict[str, Any]) -> None:
    """Hash what was published, in both views, with a second implementation."""
    hub_view = node.root / "hub" / f"models--{NAME}" / "snapshots" / ready["hub"]["commit"]
    for view in (node.root / "models" / NAME, hub_view):
        if digests(view) != expected:
            raise SystemExit(f"{view} holds other bytes than the origin")
    links = (hub_view / "model.safetensors").stat().st_nlink
    say("digests", f"{len(expected)} files right in both views; one copy on disk, {links} links")
    say("", f"model.safetensors sha256:{expected['model.safetensors']}")


def load(node: Node, model: Path, commit: str) -> None:
    """Load it as a pod: read-only mount, another user, offline; from the directory and by repository id."""
    wanted = pod.read_model(str(model))
    if not pod.available():
        found = pod.read_model(str(node.root / "models" / NAME))
        say("loaded", "in this process: the machine permits no mount namespace (unshare -m)")
    else:
        ways = {
            "directory": (pod.LOAD_DIRECTORY, {"MODEL_DIR": f"models/{NAME}"}),
            "repository": (pod.LOAD_HUB, {"REPO": REPO}),
        }
        for way, (script, env) in ways.items():
            ended = pod.run_in_pod(node.root, script, env=env)
            if ended.returncode:
                raise SystemExit(f"the pod failed:\n{ended.stderr}")
            found = json.loads(ended.stdout.splitlines()[-1])
            say(
                "loaded",
                f"by {way}, read-only, offline: {found['tensors']} tensors, {decimal(found['bytes'])},"
                f" tokens {found['tokens'][:6]}",
            )
    if found["digest"] != wanted["digest"]:
        raise SystemExit("the pod read other tensors than the origin holds")
    say("", f"commit {commit}")


def second_pull(node: Node, hub: Hub) -> None:
    """What every replica after the first one costs."""
    before = len(hub.requests) + len(hub.cdn.requests)
    began = time.monotonic()
    answer = node.pull(f"hf://{REPO}")
    milliseconds = 1000 * (time.monotonic() - began)
    asked = len(hub.requests) + len(hub.cdn.requests) - before
    say("again", f"{answer.status} in {milliseconds:.0f} ms, {asked} requests to the origin")


def look(node: Node) -> None:
    """Where everything is."""
    say("look", f"{node.root}/models/{NAME}   --model /cache/models/{NAME}")
    say("", f"{node.root}/hub   HF_HUB_CACHE=/cache/hub HF_HUB_OFFLINE=1, --model {REPO}")


def bytes_of(node: Node) -> dict[str, int]:
    """Bytes in all, done, fetched and resumed, as the API tells them."""
    moved: dict[str, int] = node.ask("GET", f"/v1/models/{NAME}").document["pull"]["bytes"]
    return moved


def say(what: str, how: str) -> None:
    console.print(f"[bold cyan]{what:>8}[/]  {how.replace(str(PLACE.parent), '.')}", soft_wrap=True)


if __name__ == "__main__":
    main()
