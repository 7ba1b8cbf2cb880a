"""The checks that models are in place, and what starts with a daemon, without its API."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cachd.config import Config
from cachd.daemon.parts import Daemon, assembled
from cachd.daemon.serve import started
from cachd.store.scrub_log import ScrubLog
from cachd.upkeep.presence import PresenceChecks
from cachd.upkeep.prewarm import Prewarm
from cachd.upkeep.repairs import Repairs
from tests.conftest import PATIENCE_SECONDS, Engine
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.pause import at_event
from tests.ground.site import remove, until

Engines = Callable[..., Engine]


def checks(on: Engine, clock: Callable[[], float] = lambda: 0.0) -> PresenceChecks:
    scrub_log = ScrubLog(on.store.layout.scrub_log)
    repairs = Repairs(on.store, on.pulls, scrub_log, on.metrics, chance=lambda: 0.5)
    return PresenceChecks(on.store, repairs, scrub_log, on.metrics, clock=clock)


def pulled(on: Engine, origin: Origin, *names: str) -> None:
    for name in names:
        on.pull(origin.add(f"/{name}", noise(64, len(name))), name=name)


@pytest.mark.parametrize("what", ["ready/one.json", "models/one", "models/one/one"])
def test_what_is_missing_when_the_checks_begin_is_found_and_restored(
    origin: Origin, engine: Engines, root: Path, what: str
) -> None:
    on = engine()
    pulled(on, origin, "one", "three")
    path = root / what
    path = path.resolve() if what.count("/") > 1 else path
    remove(path)
    with closing(checks(on)) as presence, at_event("readiness withdrawn", lambda: None) as withdrawn:
        presence.start()
        assert withdrawn.wait(PATIENCE_SECONDS)
        until(lambda: on.store.names.get("one") and path.exists())
        assert len(presence.files) == 2
        assert on.store.names.get("three")
    assert on.metrics.registry.get_sample_value("cachd_verify_failures_total", {"stage": "scrub"}) == 1


def test_a_blob_that_became_shorter_before_the_checks_begin_is_fetched_again(
    origin: Origin, engine: Engines, root: Path
) -> None:
    on = engine()
    pulled(on, origin, "one", "three")
    shown = root / "models/one/one"
    shown.chmod(0o644)
    with shown.open("r+b") as opened:
        opened.truncate(9)
    with closing(checks(on)) as presence, at_event("blob damaged", lambda: None) as damaged:
        presence.start()
        assert damaged.wait(PATIENCE_SECONDS)
        until(lambda: on.store.names.get("one") and shown.exists() and shown.stat().st_size == 64)


def test_a_change_while_the_checks_run_is_found_though_the_next_check_of_all_is_far_away(
    origin: Origin, engine: Engines, root: Path
) -> None:
    on = engine()
    pulled(on, origin, "one", "three")
    with closing(checks(on)) as presence:
        presence.start()
        until(lambda: presence.files)
        counted = on.metrics.registry.get_sample_value
        with at_event("readiness withdrawn", lambda: None) as withdrawn:
            remove((root / "models/one/one").resolve())
            assert withdrawn.wait(PATIENCE_SECONDS)
        until(lambda: on.store.names.get("one") and (root / "models/one/one").exists())
        until(lambda: counted("cachd_views_changed_total"))


def test_a_blob_into_which_somebody_writes_is_repaired_though_its_size_stays(
    origin: Origin, engine: Engines, root: Path
) -> None:
    on = engine()
    pulled(on, origin, "one", "three")
    shown = root / "models/one/one"
    with closing(checks(on)) as presence, at_event("blob damaged", lambda: None) as damaged:
        presence.start()
        until(lambda: presence.files)
        shown.chmod(0o644)
        with shown.open("r+b") as opened:
            opened.write(bytes(9))
        assert damaged.wait(PATIENCE_SECONDS)
        until(lambda: on.store.names.get("one") and shown.exists() and shown.read_bytes() == noise(64, 3))


def test_a_check_of_all_comes_soon_when_it_is_asked_for_and_else_after_five_minutes(
    origin: Origin, engine: Engines
) -> None:
    on, now = engine(), 1000.0
    pulled(on, origin, "one")
    with closing(checks(on, lambda: now)) as presence:
        presence._check()
        assert len(presence.files) == 1
        pulled(on, origin, "three")
        for again in (299.0, 300.0):
            presence.files = {}
            now = 1000.0 + again
            on.store.watch.changes()  # what is reported, this test does not ask for
            presence._check()
            assert bool(presence.files) is (again == 300.0)
        presence.files = {}
        presence.check_all_soon()
        presence._check()
        assert len(presence.files) == 2


def test_a_changed_model_alone_is_checked_until_all_are_due(
    origin: Origin, engine: Engines, root: Path
) -> None:
    on = engine()
    pulled(on, origin, "one", "three")
    counted = on.metrics.registry.get_sample_value
    with closing(checks(on)) as presence:
        presence._check()
        changes = counted("cachd_views_changed_total") or 0.0
        on.store.watch.changes()
        presence._check()
        (root / "ready/three.json").unlink()
        on.store.watch.changes()  # this deletion, nobody hears of
        remove((root / "models/one/one").resolve())
        presence._check()
        assert counted("cachd_verify_failures_total", {"stage": "scrub"}) == 1
        assert (counted("cachd_views_changed_total") or 0.0) == changes + 1
        presence.check_all_soon()
        presence._check()
        assert (counted("cachd_verify_failures_total", {"stage": "scrub"}) or 0.0) >= 2
        until(lambda: on.store.names.get("one") and on.store.names.get("three"))


# --- the start of a daemon ---


@pytest.fixture
def daemon(root: Path) -> Iterator[Daemon]:
    with assembled(Config(root=root, reserve_free=0, allow=("127.0.0.0/8",))) as parts:
        yield parts


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_all_that_works_without_a_request_starts_with_the_daemon_and_prewarm_ends_first(
    daemon: Daemon,
) -> None:
    work = {"prewarm", "progress", "sweep", "scrub", "presence", "reclaim"}
    before = threads()
    assert not before & work
    prewarm = Prewarm(daemon.pulls, daemon.store, daemon.warms, lambda: None)
    with started(daemon, prewarm):
        assert work <= threads()
        begun = threads() - before
        assert "status" in " ".join(begun)
    assert "prewarm" not in threads()


@pytest.mark.parametrize(("rate", "scrubs"), [(0, False), (10**6, True)])
def test_without_a_rate_nothing_is_scrubbed_and_presence_is_checked_all_the_same(
    engine: Engines, rate: int, *, scrubs: bool
) -> None:
    on = engine(scrub_bytes_per_second=rate)
    on.scrubs.start()
    assert ("scrub" in threads(), "presence" in threads()) == (scrubs, True)
    assert on.scrubs.as_document()["bytes_per_second"] == (rate or None)


@pytest.mark.parametrize(("interval", "sweeps"), [(0, False), (3600, True)])
def test_without_an_interval_there_is_no_thread_that_sweeps(
    root: Path, interval: float, *, sweeps: bool
) -> None:
    with assembled(Config(root=root, reserve_free=0, sweep_interval_seconds=interval)) as parts:
        parts.sweeps.start()
        assert ("sweep" in threads()) is sweeps
