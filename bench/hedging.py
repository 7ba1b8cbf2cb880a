"""How much one slow connection of many delays a pull.

    python -m bench.hedging [--pairs 3] [--streams 8,16,32]

An origin gives each connection the same rate, and one of them 20 kB/s from its first file on. Another
connection then takes over what is left of the slow one's file (cachd/transfer/hedging.py). Each pair of pulls
is one without and one with a slow connection, of other bytes, by one daemon. docs/decisions/0008 has figures.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measure import MIB
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.test_hedging import Throttled

FILES_FOR_EACH = 4  # connection, of 1 MiB
RATES = {8: 1.0 * MIB, 16: 0.5 * MIB, 32: 0.5 * MIB}
MOST_TIMES, MOST_TWICE = 1.15, 0.03


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hedging", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="pairs of pulls; medians are shown")
    parser.add_argument("--streams", default="8,16,32", help="numbers of connections")
    asked = parser.parse_args()
    logging.getLogger("aiohttp.server").disabled = True  # it reports each connection that is given up
    shown = Table("connections", "rate of each", "without, s", "with one slow, s", "times", "bytes twice")
    for streams in map(int, asked.streams.split(",")):
        shown.add_row(*measured(streams, asked.pairs))
    Console().print(shown)
    Console().print(f"goals: at most {MOST_TIMES} times as long, at most {MOST_TWICE:.0%} of the bytes twice")


def measured(streams: int, pairs: int) -> tuple[str, ...]:
    """The row of the table for so many connections."""
    rate = RATES.get(streams, 0.5 * MIB)
    without, slow, times, twice = [], [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="hedging-") as place,
        Origin() as origin,
        Node(Path(place), {"streams": streams, "retries": 0, "allow": ["127.0.0.0/8"]}) as node,
    ):
        origin.rate = rate
        pulled(node, origin, "warm", streams)
        for pair in range(pairs):
            without.append(pulled(node, origin, f"without-{pair}", streams))
            origin.forget()
            origin.fault("*", Throttled())
            slow.append(pulled(node, origin, f"slow-{pair}", streams))
            origin.clear()
            times.append(slow[-1] / without[-1])
            twice.append(origin.bytes_sent() / (FILES_FOR_EACH * streams * MIB) - 1)
    return (
        str(streams),
        f"{rate / MIB:.1f} MiB/s",
        *(f"{statistics.median(seconds):.1f}" for seconds in (without, slow)),
        f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})",
        f"{max(twice):.2%}",
    )


def pulled(node: Node, origin: Origin, name: str, streams: int) -> float:
    """The seconds until a model of new bytes is ready."""
    paths = [f"model-{number:05}.safetensors" for number in range(FILES_FOR_EACH * streams)]
    ref = origin.add_model(name, {path: os.urandom(MIB) for path in paths})
    began = time.monotonic()
    node.pull(ref, name=name)
    ready = node.ready(name)
    if ready.status != 200:
        raise RuntimeError(f"{name}: {ready.document}")
    return time.monotonic() - began


if __name__ == "__main__":
    main()
