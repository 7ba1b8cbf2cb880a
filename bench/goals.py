"""The goals of the benchmarks, judged by measured figures.

A figure is named `QUESTION: NAME` and comes from `figures(results)` of the question's module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench import report


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that must be at least, or at most, so much; `control` is one of the same run to compare."""

    work: str
    what: str
    figure: str
    least: float | None = None
    most: float | None = None
    control: str = ""

    @property
    def wanted(self) -> str:
        """The bound, as it is shown."""
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"

    def met(self, measured: float) -> bool:
        """Whether the figure is within the bound."""
        if self.least is not None:
            return measured >= self.least
        return self.most is not None and measured <= self.most


DISK, TLS, MEMORY = "disk, plaintext", "disk, TLS", "memory, plaintext"
FILE = "one file, verified"
GOALS = (
    Goal(f"{FILE}, to disk", "speed / hf_transfer", f"cold: {DISK} / hf_transfer", least=1.5),
    Goal(f"{FILE}, to disk", "speed / awscrt", f"cold: {DISK} / awscrt", least=1.5),
    Goal(f"{FILE}, to disk", "speed / aria2c", f"cold: {DISK} / aria2c -x16", least=3),
    Goal(f"{FILE}, to memory", "speed / aria2c", f"cold: {MEMORY} / aria2c -x16", least=1.9),
    Goal(
        f"{FILE}, to memory", "speed / sha256 of one core", f"cold: {MEMORY} / sha256 of one core", least=0.85
    ),
    Goal(f"{FILE}, to disk over TLS", "speed / fastest peer", f"cold: {TLS} / fastest peer", least=1),
    Goal("S3 with crc64nvme, to memory", "speed / unverified", "cold: crc64nvme / unverified", least=0.85),
    Goal("a model of 8 shards, verified", "speed / fastest peer", "models: shards / fastest peer", least=2),
    Goal(
        "2,000 small files, verified, to disk",
        "speed / snapshot_download",
        "models: small / huggingface_hub snapshot_download",
        least=3,
    ),
    Goal(
        "2,000 small files, verified, to disk",
        "speed / fastest peer",
        "models: small / fastest peer",
        least=1,
    ),
    Goal("kill -9", "MB fetched again", "resume: MB fetched again", most=67.2),
    Goal("start with 1,000 snapshots", "seconds to /readyz", "start: seconds, 1000 snapshots", most=1),
    Goal(
        "/ready while a pull takes every core",
        "p99, ms",
        "ready: ready p99 ms, saturated",
        most=25,
        control="ready: control p99 ms, saturated",
    ),
)
COLUMNS = ("work", "figure", "goal", "measured", "", "its control")


def judged(figures: Mapping[str, float]) -> list[list[str]]:
    """The cells below `COLUMNS`, one line for each goal, also for one that was not measured."""
    lines = []
    for goal in GOALS:
        measured, control = figures.get(goal.figure), figures.get(goal.control)
        shown = "" if measured is None else f"{measured:.3g}"
        verdict = "not measured" if measured is None else "met" if goal.met(measured) else "not met"
        lines.append(
            [goal.work, goal.what, goal.wanted, shown, verdict, "" if control is None else f"{control:.3g}"]
        )
    return lines


def table(figures: Mapping[str, float]) -> object:
    """For the terminal."""
    return report.table("goals", COLUMNS, judged(figures))


def markdown(figures: Mapping[str, float]) -> str:
    """For the page."""
    return report.markdown(COLUMNS, judged(figures))
