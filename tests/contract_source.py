"""What every source must do, whatever its scheme. Each source runs this suite: see test_source_contract.py.

A test class for a source inherits from SourceContract. Its fixture `served` is the source, serving FILES.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError, Changed, NotFound
from cachd.model import Digest, Extent, File, Manifest, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.source import Source
from tests.ground.models import noise

LARGE = "model.safetensors"
FILES = {"config.json": b"{}", LARGE: noise(300_000), "sub/merges.txt": b""}
OTHER_BYTES = noise(300_000, seed=2)  # replace LARGE, and have its size
SIZE = len(FILES[LARGE])
EXTENTS = [(0, SIZE), (0, 1), (1, 70_000), (65_536, 131_072), (SIZE - 1, SIZE)]


@dataclass(frozen=True, slots=True)
class Served:
    """A source that has FILES at `ref` and nothing at `absent`.

    `change` puts OTHER_BYTES in the place of LARGE; None where the bytes of a revision never change.
    """

    source: Source
    ref: Ref
    absent: Ref
    change: Callable[[], object] | None

    def resolve(self) -> Manifest:
        return self.source.resolve(self.ref, CancelToken())

    def large(self) -> File:
        return next(file for file in self.resolve().files if file.path == LARGE)

    def read(self, file: File, start: int, stop: int, *, step: int = 1 << 20) -> bytes:
        """Read an extent, at most `step` bytes at a time, until the body ends."""
        content = b""
        view = memoryview(bytearray(step))
        with self.source.open(file, Extent(start, stop), CancelToken()) as body:
            while count := body.readinto(view):
                content += view[:count]
        return content


class SourceContract:
    def test_a_ref_is_pinned_to_one_revision_with_all_its_files(self, served: Served) -> None:
        manifest = served.resolve()
        assert manifest.base == served.ref.base
        assert {file.path: file.size for file in manifest.files} == {p: len(c) for p, c in FILES.items()}
        assert served.resolve() == manifest

    def test_a_digest_is_that_of_the_bytes(self, served: Served) -> None:
        stated = {file.path: file.digest for file in served.resolve().files}
        assert stated == {path: each and digest(each.algorithm, FILES[path]) for path, each in stated.items()}

    def test_where_a_file_lies_is_told_apart_and_without_a_secret(self, served: Served) -> None:
        origins = [file.origin for file in served.resolve().files]
        assert len({*origins}) == len(FILES)
        assert not [each for each in origins if urlsplit(each).query or "@" in urlsplit(each).netloc]

    @pytest.mark.parametrize("step", [1 << 20, 50_021])
    def test_an_extent_is_exactly_its_bytes(self, served: Served, step: int) -> None:
        file = served.large()
        for start, stop in EXTENTS:
            assert served.read(file, start, stop, step=step) == FILES[LARGE][start:stop]

    def test_many_threads_read_one_file_at_once(self, served: Served) -> None:
        file, size = served.large(), 10_000
        with ThreadPoolExecutor(8) as threads:
            parts = threads.map(lambda at: served.read(file, at, at + size), range(0, SIZE, size))
            assert b"".join(parts) == FILES[LARGE]

    def test_what_is_not_there_is_not_found(self, served: Served) -> None:
        with pytest.raises(NotFound):
            served.source.resolve(served.absent, CancelToken())

    def test_every_answer_is_counted(self, served: Served) -> None:
        """Else policy/patience.py ends a slow listing as one that sends too little."""
        cancel_token = CancelToken()
        served.source.resolve(served.ref, cancel_token)
        assert cancel_token.answered

    def test_a_cancelled_token_asks_nothing(self, served: Served) -> None:
        file, cancelled = served.large(), CancelToken()
        cancelled.cancel()
        with pytest.raises(CachdError):
            served.source.resolve(served.ref, cancelled)
        with pytest.raises(CachdError):
            served.source.open(file, Extent(0, SIZE), cancelled)

    def test_after_an_abort_a_read_ends_by_its_bytes_or_an_error_of_cachd(self, served: Served) -> None:
        with served.source.open(served.large(), Extent(0, SIZE), CancelToken()) as body:
            body.abort()
            content = bytearray(SIZE)
            try:
                count = body.readinto(memoryview(content))
            except CachdError:
                count = 0
            assert content[:count] == FILES[LARGE][:count]

    def test_a_file_that_is_another_by_now_is_changed(self, served: Served) -> None:
        """A source whose revisions never change gives its files no validator instead."""
        file = served.large()
        if served.change is None:
            assert file.validator is None
            return
        served.change()
        with pytest.raises(Changed):
            served.read(file, 0, SIZE)

    def test_bytes_come_after_the_connections_were_let_go(self, served: Served) -> None:
        file = served.large()
        served.read(file, 0, 1)
        served.source.anew()
        assert served.read(file, 0, SIZE) == FILES[LARGE]


def digest(algorithm: str, content: bytes) -> Digest:
    """The digest of `content`, computed by the standard library alone."""
    if algorithm == "git-sha1":
        return Digest(algorithm, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    return Digest(algorithm, hashlib.new(algorithm, content).hexdigest())
