"""S3 servers and buckets with odd behaviour."""

from __future__ import annotations

from collections.abc import Iterator

from tests.ground.bucket import Bucket
from tests.wild.field import Odd, World, wild


@wild("plain-bucket")
def plain_bucket(world: World) -> Iterator[Odd]:
    files = {"config.json": b"{}", "weights.bin": b"w" * 1000}
    with Bucket("wild-plain") as bucket:
        for path, content in files.items():
            bucket.put(f"m/{path}", content)
        entry = {
            "prefix": "s3://wild-plain/",
            "endpoint": bucket.url,
            "region": "us-east-1",
            "credentials": world.keys(),
        }
        yield Odd("s3://wild-plain/m/", files, entries=(entry,))
