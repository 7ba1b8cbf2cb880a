"""Checks, sweeps and warmings of models without a daemon: what each finds, counts and returns."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from cachd.errors import Cancelled, NoSpace, NotFound, Unavailable
from cachd.kernel import durable
from cachd.model import Digest, File
from cachd.store.scrub_log import ScrubLog
from cachd.store.sweep import KINDS
from cachd.upkeep.blob_checks import BlobChecks
from cachd.upkeep.jobs import Job, Jobs, JobState
from cachd.upkeep.repairs import Repairs
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.sweeps import Sweeps
from cachd.upkeep.verifications import Verifications
from cachd.upkeep.warms import Warms
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin, Status
from tests.ground.site import until
from tests.ground.stored import FILE, PARTS, commit, file_of, left_by_an_earlier_life

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
        assert scrubs.oldest() == (1.0 if not count else 2.0 if count == 1 else scrubs.oldest())
        assert (scrubs.oldest() or 0.0) > 2.0 or count < 2
        assert scrubs.as_document()["reading"] is None
    assert on.metrics.registry.get_sample_value("cachd_scrub_bytes_total") == count * SIZE


# --- sweeps ---


class Swept:
    """Sweeps of an engine with clocks of their own."""

    def __init__(self, on: Engine, *, keep: float = 60.0) -> None:
        self.clock, self.now = Clock(), Clock()
        self.sweeps = Sweeps(
            on.store,
            on.pulls,
            on.metrics,
            interval_seconds=0,
            keep_seconds=keep,
            clock=self.clock,
            now=self.now,
        )


def test_what_changed_lately_is_kept_and_so_is_everything_after_a_start(on: Engine) -> None:
    left_by_an_earlier_life(on.store, PARTS[0])  # type: ignore[arg-type]
    swept = Swept(on)
    (found,) = swept.sweeps.leftovers(everything=True)
    swept.clock.now, swept.now.now = 1059.0, found.changed_at + 1e6
    assert swept.sweeps.leftovers() == [], "the daemon has just begun"
    swept.clock.now = 1060.0
    assert [each.name for each in swept.sweeps.leftovers()] == [str(FILE.blob)]
    swept.now.now = found.changed_at + 60.0
    assert swept.sweeps.leftovers() == [], "it changed lately"
    swept.now.now += 0.001
    before = on.metrics.registry.get_sample_value("cachd_swept_bytes_total", {"kind": "ingest"}) or 0.0
    ((gone, freed),) = swept.sweeps.sweep()
    assert (gone.name, freed) == (str(FILE.blob), found.size)
    after = on.metrics.registry.get_sample_value("cachd_swept_bytes_total", {"kind": "ingest"}) or 0.0
    assert after - before == freed
    assert swept.sweeps.sweep(everything=True) == []


def test_each_kind_of_leftover_has_its_metric_from_the_start(on: Engine) -> None:
    Swept(on)
    for kind in KINDS:
        assert on.metrics.registry.get_sample_value("cachd_swept_bytes_total", {"kind": kind}) == 0.0


def test_a_sweep_ends_when_the_daemon_stops_and_drops_proofs_that_nobody_needs(on: Engine) -> None:
    left_by_an_earlier_life(on.store, PARTS[0])  # type: ignore[arg-type]
    gone = File("a", 1, "https://host/a", Digest("sha256", "3" * 64), base="https://host/")
    on.store.content.proven.add(gone)
    swept = Swept(on)
    swept.sweeps.close()
    assert swept.sweeps.sweep(everything=True) == []
    assert len(swept.sweeps.leftovers(everything=True)) == 1
    assert not on.store.content.proven.has(gone)


def test_what_a_running_pull_may_need_is_no_leftover(on: Engine, origin: Origin) -> None:
    """Until its manifest is known, nobody knows which blobs it needs."""
    left_by_an_earlier_life(on.store, PARTS[0])  # type: ignore[arg-type]
    ref = origin.add("/m", noise(SIZE))
    hold = origin.hold("/m", after=0)
    running = on.begin(spec_of(ref, name="m"))
    assert hold.reached.wait(PATIENCE_SECONDS)
    swept = Swept(on)
    until(lambda: running.progress.manifest is not None)
    assert [each.name for each in swept.sweeps.leftovers(everything=True)] == [str(FILE.blob)]
    hold.release()
    running.done.result(PATIENCE_SECONDS)


# --- warmings ---


@pytest.mark.parametrize(("beside", "state"), [(0, "warm"), (-1, "failed")])
def test_a_model_is_warmed_if_its_missing_bytes_fit_exactly(
    on: Engine, origin: Origin, beside: int, state: str
) -> None:
    pulled(on, origin, "m")
    pulled(on, origin, "nn")
    path = on.store.layout.model("m") / "m"
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    others = on.store.manifests.of(on.store.names.ready("nn"))
    spaces: list[int] = []

    def space() -> int:
        here = warms.resident_of(on.store.manifests.of(on.store.names.ready("m")))
        spaces.append(SIZE + warms.resident_of(others) + beside)
        assert here < SIZE
        return spaces[-1]

    before = threading.enumerate()
    warms = Warms(on.store, on.metrics, space=space)
    with closing(warms):
        if warms.resident()["m"]:
            pytest.skip("this file system keeps the pages of a file")
        assert warms.warming("m") is None
        running = warms.warm("m")
        assert running.ended.wait(PATIENCE_SECONDS)
        assert warms.warming("m") is running
        assert running.state == state
        if running.error:
            assert isinstance(running.error, NoSpace)
            assert running.error.code == "no_memory"
            assert running.error.facts == {"need": SIZE, "free": SIZE - 1}
            assert (running.loaded, warms.resident()["m"]) == (0, 0)
            return
        assert (running.loaded, running.done, running.total) == (SIZE, SIZE, SIZE)
        assert warms.resident()["m"] == SIZE
        assert on.metrics.registry.get_sample_value("cachd_warmed_bytes_total") == SIZE
        again = warms.warm("m")
        assert again.ended.wait(PATIENCE_SECONDS)
        assert (again.state, again.loaded, again.done, len(spaces)) == (JobState.warm, 0, SIZE, 1)
        with pytest.raises(NotFound):
            warms.warm("absent")
    assert not [each for each in threading.enumerate() if each not in before]


def test_pages_of_a_file_are_counted_once_for_all_models(on: Engine, origin: Origin) -> None:
    pulled(on, origin)
    manifest = on.store.manifests.of(on.store.names.ready("m"))
    with closing(Warms(on.store, on.metrics)) as warms:
        counted: dict[str, int] = {}
        size = warms.resident_of(manifest, counted)
        assert sum(counted.values()) == size == warms.resident_of(manifest)
        (path,) = counted
        counted[path] = 7
        assert warms.resident_of(manifest, counted) == 7
