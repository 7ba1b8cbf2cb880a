"""Hubs and repositories with odd contents."""

from __future__ import annotations

from collections.abc import Iterator

from tests.ground.hub import Hub
from tests.wild.field import Odd, World, wild


@wild("plain-repository")
def plain_repository(world: World) -> Iterator[Odd]:
    files = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"w" * 1000}
    with Hub() as hub:
        hub.add("wild-plain/model", files)
        entry = {"prefix": "hf://wild-plain/", "endpoint": hub.url}
        yield Odd("hf://wild-plain/model", files, entries=(entry,))
