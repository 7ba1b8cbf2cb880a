"""Web servers with odd behaviour."""

from __future__ import annotations

from collections.abc import Iterator

from tests.ground.origin import noise
from tests.ground.raw import RawServer, ranged
from tests.wild.field import Odd, World, wild

CONTENT = noise(300_000)


@wild("plain-file")
def plain_file(world: World) -> Iterator[Odd]:
    with RawServer(lambda asked: ranged(asked, CONTENT, 'ETag: "one"')) as origin:
        yield Odd(f"{origin.url}/x.bin", {"x.bin": CONTENT})
