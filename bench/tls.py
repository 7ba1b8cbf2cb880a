"""Cold pull of one file over TLS: what bench/cold.py does in the clear. The origin enciphers on one core."""

from __future__ import annotations

from typing import Any

from bench import cold
from bench.cold import FORMS, RAW_HASHED, cpu, markdown, plot, ratio, seconds, speed, table
from bench.peers import PEERS
from bench.report import Options

__all__ = ["figures", "markdown", "plot", "run", "table"]


def run(options: Options) -> dict[str, Any]:
    """Every way to each sink."""
    return cold.run(options, tls=True)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """To memory: the goals, and what bare threads make of them."""
    [memory] = [c["rows"] for c in results["cases"] if c["sink"] == "memory"]
    size = results["size_bytes"]
    ahead = [found for form in FORMS for peer in PEERS if (found := speed(memory, form, peer.name))]
    peers = [found for peer in PEERS if (found := seconds(memory, peer.name, "unverified"))]
    found = {
        "speed / fastest peer": min(ahead, default=None),
        "raw limit with parts hashed / fastest peer": ratio(
            min(peers, default=None), seconds(memory, RAW_HASHED, "limit")
        ),
        "CPU / aria2c's": ratio(
            cpu(memory, "cachd", "unverified", size), cpu(memory, "aria2c -x16", "unverified", size)
        ),
    }
    return {name: value for name, value in found.items() if value is not None}
