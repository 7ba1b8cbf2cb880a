"""Shared volumes with odd contents."""

from __future__ import annotations

from collections.abc import Iterator

from tests.ground.models import write_sha256sums
from tests.wild.field import Odd, World, wild


@wild("plain-directory")
def plain_directory(world: World) -> Iterator[Odd]:
    files = {"config.json": b"{}", "deep/weights.bin": b"w" * 1000}
    for path, content in files.items():
        (world.share / path).parent.mkdir(exist_ok=True)
        (world.share / path).write_bytes(content)
    write_sha256sums(world.share)
    yield Odd(f"file://{world.share}/", files)
