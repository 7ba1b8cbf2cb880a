"""What the usage log learns of pulls and of open files."""

from __future__ import annotations

import pytest

from cachd.errors import CachdError, Forbidden, NotFound, Unavailable
from cachd.model import ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.store.usage_log import GATED, GONE
from cachd.transfer.usage import record_open_now, record_opens, record_pull
from tests.ground.stored import MIB, publish

SPEC = ModelSpec(Ref.parse("hf://org/m@v2"), "m")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (NotFound("gone", code="repo_not_found"), GONE),
        (Forbidden("gated", code="gated"), GATED),
        (Unavailable("away", code="origin_failed"), None),
    ],
)
def test_a_pull_shows_whether_its_source_still_has_the_model(
    store: DiskStore, error: CachdError, why: str | None
) -> None:
    log = store.usage_log
    record_pull(log, SPEC, error, fetched=1 << 40, seconds=1.0, now=5.0)
    assert (log.why_lost(SPEC.ref.base), log.of("m"), log.rate("hf")) == (why, None, None)
    record_pull(log, SPEC, publish(store, {"x": b"x"}), fetched=1 << 40, seconds=2.0, now=9.0)
    assert (log.why_lost(SPEC.ref.base), log.rate("hf")) == (None, (1 << 40) / 2.0)
    used = log.of("m")
    assert used is not None
    assert used.last == 9.0


def test_a_model_that_some_process_has_open_is_used_now(store: DiskStore) -> None:
    for name in "ab":
        publish(store, {"x": name.encode() * MIB}, f"hf://org/{name}", name, now=1.0)
    with open(store.layout.model("a") / "x"):
        record_open_now(store, 1000.0)
    found = {name: store.usage_log.of(name) for name in "ab"}
    assert {name: use.last for name, use in found.items() if use and use.last == 1000.0} == {"a": 1000.0}


def test_an_open_is_a_use_of_every_name_of_its_snapshot(store: DiskStore) -> None:
    store.watch_all()
    if not store.watch.sees_all_opens():
        pytest.skip("the kernel reports no opens here")
    for name in "ab":
        publish(store, {"x": b"same"}, "hf://org/m", name, now=1.0)
    publish(store, {"x": b"other"}, "hf://org/other", "c", now=1.0)
    store.watch_all()
    record_opens(store, 10.0)
    with open(store.layout.model("a") / "x"):
        pass
    record_opens(store, 1000.0)
    record_opens(store, 2000.0)
    found = {name: store.usage_log.of(name) for name in "abc"}
    assert {name for name, use in found.items() if use and use.last == 1000.0} == {"a", "b"}
