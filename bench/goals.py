"""The goals of the byte engine, judged by the figures of one run: nothing here is typed in but the goals.

A figure is named QUESTION: NAME and comes from `figures(results)` of the question's module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench import report


@dataclass(frozen=True, slots=True)
class Goal:
    """`figure` is to be at least, or at most, so much.

    `limit` says what stands in the way on this machine; `reach` is the figure that it would make by itself.
    """

    work: str
    what: str
    figure: str
    least: float | None = None
    most: float | None = None
    limit: str = ""
    reach: str = ""

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
TLS_OF_IMAGE = "TLS, with the OpenSSL of the image"
WITH_PARTS = "recv_into + pwrite alone, with a hash for each part"
WITH_DIGEST = f"{WITH_PARTS} and sha256 beside it"
OF_SHARDS = "four threads that receive, hash and write alone"
GOALS = (
    Goal(
        UNVERIFIED,
        "speed / raw recv_into + pwrite",
        "cold: unverified / raw limit",
        least=0.85,
        limit=WITH_PARTS,
        reach="cold: raw limit with parts hashed / raw limit",
    ),
    *(
        Goal(
            UNVERIFIED,
            f"speed / {peer.partition(' ')[0]}",
            f"cold: unverified / {peer}",
            least=least,
            limit=WITH_PARTS,
            reach=f"cold: raw limit with parts hashed / {peer}",
        )
        for peer, least in (
            ("aria2c -x16", 4),
            ("hf_transfer", 2.5),
            ("awscrt", 3),
            ("curl", 2),
            ("s5cmd", 2),
        )
    ),
    Goal(
        UNVERIFIED,
        "CPU s/GB",
        "cold: unverified CPU s/GB",
        most=0.30,
        limit=WITH_PARTS,
        reach="cold: raw limit with parts hashed, CPU s/GB",
    ),
    *(
        Goal(
            DURABLE,
            f"speed / {shown}",
            f"cold: durable / {peer}",
            least=least,
            limit=f"{WITH_DIGEST}, and fsync",
            reach=f"cold: durable limit / {peer}",
        )
        for shown, peer, least in (
            ("hf_transfer", "hf_transfer", 1.5),
            ("awscrt", "awscrt", 1.5),
            ("aria2c --checksum", "aria2c -x16", 3),
        )
    ),
    Goal(
        VERIFIED,
        "speed / sha256 of one core",
        "cold: verified / sha256 of one core",
        least=0.85,
        limit=WITH_DIGEST,
        reach="cold: verified limit / sha256 of one core",
    ),
    Goal(
        VERIFIED,
        "speed / aria2c --checksum",
        "cold: verified / aria2c --checksum",
        least=1.9,
        limit=WITH_DIGEST,
        reach="cold: verified limit / aria2c --checksum",
    ),
    Goal(
        SHARDS,
        "speed / what the cores allow",
        "models: shards / cores",
        least=0.85,
        limit=OF_SHARDS,
        reach="models: shards limit / cores",
    ),
    Goal(
        SHARDS,
        "speed / fastest verified peer",
        "models: shards / fastest peer",
        least=2,
        limit=OF_SHARDS,
        reach="models: shards limit / fastest peer",
    ),
    Goal("S3 with crc64nvme", "speed / unverified", "cold: crc64nvme / unverified", least=0.85),
    Goal(
        "TLS",
        "speed / fastest peer",
        "tls: speed / fastest peer",
        least=1,
        limit=WITH_PARTS,
        reach="tls: raw limit with parts hashed / fastest peer",
    ),
    Goal(
        "TLS",
        "CPU / aria2c's",
        "tls: CPU / aria2c's",
        most=0.85,
        limit=WITH_PARTS,
        reach="tls: raw limit with parts hashed, CPU / aria2c's",
    ),
    Goal(TLS_OF_IMAGE, "speed / fastest peer", "tls: speed / fastest peer, OpenSSL of the image", least=1),
    Goal(TLS_OF_IMAGE, "CPU / aria2c's", "tls: CPU / aria2c's, OpenSSL of the image", most=0.85),
    Goal("memory", "anonymous MB, 32 streams, any size", "growth: anonymous MB, 32 streams", most=120),
    *(
        Goal(
            "/ready under a saturating pull",
            f"p99, ms{where}",
            f"warm: ready p99 ms, saturated{runs}",
            most=25,
            limit="an nginx that answers 204 beside the same pull",
            reach=f"warm: control p99 ms, saturated{runs}",
        )
        for where, runs in (("", ""), (", while the machine stood still for less", ", machine on time"))
    ),
    Goal("start with 1,000 snapshots", "seconds to /readyz", "start: seconds, 1000 snapshots", most=1),
    Goal("bandwidth limits and shares", "farthest off", "bandwidth: off at most", most=0.05),
    *(
        Goal(
            "adaptive streams",
            f"{shown}, settled / the best fixed number",
            f"slow: {case}: share, settled / bare loop",
            least=0.95,
        )
        for case, shown in (("link", "a link that is full"), ("crowd", "more connections make it slower"))
    ),
    Goal("memory", "speed of warm / sequential reads of the disk", "upkeep: warm / disk", least=0.9),
    Goal(
        "memory",
        "share resident after verify",
        "upkeep: resident after verify",
        least=1,
        limit="a file that nobody touched as long",
        reach="upkeep: resident when left alone",
    ),
    Goal("one flipped bit", "MiB fetched", "upkeep: repair: MiB fetched", most=32),
    Goal("rollback", "seconds", "upkeep: rollback: seconds", most=1),
    Goal(SMALL, "speed / snapshot_download", "models: small / snapshot_download", least=3),
    Goal(
        "small files, verified and durable, to disk",
        "speed / aria2c -j16, with --checksum or a hash after",
        "models: small durable / aria2c",
        least=1,
    ),
    Goal(
        SMALL,
        "speed / aria2c -j16, neither verified nor synced",
        "models: small / aria2c",
        least=1,
        limit="the same requests and system calls alone, by Python's own HTTP client",
        reach="models: library loop / aria2c",
    ),
    Goal("many cores", "GB/s a process, plaintext", "gil: GB/s ceiling, plaintext", least=5),
    Goal("eviction", "bytes refetched / LRU's", "trace: bytes refetched, cachd to LRU", most=0.9),
    Goal("a day on a small disk", "what must not happen", "day: what must not happen", most=0),
    Goal("many cores", "GB/s a process, TLS", "gil: GB/s ceiling, TLS", least=3),
)
COLUMNS = ("work", "figure", "goal", "measured", "", "limit measured beside it")


def judged(figures: Mapping[str, float]) -> list[list[str]]:
    """The cells below `COLUMNS`, one line for every goal; a figure that is missing is told."""
    lines = []
    for goal in GOALS:
        measured, reach = figures.get(goal.figure), figures.get(goal.reach)
        shown = "" if measured is None else f"{measured:.3g}"
        verdict = "not measured" if measured is None else "met" if goal.met(measured) else "not met"
        limit = "" if reach is None else f"{reach:.3g}: {goal.limit}"
        lines.append([goal.work, goal.what, goal.wanted, shown, verdict, limit])
    return lines


def table(figures: Mapping[str, float]) -> object:
    return report.table("goals", COLUMNS, judged(figures))


def markdown(figures: Mapping[str, float]) -> str:
    return report.markdown(COLUMNS, judged(figures))
