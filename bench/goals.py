"""The goals of the byte engine, judged by the figures of one run: nothing here is typed in but the goals.

A figure is named QUESTION: NAME and comes from `figures(results)` of the question's module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench import report


@dataclass(frozen=True, slots=True)
class Goal:
    """`figure` is to be at least, or at most, `bound`."""

    work: str
    what: str
    figure: str
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"

    def met(self, measured: float) -> bool:
        if self.least is not None:
            return measured >= self.least
        return self.most is not None and measured <= self.most


UNVERIFIED = "unverified, plaintext, to memory"
DURABLE = "verified and durable, to disk"
VERIFIED = "verified pull of one file"
SHARDS = "verified pull of a multi-shard model"
SMALL = "small files"
GOALS = (
    Goal(UNVERIFIED, "speed / raw recv_into + pwrite", "cold: unverified / raw limit", least=0.85),
    Goal(UNVERIFIED, "speed / aria2c", "cold: unverified / aria2c -x16", least=4),
    Goal(UNVERIFIED, "speed / hf_transfer", "cold: unverified / hf_transfer", least=2.5),
    Goal(UNVERIFIED, "speed / awscrt", "cold: unverified / awscrt", least=3),
    Goal(UNVERIFIED, "speed / curl", "cold: unverified / curl", least=2),
    Goal(UNVERIFIED, "speed / s5cmd", "cold: unverified / s5cmd", least=2),
    Goal(UNVERIFIED, "CPU s/GB", "cold: unverified CPU s/GB", most=0.30),
    Goal(DURABLE, "speed / hf_transfer", "cold: durable / hf_transfer", least=1.5),
    Goal(DURABLE, "speed / awscrt", "cold: durable / awscrt", least=1.5),
    Goal(DURABLE, "speed / aria2c --checksum", "cold: durable / aria2c -x16", least=3),
    Goal(VERIFIED, "speed / sha256 of one core", "cold: verified / sha256 of one core", least=0.85),
    Goal(VERIFIED, "speed / aria2c --checksum", "cold: verified / aria2c --checksum", least=1.9),
    Goal(SHARDS, "speed / what the cores allow", "models: shards / cores", least=0.85),
    Goal(SHARDS, "speed / fastest verified peer", "models: shards / fastest peer", least=2),
    Goal("S3 with crc64nvme", "speed / unverified", "cold: crc64nvme / unverified", least=0.85),
    Goal("TLS", "speed / fastest peer", "cold: tls / fastest peer", least=1),
    Goal("TLS", "CPU / aria2c's", "cold: tls CPU / aria2c's", most=0.85),
    Goal("memory", "anonymous MB, 32 streams, any size", "growth: anonymous MB, 32 streams", most=120),
    Goal("/ready under a saturating pull", "p99, ms", "warm: ready p99 ms, saturated", most=25),
    Goal("start with 1,000 snapshots", "seconds to /readyz", "start: seconds, 1000 snapshots", most=1),
    Goal("bandwidth limits and shares", "farthest off", "bandwidth: off at most", most=0.05),
    Goal("memory", "speed of warm / sequential reads of the disk", "upkeep: warm / disk", least=0.9),
    Goal("memory", "share resident after verify", "upkeep: resident after verify", least=1),
    Goal("one flipped bit", "MiB fetched", "upkeep: repair: MiB fetched", most=32),
    Goal("rollback", "seconds", "upkeep: rollback: seconds", most=1),
    Goal(SMALL, "speed / snapshot_download", "models: small / snapshot_download", least=3),
    Goal(SMALL, "speed / aria2c -j16", "models: small / aria2c", least=1),
    Goal("many cores", "GB/s a process, plaintext", "gil: GB/s ceiling, plaintext", least=5),
    Goal("eviction", "bytes refetched / LRU's", "trace: bytes refetched, cachd to LRU", most=0.9),
    Goal("a day on a small disk", "what must not happen", "day: what must not happen", most=0),
    Goal("many cores", "GB/s a process, TLS", "gil: GB/s ceiling, TLS", least=3),
)
COLUMNS = ("work", "figure", "goal", "measured", "")


def judged(figures: Mapping[str, float]) -> list[list[str]]:
    """The cells below `COLUMNS`, one line for every goal; a figure that is missing is told."""
    lines = []
    for goal in GOALS:
        measured = figures.get(goal.figure)
        shown = "" if measured is None else f"{measured:.3g}"
        verdict = "not measured" if measured is None else "met" if goal.met(measured) else "not met"
        lines.append([goal.work, goal.what, goal.wanted, shown, verdict])
    return lines


def table(figures: Mapping[str, float]) -> object:
    return report.table("goals", COLUMNS, judged(figures))


def markdown(figures: Mapping[str, float]) -> str:
    return report.markdown(COLUMNS, judged(figures))
