"""Cold pull of one file over TLS: what bench/cold.py does in the clear. The origin enciphers on one core.

Deciphering is the library's work. Peers bring theirs along or take the system's, as cachd does here; with the
one that its image brings along it is measured, too.
"""

from __future__ import annotations

from typing import Any

from bench import cold
from bench.cold import FORMS, IMAGE, RAW_HASHED, cpu, plot, ratio, seconds, speed, table
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
    peers = [found for peer in PEERS if (found := seconds(memory, peer.name, "unverified"))]
    aria2c = cpu(memory, "aria2c -x16", "unverified", size)
    found = {
        "raw limit with parts hashed / fastest peer": ratio(
            min(peers, default=None), seconds(memory, RAW_HASHED, "limit")
        ),
        "raw limit with parts hashed, CPU / aria2c's": ratio(cpu(memory, RAW_HASHED, "limit", size), aria2c),
    }
    for name, said in (("cachd", ""), (IMAGE, ", OpenSSL of the image")):
        ahead = [f for form in FORMS for peer in PEERS if (f := speed(memory, form, peer.name, name))]
        found[f"speed / fastest peer{said}"] = min(ahead, default=None)
        found[f"CPU / aria2c's{said}"] = ratio(cpu(memory, name, "unverified", size), aria2c)
    return {name: value for name, value in found.items() if value is not None}


def markdown(results: dict[str, Any]) -> str:
    """The tables, below what the rows of cachd stand on."""
    told = results["openssl"]
    image = f"; `{IMAGE}` on {told['image']}" if told["image"] else ""
    return f"cachd and the limits stand on {told['here']}{image}.\n\n{cold.markdown(results)}"
