"""Listings: paged, as quick for each model however many files and models there are, and right about use."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.errors import Invalid
from cachd.model import ModelSpec, Ref, snapshot_of
from cachd.report.file_use import FileUseCache
from cachd.report.models import Models
from cachd.report.values import as_json
from cachd.store.ready_names import ReadyNames
from tests.ground.site import Ground, said
from tests.ground.stored import keep, manifest_of

Alone = Callable[..., Ground]
MANIFESTS = ("1" * 32, "2" * 32, "3" * 32)


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


def many_names(count: int) -> ReadyNames:
    """Ready names, two for each manifest."""
    spec, manifest = ModelSpec(Ref.parse("hf://org/model"), "m"), manifest_of({"1.bin": b"1"})
    one = snapshot_of(spec, manifest, 1.0)
    return ReadyNames(
        replace(one, spec=replace(spec, name=f"m-{number:06}"), manifest=f"{number // 2:032x}", address="")
        for number in range(count)
    )


def least_seconds(work: Callable[[], object]) -> float:
    """Seconds of this thread for a hundred runs: the least of ten."""

    def once() -> float:
        began = time.thread_time()
        for _ in range(100):
            work()
        return time.thread_time() - began

    return min(once() for _ in range(10))


def test_the_next_names_and_the_names_of_a_manifest_cost_the_same_among_few_and_among_many() -> None:
    few, many = many_names(20), many_names(10_000)
    assert many.after("m-005000", 10) == [f"m-{number:06}" for number in range(5_001, 5_011)]
    assert [s.name for s in many.of(f"{2500:032x}")] == ["m-005000", "m-005001"]
    assert least_seconds(lambda: many.after("m-005000", 10)) < 10 * least_seconds(
        lambda: few.after("m-000004", 10)
    )
    assert least_seconds(lambda: many.of(f"{2500:032x}")) < 10 * least_seconds(lambda: few.of(f"{5:032x}"))


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", *MANIFESTS])), max_size=30)
)
def test_ready_names_agree_with_a_plain_dictionary(changes: list[tuple[str, str]]) -> None:
    """A change puts a name at a manifest, or removes it where the manifest is empty."""
    one = snapshot_of(ModelSpec(Ref.parse("hf://org/model"), "m"), manifest_of({"1.bin": b"1"}), 1.0)
    names, plain = ReadyNames(), dict[str, str]()
    for name, manifest in changes:
        if manifest:
            names.put(replace(one, spec=replace(one.spec, name=name), manifest=manifest, address=""))
            plain[name] = manifest
        else:
            names.remove(name)
            plain.pop(name, None)
        assert [(s.name, s.manifest) for s in names.all()] == sorted(plain.items())
        for each in MANIFESTS:
            assert [s.name for s in names.of(each)] == sorted(n for n, m in plain.items() if m == each)
        assert names.in_hub_folder(one.hub_folder) == names.all()
        assert names.after("b", 2) == sorted(n for n in plain if n > "b")[:2]


def test_a_page_has_the_models_that_are_pulled_or_damaged_in_their_places(models: Models) -> None:
    publish(models, "m", 4, files=1)
    snapshot = models.store.names.ready("m-00001")
    tree = models.store.layout.tree(snapshot.manifest)
    tree.chmod(0o755)  # only root may delete in it as it is
    (tree / "0.bin").unlink()
    assert models.store.check("m-00001", now=2.0)
    failed = ModelSpec(Ref.parse("hf://org/failed"), "m-00002-failed")
    models.pulls.show_as_failed(failed, Invalid("no such thing"))
    found, after = [], ""
    while True:
        page = models.page(after=after, limit=2)
        found += [(model.name, model.state) for model in page.models]
        if page.next is None:
            break
        after = page.next
    assert found == [
        ("m-00000", "ready"),
        ("m-00001", "damaged"),
        ("m-00002", "ready"),
        ("m-00002-failed", "failed"),
        ("m-00003", "ready"),
    ]


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


def test_a_listing_recalls_an_answer_the_longer_the_more_models_there_are(models: Models) -> None:
    """So the share of a core that listings take does not grow with the number of models."""
    publish(models, "m", 4, files=1)
    store = models.store
    snapshots = store.names.all()
    (blob,) = {f.blob for f in store.manifests.of(snapshots[0]).files}
    for count, age, is_asked in ((1, 15.0, True), (4, 15.0, False), (4, 25.0, True)):
        cache = FileUseCache(store, models.scrubs, models.warms, quiet_seconds=10, quiet_seconds_each=5)
        for snapshot in snapshots[:count]:
            assert not cache.recall(snapshot, 1000.0).is_open
        with open(store.content.path(blob)):  # through no view, so no open is reported
            assert cache.recall(snapshots[0], 1000.0 + age).is_open == is_asked


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
