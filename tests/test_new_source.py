"""A source for a made-up scheme, written as CONTRIBUTING.md says: it keeps the contract and serves a pull."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.errors import Changed, NotFound
from cachd.model import Digest, Extent, File, Manifest, ModelSpec, Ref
from cachd.sources.source import CancelToken
from cachd.transfer.downloads import Downloads
from cachd.transfer.engine import Engine
from cachd.transfer.pull import PullContext
from cachd.transfer.pulls import Pulls
from cachd.transfer.resolves import Resolves
from cachd.transfer.streams import Streams
from tests.contract_source import FILES, LARGE, OTHER_BYTES, Served, SourceContract
from tests.ground.models import digests

LLAMA = Ref("shelf", "host:7000/llama")  # policy/prefixes.py wants a port for this scheme


class ShelfBody(BytesIO):
    def abort(self) -> None: ...


class ShelfSource:
    """shelf://host:port/model: serves the files in `shelf`, a dictionary by base and path."""

    def __init__(self, shelf: dict[str, dict[str, bytes]]) -> None:
        self.shelf = shelf

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        if ref.base not in self.shelf:
            raise NotFound(f"{ref.base} is not on the shelf", code="file_not_found")
        files, revision = [], hashlib.sha256()
        for path, content in self.shelf[ref.base].items():
            cancel_token.check()
            cancel_token.count()
            sha256 = hashlib.sha256(content).hexdigest()
            files.append(File(path, len(content), f"{ref.base}/{path}", Digest("sha256", sha256), sha256))
            revision.update(f"{path}\n{sha256}\n".encode())
        return Manifest(ref.base, revision.hexdigest(), tuple(files))

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        cancel_token.check()
        content = self.shelf[file.base][file.path]
        if hashlib.sha256(content).hexdigest() != file.validator:
            raise Changed(f"{file.origin}: another file is there now")
        return ShelfBody(content[extent.start : extent.stop])

    def anew(self) -> None: ...


class TestShelf(SourceContract):
    @pytest.fixture
    def served(self) -> Served:
        files, absent = dict(FILES), Ref("shelf", "host:7000/absent")
        source = ShelfSource({LLAMA.base: files})
        return Served(source, LLAMA, absent, change=lambda: files.update({LARGE: OTHER_BYTES}))


def test_a_model_of_the_made_up_scheme_is_pulled_verified_and_published(root: Path) -> None:
    sources = SimpleNamespace(of=lambda _ref: ShelfSource({LLAMA.base: FILES}))
    with assembled(Config(root=root, reserve_free=0)) as parts, ExitStack() as stack:
        stack.callback((engine := Engine(Streams(2), parts.bandwidth, parts.metrics, retries=0)).close)
        stack.callback((resolves := Resolves(60, stall_seconds=60)).close)
        context = PullContext(parts.store, parts.reclaim, Downloads(parts.store.content, engine), resolves)
        stack.callback((pulls := Pulls(context, sources, parts.metrics, at_once=1, queued=1)).close)
        assert pulls.start(ModelSpec(LLAMA, "llama")).done.result(60).verified
        assert digests(root / "models/llama") == {p: hashlib.sha256(c).hexdigest() for p, c in FILES.items()}
