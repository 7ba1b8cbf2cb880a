"""Compares what a daemon reports, and the models it shows, with what the file system says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tests.ground.node import Node
from tests.ground.shelf import Model

METRICS = ("cache_size_bytes", "fs_free_bytes", "held_bytes", "reserved_bytes")


def wrong_figures(node: Node, reserve: int) -> list[str]:
    """Each figure of the API and the metrics that is wrong, for a daemon that is idle."""
    told, private = node.ask("GET", "/v1/capacity").document, node.root / ".cachd"
    told |= {name: node.metric(f"cachd_{name}") for name in METRICS}
    found = os.statvfs(node.root)
    free = found.f_bavail * found.f_frsize
    blobs, ingests = allocated(private / "blobs"), allocated(private / "ingest")
    expected = {
        "total_bytes": found.f_blocks * found.f_frsize,
        "free_bytes": free,
        "free_inodes": found.f_favail,
        "blob_bytes": blobs,
        "ingest_bytes": ingests,
        "used_bytes": blobs + ingests,
        "held_bytes": 0,
        "reserved_bytes": 0,
        "reserve_free_bytes": reserve,
        "cache_size_bytes": blobs,
        "fs_free_bytes": free,
    }
    return [
        f"figures: {name} is told as {told[name]}, found {value}"
        for name, value in expected.items()
        if told[name] != value
    ]


def wrong_models(node: Node, ready: Sequence[Model]) -> list[str]:
    """What is wrong with the files of these models, which are ready."""
    blobs = node.root / ".cachd/blobs"
    expected = {digest: content.size for model in ready for _, content, digest in model.files}
    here = {path.name for path in blobs.rglob("*") if path.is_file()}
    wrong = []
    if absent := expected.keys() - here:
        wrong.append(f"figures: {len(absent)} blobs of ready models are not on disk")
    taken, size = allocated(blobs), sum(expected.values())
    if taken < size:
        wrong.append(f"figures: blobs take {taken} bytes, ready models have {size}")
    for model in ready:
        for path, _, digest in model.files:
            with (node.root / f"models/{model.name}/{path}").open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                    wrong.append(f"figures: {model.name}/{path} is not what was pulled")
    return wrong


def allocated(directory: Path) -> int:
    """Bytes of disk in the files below, each inode once, as du counts them."""
    seen: dict[int, int] = {}
    for at, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(at, name))
            seen[status.st_ino] = status.st_blocks * 512
    return sum(seen.values())
