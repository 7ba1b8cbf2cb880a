"""Upkeep goes on after a failure: what it could not do is tried again, and nothing is forgotten."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cachd.config import Config
from cachd.daemon.sources import build_table
from cachd.errors import NotFound, Unavailable
from cachd.metrics import Metrics
from cachd.model import Digest, Extent, File
from cachd.policy import backoff
from cachd.store.pins import PinnedBy
from cachd.store.scrub_log import ScrubLog
from cachd.upkeep.presence import PresenceChecks
from cachd.upkeep.refusals import Refusals
from cachd.upkeep.repairs import Repairs
from cachd.upkeep.retries import Retries
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.disks import FuseDisk
from tests.ground.models import noise
from tests.ground.origin import Origin, Status
from tests.ground.pause import at_event

CONTENT = noise(64)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[FuseDisk]:
    """A disk that fails on demand."""
    with FuseDisk(tmp_path) as disk:
        yield disk


def pulled(on: Engine, origin: Origin) -> File:
    """Pull a model `m` of one file. The file as its manifest lists it."""
    snapshot = on.pull(f"{origin.add('/model.bin', CONTENT)}#sha256={SHA256}", name="m")
    (file,) = on.store.manifests.of(snapshot).files
    return file


# --- refused digests ---


def refusing(on: Engine) -> Refusals:
    """What withdraws the models with `CONTENT`."""
    table = build_table(Config(root=on.store.layout.root, refuse=(f"sha256:{SHA256}",)))
    return Refusals(on.store, on.pulls, lambda: table)


def test_a_refused_model_that_the_disk_would_not_let_go_is_withdrawn_later(
    broken: FuseDisk, origin: Origin, engine: Callable[..., Engine]
) -> None:
    on = engine(root=broken.path, allow=(f"{origin.url}/",), scrub_bytes_per_second=0)
    pulled(on, origin)
    broken.fail("rename_to", "EIO", "/.cachd/staging/*")
    refusals = refusing(on)
    with (
        at_event("refused models not withdrawn", broken.heal) as failed,
        closing(refusals),
        at_event("model refused", lambda: None) as refused,
    ):
        refusals.start()
        assert failed.is_set(), "the first check is over before the daemon answers"
        assert refused.wait(PATIENCE_SECONDS)
    assert on.store.names.get("m") is None


def test_refused_bytes_that_no_model_has_yet_are_deleted(engine: Callable[..., Engine]) -> None:
    """A pull has fetched them, all or some, and was cancelled before it published."""
    on, digest = engine(), Digest("sha256", SHA256)
    content = on.store.content
    file = File("model.bin", len(CONTENT), "http://x/model.bin", digest)
    content.put(file, memoryview(CONTENT))
    with closing(refusing(on)) as refusals:
        refusals.start()
    assert not content.has(file)
    ingest = content.begin(file)
    ingest.write(0, memoryview(CONTENT[:8]))
    ingest.received(Extent(0, 8))
    ingest.close()
    with closing(refusing(on)) as refusals:
        refusals.start()
    assert not content.is_begun(file)


# --- presence ---


def test_a_check_that_failed_is_made_again_after_ten_seconds(
    broken: FuseDisk, origin: Origin, engine: Callable[..., Engine]
) -> None:
    on = engine(root=broken.path, allow=(f"{origin.url}/",), scrub_bytes_per_second=0)
    pulled(on, origin)
    scrub_log = ScrubLog(on.store.layout.scrub_log)
    repairs = Repairs(on.store, on.pulls, scrub_log, on.metrics)
    (broken.backing / "ready/m.json").unlink()
    broken.fail("rename_to", "EIO", "/.cachd/quarantined/*")
    with (
        at_event("check failed", broken.heal) as failed,
        at_event("readiness withdrawn", lambda: None) as withdrawn,
    ):
        # The first look at the clock after the failure sets the time of the next check of all.
        times = itertools.chain([1000.0], itertools.repeat(1010.0))
        presence = PresenceChecks(
            on.store,
            repairs,
            scrub_log,
            on.metrics,
            clock=lambda: next(times) if failed.is_set() else 1000.0,
        )
        with closing(presence):
            presence.start()
            assert withdrawn.wait(PATIENCE_SECONDS)
        assert failed.is_set()


# --- repairs ---


def test_a_repair_that_fails_is_tried_again_each_time_after_a_longer_wait(
    origin: Origin, engine: Callable[..., Engine]
) -> None:
    on, now = engine(), 0.0
    file = pulled(on, origin)
    log = ScrubLog(on.store.layout.scrub_log)
    repairs = Repairs(on.store, on.pulls, log, Metrics(), clock=lambda: now, chance=lambda: 0.5)
    on.store.layout.blob(file.blob).chmod(0o644)
    on.store.layout.blob(file.blob).write_bytes(bytes(64))
    on.store.quarantine(file, "damaged", on.store.content.inode(file.blob), now=5.0)
    origin.fault("/model.bin", Status(404), methods=("GET", "HEAD"))
    before = None
    for attempt in range(1, 5):
        repairs.retry()
        pull = on.pulls.get("m")
        assert pull is not None
        assert pull is not before
        with pytest.raises(NotFound):
            pull.done.result(PATIENCE_SECONDS)
        due = now + backoff.delay(attempt, requested=None, chance=0.5)
        now = due - 0.001
        repairs.retry()
        assert on.pulls.get("m") is pull, "it is not due yet"
        before, now = pull, due
    origin.clear()
    repairs.retry()
    pull = on.pulls.get("m")
    assert pull is not None
    pull.done.result(PATIENCE_SECONDS)
    assert on.store.names.get("m") is not None
    assert on.store.names.quarantined() == []


def test_a_repair_of_what_is_replaced_or_needed_by_nobody_is_none(
    origin: Origin, engine: Callable[..., Engine]
) -> None:
    on = engine(scrub_bytes_per_second=0)
    file = pulled(on, origin)
    log, metrics = ScrubLog(on.store.layout.scrub_log), Metrics()
    repairs = Repairs(on.store, on.pulls, log, metrics, now=lambda: 5.0)
    inode = on.store.content.inode(file.blob)
    log.verified(file.blob)
    assert repairs.check("m") is None
    assert not repairs.repair_blob(file, "damaged", inode + 1)
    assert not repairs.repair_copy(file, str(on.store.layout.model("m") / "m"), "damaged", inode + 1)
    assert [blob for blob, _ in log.times()] == [file.blob]
    assert metrics.registry.get_sample_value("cachd_verify_failures_total", {"stage": "scrub"}) in (None, 0)
    origin.fault("/model.bin", Status(404), methods=("GET", "HEAD"))
    assert repairs.repair_blob(file, "damaged", inode)
    assert list(log.times()) == []
    assert metrics.registry.get_sample_value("cachd_verify_failures_total", {"stage": "scrub"}) == 1
    assert [(each.snapshot.name, each.since) for each in on.store.names.quarantined()] == [("m", 5.0)]
    pull = on.pulls.get("m")
    assert pull is not None
    assert pull.asked_by == "cachd:repair"
    with pytest.raises(NotFound):
        pull.done.result(PATIENCE_SECONDS)


# --- pulls that failed ---


def test_a_retry_that_cannot_begin_is_planned_anew_after_a_longer_pause(
    origin: Origin, engine: Callable[..., Engine]
) -> None:
    on, now = engine(scrub_bytes_per_second=0, retries=0), 0.0
    spec = spec_of(origin.add("/model.bin", CONTENT), name="m")
    on.begin(spec).done.result(PATIENCE_SECONDS)
    origin.fault("/model.bin", Status(503), methods=("GET", "HEAD"), times=None)
    pull = on.pulls.start(spec, refresh=True)
    assert pull is not None
    with pytest.raises(Unavailable):
        pull.done.result(PATIENCE_SECONDS)
    origin.clear()
    pull.ended_at = 0.0
    retries = Retries(on.store, on.pulls, lambda _: False, chance=lambda: 1.0, now=lambda: now)
    retries.tick()
    assert (pull.retry_at, pull.retries) == (30.0, 0)
    on.store.pins.add("m", PinnedBy.api)
    now = 30.0
    retries.tick()
    assert (on.pulls.get("m"), pull.retries, pull.retry_at) == (pull, 1, 90.0)
    on.store.pins.release("m", PinnedBy.api)
    now = 90.0
    retries.tick()
    again = on.pulls.get("m")
    assert again is not None
    assert (again is pull, again.retries, again.asked_by) == (False, 2, "cachd:retry")
    again.done.result(PATIENCE_SECONDS)
