"""An S3 prefix is one revision, and only a checksum of a complete object is the digest of a file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator

import pytest

from cachd.errors import Changed
from cachd.sources.buckets import Service
from cachd.sources.s3 import BucketSource
from tests.fetching import http, resolve
from tests.ground.bucket import Bucket
from tests.ground.origin import File, Reply, Seen

CONTENT = b"bytes"
SHA256 = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
HEX = hashlib.sha256(CONTENT).hexdigest()
CRC32 = base64.b64encode(b"\x01\x02\x03\x04").decode()


class Changing(Bucket):
    """A bucket that changes once, before it answers the first HEAD."""

    change: Callable[[], object] | None = None

    def find(self, seen: Seen) -> File | Reply:
        if seen.method == "HEAD" and self.change is not None:
            change, self.change = self.change, None
            change()
        return super().find(seen)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Changing]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDSCRIPTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "said to nobody")
    with Changing() as started:
        started.put("m/a", CONTENT)
        started.put("m/b", CONTENT)
        yield started


def source(bucket: Bucket) -> BucketSource:
    return BucketSource(http(), Service(bucket.url, "us-east-1"))


CHANGES: dict[str, tuple[Callable[[Changing], object], list[str]]] = {
    "added": (lambda bucket: bucket.put("m/c", CONTENT), ["a", "b", "c"]),
    "replaced": (lambda bucket: bucket.put("m/b", CONTENT, etag="two"), ["a", "b"]),
}


@pytest.mark.parametrize(("change", "after"), CHANGES.values(), ids=CHANGES)
def test_a_prefix_that_changes_while_it_is_listed_is_not_one_revision(
    bucket: Changing, change: Callable[[Changing], object], after: list[str]
) -> None:
    bucket.change = lambda: change(bucket)
    with pytest.raises(Changed):
        resolve(source(bucket), "s3://models/m/")
    assert [f.path for f in resolve(source(bucket), "s3://models/m/").files] == after


# The headers of an object's checksum, and the digest that they give.
DIGESTS = {
    "full object": ({"type": "FULL_OBJECT", "sha256": SHA256}, f"sha256:{HEX}"),
    "no type": ({"sha256": SHA256}, f"sha256:{HEX}"),
    "the strongest of two": ({"crc32": CRC32, "sha256": SHA256}, f"sha256:{HEX}"),
    "a weaker one": ({"type": "FULL_OBJECT", "crc32": CRC32}, "crc32:01020304"),
    "of its parts, by type": ({"type": "COMPOSITE", "sha256": SHA256}, None),
    "of its parts, by form": ({"sha256": f"{SHA256}-3"}, None),
    "of its parts, and a whole one": ({"sha256": f"{SHA256}-3", "crc32": CRC32}, "crc32:01020304"),
    "not base64": ({"sha256": "?" * 44}, None),
    "not ASCII": ({"sha256": "\xe9" * 44}, None),
    "too short": ({"sha256": CRC32}, None),
}


@pytest.mark.parametrize(("headers", "digest"), DIGESTS.values(), ids=DIGESTS)
def test_only_a_checksum_of_the_whole_object_is_its_digest(
    bucket: Changing, headers: dict[str, str], digest: str | None
) -> None:
    bucket.put("m/a", CONTENT, **{f"x_amz_checksum_{name}": value for name, value in headers.items()})
    file, _ = resolve(source(bucket), "s3://models/m/").files
    assert (str(file.digest) if file.digest else None) == digest
