"""Listings: paged, as quick for each model however many files and models there are, and right about use."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.model import ModelSpec, Ref
from cachd.report.models import Models
from cachd.report.values import as_json
from tests.ground.site import Ground, said
from tests.ground.stored import keep, manifest_of

Alone = Callable[..., Ground]


@pytest.fixture
def models(root: Path) -> Iterator[Models]:
    """The models of a store that is watched."""
    with assembled(Config(root=root, reserve_free=0)) as parts:
        parts.store.watch.start()
        yield Models(parts.store, parts.pulls, parts.scrubs, parts.warms)


def publish(models: Models, prefix: str, count: int, *, files: int) -> None:
    """Publish models that share their blobs; a listing asks as much about each as without sharing."""
    content = {f"{number}.bin": bytes([number]) * 100 for number in range(files)}
    keep(models.store, content)
    for number in range(count):
        name = f"{prefix}-{number:05}"
        ref = Ref.parse(f"hf://org/{name}")
        revision = hashlib.sha1(name.encode()).hexdigest()
        manifest = manifest_of(content, base=ref.base, revision=revision)
        models.store.publish(ModelSpec(ref, name), manifest, now=1.0)


def cost(models: Models, prefix: str, count: int) -> float:
    """Seconds of this thread for each model of a page: the least of five."""

    def listed() -> float:
        began = time.thread_time()
        page = models.page(after=f"{prefix}-", limit=count)
        as_json(page)
        assert [model.name for model in page.models] == [f"{prefix}-{n:05}" for n in range(count)]
        return (time.thread_time() - began) / count

    return min(listed() for _ in range(5))


def test_a_model_of_many_files_costs_a_listing_no_more_than_one_of_one_file(models: Models) -> None:
    publish(models, "many", 20, files=60)
    publish(models, "one", 20, files=1)
    assert cost(models, "many", 20) < 2.5 * cost(models, "one", 20)


def test_a_model_costs_a_listing_the_same_among_ten_and_among_many(models: Models) -> None:
    publish(models, "a", 10, files=3)
    few = cost(models, "a", 10)
    publish(models, "b", 120, files=3)
    for number in range(120):
        models.store.leases.take(f"b-{number:05}", "pod", until=time.time() + 600)
    assert cost(models, "b", 120) < 3 * few


def test_a_listing_sees_at_once_that_a_file_or_a_hold_file_was_opened(models: Models) -> None:
    publish(models, "m", 2, files=3)
    snapshot = models.store.names.ready("m-00001")
    layout = models.store.layout

    def in_use() -> list[bool]:
        return [model.in_use for model in models.page(after="", limit=9).models]

    assert in_use() == [False, False]
    with open(layout.hold(snapshot.manifest)):
        assert in_use() == [False, True]
    with open(layout.model("m-00001") / "1.bin"):
        shared = [model.in_use for model in models.page(after="m-00000", limit=1).models]
        assert shared == [True]
        assert models.describe("m-00001").in_use


def test_the_choice_of_what_to_evict_asks_the_kernel_and_not_the_listing(models: Models) -> None:
    publish(models, "m", 1, files=3)
    snapshot = models.store.names.ready("m-00000")
    assert [model.in_use for model in models.page(after="", limit=1).models] == [False]
    (blob,) = {f.blob for f in models.store.manifests.of(snapshot).files if f.path == "1.bin"}
    with open(models.store.content.path(blob)):  # through no view, so no open is reported
        assert [model.in_use for model in models.page(after="", limit=1).models] == [False]
        assert models.store.protection.is_in_use(models.store.manifests.of(snapshot))


def test_the_api_and_the_command_line_follow_the_pages(ground: Ground) -> None:
    for number in range(3):
        ground.have(f"page-{number}.bin", 1000)
    path, found = "/v1/models?limit=1", []
    while path:
        answer = ground.node.ask("GET", path)
        found += [model["name"] for model in answer.document["models"]]
        link = answer.headers.get("link", "")
        assert bool(link) == ("next" in answer.document)
        path = link.removeprefix("<").removesuffix('>; rel="next"')
    assert found == sorted(found)
    assert len(found) >= 3
    assert ground.node.cli("ls", "-o", "name").stdout.split() == found
    assert said(ground.node.ask("GET", "/v1/models?limit=1"), "Link").endswith('rel="next"')
