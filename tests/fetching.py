"""What tests of sources share: a client, reads of bodies, and checks of refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import CachdError
from cachd.model import MAX_FILES, Extent, Manifest, Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http, Target
from cachd.sources.shared_volume import SharedVolumeSource
from cachd.sources.source import Body, Source
from cachd.sources.timeouts import Timeouts
from cachd.sources.trust import Authorities

KIB, MIB = 1 << 10, 1 << 20
SOON_SECONDS = 0.3
PATIENCE_SECONDS = 120.0
EITHER = ("GET", "HEAD")
HEX = hashlib.sha256(b"x").hexdigest()
EXTENTS = [(0, 1), (0, 100_000), (1, 99_999), (65_535, 65_537), (99_999, 100_000), (50_000, 50_001)]


def http(*allow: str, stall_seconds: float = PATIENCE_SECONDS, ca_file: Path | None = None) -> Http:
    return Http(
        AddressPolicy(allow or ["127.0.0.0/8"]),
        authorities=Authorities(str(ca_file) if ca_file else None),
        timeouts=Timeouts(PATIENCE_SECONDS, stall_seconds),
    )


def read(body: Body, size: int, step: int = 64 * KIB) -> bytes:
    """The next `size` bytes of a body, `step` at a time; it is closed then."""
    content = bytearray(size)
    view = memoryview(content)
    with body:
        for start in range(0, size, step):
            part = view[start : start + step]
            while part:
                count = body.readinto(part)
                assert count, "the end, too early"
                part = part[count:]
    return bytes(content)


def fetch(over: Http, url: str, size: int, *, validator: str | None = None) -> bytes:
    return read(over.open(Target(url, size, validator=validator), Extent(0, size), CancelToken()), size)


def refused(call: Callable[[], object], code: str) -> CachdError:
    """The error with this code that `call` ends in."""
    with pytest.raises(CachdError) as refusal:
        call()
    assert refusal.value.code == code, refusal.value
    return refusal.value


def resolve(source: Source, ref: str) -> Manifest:
    """The manifest of a request without patterns."""
    return source.resolve(Ref.parse(ref), CancelToken()).select((), ())


def share(place: Path, *, max_files: int = MAX_FILES) -> SharedVolumeSource:
    policy = AddressPolicy([f"file://{place}/"])
    return SharedVolumeSource(policy, stall_seconds=PATIENCE_SECONDS, max_files=max_files)
