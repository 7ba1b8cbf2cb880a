"""What a pull costs against the size of its file, its streams, its files, and the pulls beside it.

Each point is a daemon of its own that has pulled something small before: CPU seconds and the peak of
anonymous memory. The growth is the exponent of a power law: of the fit through all points, and of the last
step alone, which no fixed cost hides. At most 1 is linear, 0 does not grow at all; above 1 would be worse.

Bytes are unverified; files are listed in SHA256SUMS and verified. Streams are as many as pay, so the series
of streams takes its bytes from an origin that gives 40 MB/s a connection (bench/pacing.py), and more bytes
for more streams: its CPU seconds are those of a GB.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
from rich.console import Group

from bench import report
from bench.measure import (
    GIB,
    MIB,
    Failed,
    Run,
    available_bytes,
    daemon,
    interleaved,
    observed,
    pulled,
    serving,
    sink,
    spread,
    warmed,
)
from bench.pacing import Pace, Paced, paced
from bench.report import GB, MB, Options
from tests.ground.node import Node

RUNS = 2
SIZES = (GIB // 4, GIB, 4 * GIB, 8 * GIB)
STREAMS = (1, 2, 4, 8, 16, 32)
FILES = (10, 100, 1000, 10_000)
PULLS = (1, 2, 4, 8, 16)
QUICK = {"size": (16 * MIB, 64 * MIB), "streams": (1, 4), "files": (10, 40), "pulls": (1, 2)}
FULL = {"size": SIZES, "streams": STREAMS, "files": FILES, "pulls": PULLS}
FILE_BYTES = 4096
PULL_BYTES = 256 * MIB
PACE = Pace(link=2000 * MB)
LEAST_STREAMED, STREAMED = 512 * MIB, 96 * MIB  # at least, and a stream: the climb to 32 takes 2 GB
LINEAR, FLAT = 1.1, 0.1
TICK_SECONDS = 0.01
UNITS = {"size": "GiB", "streams": "streams", "files": "files", "pulls": "pulls"}
WARM = "warm"


def run(options: Options) -> dict[str, Any]:
    """Every series, its points interleaved."""
    runs = options.runs or (1 if options.quick else RUNS)
    results = report.head("growth", options, runs=runs, series=[])
    chosen = QUICK if options.quick else FULL
    with sink("memory") as web, sink("memory") as place:
        bed = Bed(web, place, small=options.quick)
        hollow(web / WARM, MIB)
        with serving(web) as origin:
            bed.url = origin.url
            sizes = [size for size in chosen["size"] if size * 1.5 < available_bytes()]
            results["series"].append(series("size", sizes, bed.of_size, runs))
            results["series"].append(series("pulls", chosen["pulls"], bed.of_pulls, runs))
        with sink("small files") as many, sink("small files") as root, serving(many) as origin:
            small = Bed(many, root, small=options.quick)
            small.url = origin.url
            hollow(many / WARM, MIB)
            results["series"].append(series("files", chosen["files"], small.of_files, runs))
        with paced(web, PACE) as slow:
            bed.url = slow.url
            found = series("streams", chosen["streams"], lambda streams: bed.of_streams(streams, slow), runs)
            for point in found["points"]:
                point["at_work"] = bed.at_work.get(point["x"], 0)
            results["series"].append(found)
    return results


def series(name: str, xs: Iterable[int], measure: Callable[[int], Run], runs: int) -> dict[str, Any]:
    """The runs of every point."""
    ways: dict[str, Callable[[], Run]] = {}
    for x in xs:
        ways[f"{name} {x}"] = lambda x=x: measure(x)  # type: ignore[misc]
    measured = interleaved(ways, runs)
    points = [
        {"x": int(label.rpartition(" ")[2]), "runs": [asdict(run) for run in found]}
        for label, found in measured.items()
    ]
    return {"name": name, "points": points}


class Bed:
    """Where one point is measured: an origin's directory and URL, and a place for the daemon's root."""

    def __init__(self, web: Path, place: Path, *, small: bool) -> None:
        self.url = ""
        self.at_work: dict[int, int] = {}
        self._web, self._place, self._small = web, place, small

    def of_size(self, size: int) -> Run:
        hollow(self._web / "one", size)
        warmed(self._place, size)
        with self._node() as node:
            return together(node, {"one": f"{self.url}/one"})

    def of_files(self, count: int) -> Run:
        directory = self._web / f"files-{count}"
        if not directory.exists():
            scattered(directory, count)
        with self._node() as node:
            return together(node, {"files": f"{self.url}/files-{count}/"})

    def of_pulls(self, count: int) -> Run:
        size = PULL_BYTES // 32 if self._small else PULL_BYTES
        refs = {f"pull-{number}": f"{self.url}/pull-{number}" for number in range(count)}
        for name in refs:
            hollow(self._web / name, size)
        warmed(self._place, count * size)
        with self._node(pulls=count) as node:
            return together(node, refs)

    def of_streams(self, count: int, origin: Paced) -> Run:
        """What a GB costs; how many connections were at work at once is noted."""
        size = 8 * MIB * count if self._small else max(LEAST_STREAMED, STREAMED * count)
        hollow(self._web / "streamed", size)
        warmed(self._place, size)
        with self._node(streams=count) as node:
            before = len(origin.record())
            run = together(node, {"streamed": f"{self.url}/streamed"})
        at_work = max(sample.connections for sample in origin.record()[before:])
        self.at_work[count] = max(self.at_work.get(count, 0), at_work)
        return Run(run.seconds, run.cpu_seconds / size * GB, run.anonymous_bytes)

    @contextmanager
    def _node(self, **options: object) -> Iterator[Node]:
        with daemon(self._place / "cache", **options) as node:
            pulled(node, f"{self.url}/{WARM}")
            yield node


def hollow(path: Path, size: int) -> None:
    """A file of holes: no memory, and nobody looks at its bytes."""
    with path.open("wb") as file:
        file.truncate(size)


def scattered(directory: Path, count: int) -> None:
    """Small files that differ, and their SHA256SUMS."""
    directory.mkdir()
    lines = []
    for number in range(count):
        content = number.to_bytes(8) * (FILE_BYTES // 8)
        (directory / f"{number:05}.json").write_bytes(content)
        lines.append(f"{hashlib.sha256(content).hexdigest()} *{number:05}.json\n")
    (directory / "SHA256SUMS").write_text("".join(lines))


def together(node: Node, refs: Mapping[str, str]) -> Run:
    """All pulled at once, until the last is ready; deleted again."""

    def pull() -> None:
        for name, ref in refs.items():
            node.pull(ref, name=name)
        for name in refs:
            while (answer := node.ready(name, wait=50)).status in (202, 503):
                if "Retry-After" not in answer.headers:
                    break
            if answer.status != 200:
                raise Failed(f"{name} is not ready: {answer.document}")

    run = observed(node.pid, pull)
    for name in refs:
        if (deleted := node.ask("DELETE", f"/v1/models/{name}")).status >= 400:
            raise Failed(f"{name} cannot be deleted: {deleted.document}")
    return run


# told


def values(found: dict[str, Any], figure: str) -> list[float]:
    """The median of each point, in the order of the points; CPU is counted in ticks, and is one at least."""
    middles = [statistics.median(run[figure] for run in point["runs"]) for point in found["points"]]
    return [max(middle, TICK_SECONDS) for middle in middles]


def fitted(xs: Iterable[float], ys: Iterable[float]) -> float:
    """The exponent of the power law through the points, by least squares of the logarithms."""
    slope, _ = numpy.polyfit([math.log(x) for x in xs], [math.log(y) for y in ys], 1)
    return float(slope)


def growth(found: dict[str, Any], figure: str) -> tuple[float, float]:
    """Exponents: of the fit, and of the last step."""
    xs, ys = [float(point["x"]) for point in found["points"]], values(found, figure)
    return fitted(xs, ys), fitted(xs[-2:], ys[-2:])


def verdict(exponents: tuple[float, float]) -> str:
    worst = max(exponents)
    if worst > LINEAR:
        return "worse than linear"
    if worst > 1 - FLAT:
        return "linear"
    return "less than linear" if worst > FLAT else "does not grow"


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The most memory with 32 streams allowed, whatever the size; the exponents."""
    told: dict[str, float] = {}
    with_all: list[float] = []
    for found in results["series"]:
        for figure, what in (("cpu_seconds", "CPU"), ("anonymous_bytes", "memory")):
            if len(found["points"]) > 1:
                told[f"{what} against {found['name']}, exponent"] = max(growth(found, figure))
        if found["name"] in ("size", "streams"):
            with_all += [
                max(run["anonymous_bytes"] for run in point["runs"]) / MB
                for point in found["points"]
                if found["name"] == "size" or point["x"] == max(STREAMS)
            ]
    if with_all and not results["quick"]:
        told["anonymous MB, 32 streams"] = max(with_all)
    return told


