"""Checks of blobs, verifications and scrubs, without a daemon: what each finds, counts and returns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from cachd.errors import Cancelled, NotFound, Unavailable
from cachd.kernel import durable
from cachd.model import File
from cachd.store.scrub_log import ScrubLog
from cachd.upkeep.blob_checks import BlobChecks
from cachd.upkeep.jobs import Job, Jobs, JobState
from cachd.upkeep.repairs import Repairs
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.verifications import Verifications
from tests.conftest import PATIENCE_SECONDS, Engine
from tests.ground.models import noise
from tests.ground.origin import Origin, Status
from tests.ground.site import until
from tests.ground.stored import commit, file_of

Engines = Callable[..., Engine]
SIZE = (1 << 20) + 100


class Checked:
    """The checks of an engine, with their own scrub log and metrics."""

    def __init__(self, on: Engine) -> None:
        self.store, self.metrics = on.store, on.metrics
        self.log = ScrubLog(on.store.layout.scrub_log)
        self.repairs = Repairs(on.store, on.pulls, self.log, on.metrics)
        self.blobs = BlobChecks(on.store, self.repairs, self.log, on.metrics)
        self.took: list[int] = []

    def check(self, file: File) -> str | None:
        return self.blobs.check(file, self.took.append)

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"cachd_{name}_total", labels) or 0.0


@pytest.fixture
def on(engine: Engines) -> Engine:
    return engine(scrub_bytes_per_second=0, retries=0)


@pytest.fixture
def checked(on: Engine) -> Checked:
    return Checked(on)


def pulled(on: Engine, origin: Origin, name: str = "m", **asked: Any) -> File:
    """A model of one file."""
    content = noise(SIZE, len(name))
    snapshot = on.pull(origin.add(f"/{name}", content, **asked), name=name)
    (file,) = on.store.manifests.of(snapshot).files
    return file


def damage(on: Engine, file: File) -> None:
    blob = on.store.content.path(file.blob)
    blob.chmod(0o644)
    with blob.open("r+b") as opened:
        opened.write(bytes(8))
    blob.chmod(durable.SEALED)


# --- one blob ---


def test_an_intact_blob_is_read_once_and_counts_as_verified(
    on: Engine, checked: Checked, origin: Origin
) -> None:
    file = pulled(on, origin)
    assert checked.check(file) is None
    assert sum(checked.took) == SIZE
    assert checked.counted("scrub_bytes") == SIZE
    assert dict(checked.log.times()).keys() == {file.blob}
    assert checked.counted("verify_failures", stage="scrub") == 0


def test_a_damaged_blob_is_read_twice_and_repaired(on: Engine, checked: Checked, origin: Origin) -> None:
    file = pulled(on, origin)
    checked.log.verified(file.blob)
    damage(on, file)
    wrong = checked.check(file)
    assert wrong
    assert checked.took.count(0) == len([count for count in checked.took if count]), "again, and not counted"
    assert checked.counted("scrub_bytes") == SIZE
    assert dict(checked.log.times()) == {}
    assert checked.counted("verify_failures", stage="scrub") == 1
    until(lambda: on.store.names.get("m"))
    assert checked.check(file) is None


def test_of_a_blob_that_nobody_needs_nothing_is_said(on: Engine, checked: Checked) -> None:
    file = file_of(b"content")
    commit(on.store, file, b"content")
    damage(on, file)
    assert checked.check(file) is None
    on.store.content.path(file.blob).unlink()
    assert checked.check(file) is None
    assert checked.counted("verify_failures", stage="scrub") == 0


def test_of_a_blob_that_is_replaced_while_it_is_read_nothing_is_said(
    on: Engine, checked: Checked, origin: Origin
) -> None:
    file = pulled(on, origin)
    blob = on.store.content.path(file.blob)
    other = blob.with_name("other")
    other.write_bytes(bytes(SIZE))

    def replace_it(_: int) -> None:
        if other.exists():
            other.replace(blob)

    assert checked.blobs.check(file, replace_it) is None
    assert dict(checked.log.times()) == {}
    assert on.store.names.get("m") is not None


def test_a_damaged_copy_of_an_intact_blob_is_replaced(on: Engine, checked: Checked, origin: Origin) -> None:
    on.pull(origin.add("/m", noise(SIZE)), name="m", copy=("*",))
    (file,) = on.store.manifests.of(on.store.names.ready("m")).files
    assert checked.check(file) is None
    assert sum(checked.took) == 3 * SIZE, "the blob, and its copy in either view"
    place = on.store.layout.model("m") / "m"
    before = place.stat()
    place.chmod(0o644)
    with place.open("r+b") as opened:
        opened.write(bytes(8))
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    place.chmod(durable.SEALED)
    wrong = checked.check(file)
    assert wrong is not None
    assert wrong.startswith("a copy of it in a view: ")
    assert sum(checked.took) == 6 * SIZE, "the second read of the damaged copy is not counted"
    assert checked.counted("verify_failures", stage="scrub") == 1
    until(lambda: on.store.names.get("m"))
    assert place.read_bytes() == noise(SIZE)
    assert checked.check(file) is None


def test_a_cancel_ends_a_check(on: Engine, checked: Checked, origin: Origin) -> None:
    file = pulled(on, origin)

    def cancelled(_: int) -> None:
        raise Cancelled("the daemon stops")

    with pytest.raises(Cancelled):
        checked.blobs.check(file, cancelled)
    assert dict(checked.log.times()) == {}


# --- one model ---


@pytest.fixture
def verifications(checked: Checked) -> Iterator[Verifications]:
    made = Verifications(checked.store, checked.repairs, checked.blobs, lambda: None)
    with closing(made):
        yield made


def test_a_model_is_intact_or_its_damaged_files_are_named(
    on: Engine, verifications: Verifications, origin: Origin
) -> None:
    file = pulled(on, origin)
    assert verifications.last("m") is None
    running = verifications.start("m")
    assert running.ended.wait(PATIENCE_SECONDS)
    assert (running.state, running.damaged, running.done, running.total) == (JobState.intact, [], SIZE, SIZE)
    assert verifications.last("m") is running
    damage(on, file)
    running = verifications.start("m")
    assert running.ended.wait(PATIENCE_SECONDS)
    assert (running.state, [path for path, _ in running.damaged]) == (JobState.damaged, [file.path])
    until(lambda: on.store.names.get("m"))
    (on.store.layout.model("m")).unlink()
    running = verifications.start("m")
    assert running.ended.wait(PATIENCE_SECONDS)
    assert running.damaged == [("", "models/m is not a link to its snapshot")]
    until(lambda: on.store.names.get("m"))


def test_an_unknown_model_and_one_in_repair_are_not_verified(
    on: Engine, verifications: Verifications, origin: Origin
) -> None:
    with pytest.raises(NotFound):
        verifications.start("absent")
    file = pulled(on, origin)
    on.store.quarantine(file, "damaged", on.store.content.inode(file.blob), now=5.0)
    with pytest.raises(Unavailable) as refused:
        verifications.start("m")
    assert (refused.value.code, refused.value.retry_after) == ("damaged", 5.0)
    assert f"{file.path}: damaged" in refused.value.detail


def test_a_verification_ends_cancelled_when_the_daemon_stops(
    checked: Checked, on: Engine, origin: Origin
) -> None:
    pulled(on, origin)

    def rest() -> None:
        raise Cancelled("the daemon stops")

    with closing(Verifications(checked.store, checked.repairs, checked.blobs, rest)) as made:
        running = made.start("m")
        assert running.ended.wait(PATIENCE_SECONDS)
    assert running.state is JobState.cancelled


def test_a_job_that_runs_again_counts_as_the_newest() -> None:
    """The oldest that have ended are forgotten first; at most 1,000 are remembered."""
    with closing(Jobs[Job](ThreadPoolExecutor(1))) as jobs:
        for name in ("again", "old", "again"):
            jobs.start(Job(name, 1), lambda _: None).end(JobState.warm)
        for number in range(999):
            jobs.start(Job(f"m{number}", 1), lambda _: None).end(JobState.warm)
        assert (jobs.last("old"), jobs.last("again") is not None) == (None, True)


# --- the scrub ---


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_state_of_a_scrub_shows_what_is_due_and_what_is_damaged(on: Engine, origin: Origin) -> None:
    now = Clock()
    scrubs = Scrubs(on.store, on.pulls, on.metrics, bytes_per_second=10**9, interval_seconds=60.0, now=now)
    with closing(scrubs):
        plain = scrubs.as_document()
        assert (plain["blobs"], plain["bytes"], plain["due"], plain["reading"]) == (0, 0, 0, None)
        assert (plain["oldest_verified_at"], scrubs.oldest()) == (None, None)
        file = pulled(on, origin)
        scrubs._presence._check()
        shown = scrubs.as_document()
        assert (shown["blobs"], shown["bytes"], shown["damaged"]) == (1, SIZE, [])
        assert (shown["bytes_per_second"], shown["interval_seconds"]) == (10**9, 60.0)
        oldest = scrubs.oldest()
        assert oldest is not None
        assert shown["oldest_verified_at"]
        snapshot = on.store.names.ready("m")
        verified_at = scrubs.verified_at(snapshot, on.store.manifests.of(snapshot))
        assert verified_at is not None
        assert verified_at >= oldest
        for later, due in ((59.0, 0), (60.0, 1)):
            now.now = oldest + later
            assert (scrubs.as_document()["due"], scrubs._due()) == (due, [file] * due)
        origin.fault("/m", Status(404), methods=("GET", "HEAD"))
        on.store.quarantine(file, "damaged", on.store.content.inode(file.blob), now=0.0)
        since, reason = "1970-01-01T00:00:00+00:00", f"{file.path}: damaged"
        assert scrubs.as_document()["damaged"] == [{"name": "m", "since": since, "reason": reason}]


class Ticking:
    """A clock that goes on at each look."""

    def __init__(self, seconds: float) -> None:
        self.now, self._seconds = 1000.0 - seconds, seconds

    def __call__(self) -> float:
        self.now += self._seconds
        return self.now


@pytest.mark.parametrize(("tick", "count"), [(0.0, 2), (149.0, 1), (150.0, 0)])
def test_a_scrub_reads_what_is_due_the_oldest_first_for_five_minutes(
    on: Engine, origin: Origin, tick: float, count: int
) -> None:
    new, old = (pulled(on, origin, name) for name in ("m", "nn"))
    on.store.layout.scrub_log.write_text(json.dumps({str(old.blob): 1.0, str(new.blob): 2.0}))
    scrubs = Scrubs(
        on.store, on.pulls, on.metrics, bytes_per_second=10**12, interval_seconds=0.0, clock=Ticking(tick)
    )
    with closing(scrubs):
        scrubs._presence._check()
        assert scrubs._due() == [old, new]
        assert scrubs._scrub() == 1.0
        times = dict(scrubs._scrub_log.times())
        assert [times[file.blob] > 2.0 for file in (old, new)] == [count > 0, count > 1]
        assert scrubs.as_document()["reading"] is None
    assert on.metrics.registry.get_sample_value("cachd_scrub_bytes_total") == count * SIZE
