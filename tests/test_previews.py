"""What a pull would do, without pulling; and whether a caller may read a ref at its source."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from cachd.errors import CachdError, Cancelled, Forbidden, Invalid, NotFound, Unavailable
from cachd.model import Extent, File, ModelSpec
from cachd.sources.cancel import CancelToken
from cachd.store.disk_store import DiskStore
from cachd.transfer.previews import Previews
from cachd.transfer.resolves import TOO_SLOW
from tests.ground.weights import safetensors
from tests.shelf import ShelfBody
from tests.test_runner import PATIENCE_SECONDS, SPEC, Ground, Scripted

FILES = {"config.json": b"{}", "model.safetensors": safetensors(100) + b"more", "other.bin": b"x"}


class Asked(Scripted):
    """A source that knows callers by their tokens, and that waits for its end if `hangs`."""

    hangs = False

    def __init__(self) -> None:
        super().__init__(FILES)
        self.tokens: list[str | None] = []
        self.asked = threading.Event()

    def for_caller(self, token: str | None) -> Asked:
        self.tokens.append(token)
        return self

    def wait(self, token: CancelToken) -> None:
        """An answer that never comes."""
        self.asked.set()
        token.wait(PATIENCE_SECONDS)

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        if self.hangs:
            self.wait(cancel_token)
        return super().open(file, extent, cancel_token)


class Node:
    """The previews of a node with one source."""

    def __init__(self, store: DiskStore, source: Scripted, stack: ExitStack) -> None:
        self.ground = Ground(store, source, stack)
        self.previews = Previews(self.ground.context, self.ground.sources)


@pytest.fixture
def source() -> Asked:
    return Asked()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def previews(store: DiskStore, source: Asked, stack: ExitStack) -> Previews:
    return Node(store, source, stack).previews


def test_a_preview_has_the_files_that_a_pull_would_make_ready(previews: Previews) -> None:
    spec = ModelSpec(SPEC.ref, "m", include=("*.safetensors",))
    manifest = previews.resolve(spec)
    assert [file.path for file in manifest.files] == ["model.safetensors"]
    assert manifest.revision == "a" * 40


def test_what_a_pull_would_refuse_is_refused(previews: Previews, source: Asked) -> None:
    source.files = {"model-00001-of-00002.safetensors": safetensors(9)}
    with pytest.raises(Invalid) as refusal:
        previews.resolve(SPEC)
    assert refusal.value.code == "incomplete_model"
    manifest, _ = previews.preflight(SPEC)
    assert len(manifest.files) == 1, "a missing shard is a finding of the preflight"


def test_a_preflight_reads_headers_at_the_source(previews: Previews) -> None:
    manifest, found = previews.preflight(SPEC)
    assert {file.path for file in manifest.files} == set(FILES)
    assert [(each.code, each.file) for each in found.refused] == [("safetensors", "model.safetensors")]


def test_a_preflight_that_runs_out_of_time_says_what_it_did_not_examine(
    previews: Previews, source: Asked
) -> None:
    source.hangs = True
    _, found = previews.preflight(SPEC, seconds=0.0)
    assert not found.refused
    assert "model.safetensors" in str(found)


@pytest.mark.parametrize("call", [Previews.resolve, Previews.preflight])
def test_a_source_that_takes_too_long_is_too_slow(
    previews: Previews, source: Asked, call: Callable[..., object]
) -> None:
    source.answers = [source.wait]
    with pytest.raises(Unavailable) as refusal:
        call(previews, SPEC, seconds=0.0)
    assert refusal.value.code == TOO_SLOW


def ends(source: Asked, end: Callable[[], object], call: Callable[[], object]) -> None:
    """Call `end` when the source is asked by `call`, which must raise Cancelled then."""
    other = threading.Thread(target=lambda: (source.asked.wait(PATIENCE_SECONDS), end()))
    other.start()
    with pytest.raises(Cancelled):
        call()
    other.join()


def test_a_caller_who_leaves_ends_the_question(previews: Previews, source: Asked) -> None:
    source.answers, token = [source.wait], CancelToken()
    ends(source, token.cancel, lambda: previews.resolve(SPEC, token))
    source.asked.clear()
    token, source.answers, source.hangs = CancelToken(), [lambda _: None], True
    ends(source, token.cancel, lambda: previews.preflight(SPEC, token))
    previews.resolve(SPEC)


def test_after_an_interrupt_every_question_ends(previews: Previews, source: Asked) -> None:
    source.answers = [source.wait]
    ends(source, previews.interrupt, lambda: previews.resolve(SPEC))
    source.answers = [lambda _: None]
    calls: list[Callable[[], object]] = [
        lambda: previews.resolve(SPEC),
        lambda: previews.preflight(SPEC),
        lambda: previews.check_caller(SPEC.ref, "token"),
    ]
    for call in calls:
        with pytest.raises(Cancelled):
            call()


# --- callers ---


def test_a_caller_who_may_read_the_ref_passes(previews: Previews, source: Asked) -> None:
    for token in ("hf_token", None):
        previews.check_caller(SPEC.ref, token)
    assert (source.tokens, source.resolves) == (["hf_token", None], 2)


@pytest.mark.parametrize(
    "error", [Forbidden("no", code="source_forbidden"), NotFound("absent", code="repo_not_found")]
)
def test_a_caller_who_may_not_read_the_ref_learns_why(
    previews: Previews, source: Asked, error: CachdError
) -> None:
    source.answers = [error]
    with pytest.raises(type(error)) as refusal:
        previews.check_caller(SPEC.ref, "token")
    assert refusal.value is error


def test_a_source_that_knows_no_callers_admits_nobody(store: DiskStore, stack: ExitStack) -> None:
    source = Scripted(FILES)
    with pytest.raises(NotFound) as refusal:
        Node(store, source, stack).previews.check_caller(SPEC.ref, "token")
    assert (refusal.value.code, source.resolves) == ("repo_not_found", 0)


def test_a_source_that_takes_too_long_for_a_token_is_unavailable_and_an_interrupt_is_none(
    previews: Previews, source: Asked
) -> None:
    source.answers = [source.wait]
    with pytest.raises(Unavailable, match="took too long for a token"):
        previews.check_caller(SPEC.ref, "token", seconds=0.0)
    source.asked.clear()
    ends(source, previews.interrupt, lambda: previews.check_caller(SPEC.ref, "token"))