POINTS = ("against", "", "CPU s", "anonymous MB", "seconds", "connections at work")
FITS = ("against", "CPU: exponent (last step)", "", "memory: exponent (last step)", "")


def points(results: dict[str, Any]) -> list[list[str]]:
    lines = []
    for found in results["series"]:
        name = found["name"]
        for point in found["points"]:
            x = f"{point['x'] / GIB:g}" if name == "size" else str(point["x"])
            runs = point["runs"]
            lines.append(
                [
                    name,
                    f"{x} {UNITS[name]}",
                    spread(run["cpu_seconds"] for run in runs) + (" a GB" if name == "streams" else ""),
                    f"{max(run['anonymous_bytes'] for run in runs) / MB:.0f}",
                    spread(run["seconds"] for run in runs),
                    str(point.get("at_work", "")),
                ]
            )
    return lines


def fits(results: dict[str, Any]) -> list[list[str]]:
    lines = []
    for found in results["series"]:
        line = [found["name"]]
        for figure in ("cpu_seconds", "anonymous_bytes"):
            if len(found["points"]) > 1:
                exponents = growth(found, figure)
                line += [f"{exponents[0]:.2f} ({exponents[1]:.2f})", verdict(exponents)]
            else:
                line += ["one point", ""]
        lines.append(line)
    return lines


