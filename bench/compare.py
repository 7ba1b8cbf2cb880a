"""Whether one checkout is slower than another: `python -m bench.compare BEFORE [AFTER] [--pairs N]`.

Both run with this interpreter, in turn, and who is first changes with each pair:

    pull      one file of 512 MiB, verified by its sha256, from asking until it is ready
    small     a model of 2,000 files of 4 KiB
    answers   40,000 `/ready` answers on 4 connections while a file of 512 MiB is pulled again and again,
              limited to 200 MiB/s, so that both checkouts pull the same amount meanwhile
    start     from exec until it listens, over the root of all that was pulled

The ratio is before / after: over 1 is faster. Of each the median and the 95 % interval of the mean (of the
logarithms, Student's t) are printed; the exit status is 1 when an interval lies wholly below 0.95.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import math
import statistics
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

from bench.measure import KIB, MIB, PROJECT, Failed, random_file, serving, sink, warmed
from tests.ground.meanwhile import meanwhile
from tests.ground.node import Node

PAIRS = 15
SLOWER = 0.95
STUDENT = {5: 2.571, 10: 2.228, 14: 2.145, 20: 2.086, 30: 2.042}  # 97.5 % quantiles by degrees of freedom
BIG, SMALL_FILES = 512 * MIB, 2000
ANSWERS, CONNECTIONS = 40_000, 4
MEASURES = ("pull", "small", "answers", "start")
OPTIONS = {"scrub_bytes_per_second": 0}
SLOWLY = {"limit_bytes_per_second": 200 * MIB}


def main(arguments: list[str]) -> int:
    """Compare, print the ratios, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=PROJECT)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    asked = parser.parse_args(arguments)
    with sink("small files") as place, serving(filled(place / "origin")) as nginx:
        took: dict[str, dict[str, list[float]]] = {
            tree: {name: [] for name in MEASURES} for tree in ("before", "after")
        }
        for pair in range(asked.pairs + 1):
            order = ("before", "after") if pair % 2 else ("after", "before")
            for tree in order:
                warmed(place, BIG)
                found = measured(getattr(asked, tree), place / f"{tree}-{pair}", nginx.url)
                for name, seconds in found.items() if pair else ():
                    took[tree][name].append(seconds)
            print(f"pair {pair} of {asked.pairs}" if pair else "warm", file=sys.stderr, flush=True)
    slower = False
    for name in MEASURES:
        ratios = [b / a for b, a in zip(took["before"][name], took["after"][name], strict=True)]
        low, high = interval(ratios)
        slower |= high < SLOWER
        middle = statistics.median(ratios)
        both = " and ".join(f"{statistics.median(took[tree][name]):.3f} s" for tree in took)
        print(f"{name:8} {middle:.3f} ({low:.3f} to {high:.3f}); {both}")
    return 1 if slower else 0


def filled(origin: Path) -> Path:
    """A directory with one large file, and with 2,000 small ones and their checksums."""
    (origin / "small").mkdir(parents=True)
    (origin / "big").mkdir()
    digest = random_file(origin / "big/model.bin", BIG)
    (origin / "big/SHA256SUMS").write_text(f"{digest}  model.bin\n")
    lines = []
    for number in range(SMALL_FILES):
        content = number.to_bytes(4, "big") * KIB
        (origin / f"small/{number:04}").write_bytes(content)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {number:04}\n")
    (origin / "small/SHA256SUMS").write_text("".join(lines))
    return origin


def measured(tree: Path, root: Path, url: str) -> dict[str, float]:
    """Seconds of each measure, of a daemon of this checkout over a new root."""
    # Python may keep bytecode, as it does for an installed daemon.
    program = ("env", "-u", "PYTHONDONTWRITEBYTECODE", "-C", str(tree), sys.executable, "-m", "cachd")
    found: dict[str, float] = {}
    for options, measures in ((OPTIONS, (pull, small)), (OPTIONS | SLOWLY, (answers, start))):
        node = Node(root, options, program=program, CACHD_LOG_LEVEL="info", PYTHONPATH=str(tree))
        with node:
            found |= {measure.__name__: measure(node, url) for measure in measures}
    for path in sorted(root.rglob("*"), reverse=True):
        path.chmod(0o755) if path.is_dir() and not path.is_symlink() else None
    return found


def pull(node: Node, url: str, name: str = "big") -> float:
    """Seconds from the request until the model is ready, for the large file or for `name`."""
    began = time.monotonic()
    answer = node.pull(f"{url}/{name}/", name=name)
    if answer.status >= 400 or (answer := node.ready(name)).status != 200:
        raise Failed(f"{name}: {answer.document}")
    return time.monotonic() - began


def small(node: Node, url: str) -> float:
    """The same, for the small files."""
    return pull(node, url, "small")


def answers(node: Node, url: str) -> float:
    """Four clients ask without a pause."""
    with pulling(node, url):
        began = time.monotonic()
        clients = [threading.Thread(target=ask, args=(node.url,)) for _ in range(CONNECTIONS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return time.monotonic() - began


def ask(url: str) -> None:
    """One client's requests."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    for _ in range(ANSWERS // CONNECTIONS):
        connection.request("GET", "/v1/models/small/ready")
        if (answer := connection.getresponse()).status != 200:
            raise Failed(f"/ready answered {answer.status}")
        answer.read()
    connection.close()


def pulling(node: Node, url: str) -> AbstractContextManager[None]:
    """Pull the large file and delete it, again and again meanwhile."""

    def again(ended: threading.Event) -> None:
        while not ended.is_set():
            node.ask("DELETE", "/v1/models/big?force=true")
            pull(node, url)

    return meanwhile(again)


def start(node: Node, _: str) -> float:
    """Seconds of a new start."""
    node.stop()
    began = time.monotonic()
    node.start()
    return time.monotonic() - began


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean ratio."""
    logarithms = [math.log(ratio) for ratio in ratios]
    freedom = len(ratios) - 1
    if freedom < 1:
        return ratios[0], ratios[0]
    quantile = next((q for degrees, q in sorted(STUDENT.items(), reverse=True) if degrees <= freedom), 12.7)
    half = quantile * statistics.stdev(logarithms) / math.sqrt(len(ratios))
    mean = statistics.mean(logarithms)
    return math.exp(mean - half), math.exp(mean + half)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