def table(results: dict[str, Any]) -> Group:
    return Group(
        report.table("what a pull costs", POINTS, points(results)),
        report.table("how that grows", FITS, fits(results)),
    )


def markdown(results: dict[str, Any]) -> str:
    return f"{report.markdown(POINTS, points(results))}\n{report.markdown(FITS, fits(results))}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Both figures against each series, logarithmic both ways."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = (("cpu_seconds", "CPU s", 1.0), ("anonymous_bytes", "anonymous MB", MB))
    figure, axes = pyplot.subplots(
        2,
        len(results["series"]),
        figsize=(3.2 * len(results["series"]), 6),
        squeeze=False,
        layout="constrained",
    )
    for column, found in enumerate(results["series"]):
        xs = [point["x"] / (GIB if found["name"] == "size" else 1) for point in found["points"]]
        for axis, (name, unit, scale) in zip(axes[:, column], kinds, strict=True):
            axis.loglog(xs, [value / scale for value in values(found, name)], "o-", color="tab:orange")
            axis.set_xlabel(UNITS[found["name"]])
            axis.set_ylabel(unit + (" a GB" if found["name"] == "streams" and name == "cpu_seconds" else ""))
            axis.set_ylim(
                bottom=min(values(found, name)) / scale / 3, top=max(values(found, name)) / scale * 3
            )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
