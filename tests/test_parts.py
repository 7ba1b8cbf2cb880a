"""The objects that run pulls, as the options say: their limits and threads, and what their exit leaves."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.config import Config, load
from cachd.daemon.parts import assembled
from cachd.errors import Busy, CachdError
from cachd.model import Limits
from tests.conftest import PATIENCE_SECONDS, spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin, Status

REACH = ["127.0.0.0/8", "http://127.0.0.1/"]


def options(root: Path, **more: object) -> Config:
    return load(root=root, reserve_free=0, allow=REACH, **more)


def threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.is_alive()}


def test_objects_that_run_pulls_change_the_limits_and_the_umask_of_their_process(root: Path) -> None:
    files, mask = resource.getrlimit(resource.RLIMIT_NOFILE), os.umask(0o077)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files[1] - 1, files[1]))
        with assembled(options(root)):
            assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (files[1], files[1])
            now = os.umask(0o022)
        assert now == 0o022
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        os.umask(mask)


def test_the_objects_have_the_limits_of_the_options(root: Path) -> None:
    config = options(
        root,
        limit_bytes="5GB",
        limit_bytes_per_second="3MB",
        sources=[{"prefix": "hf://org/", "limit": "2MB"}],
        models=[{"ref": "hf://org/m"}],
        sweep_interval_seconds=0,
        scrub_bytes_per_second=7,
        scrub_interval_seconds=70,
    )
    with assembled(config) as parts:
        assert parts.store.space.bounded().limit == 5 * 10**9
        assert parts.bandwidth.limits == Limits(3_000_000)
        assert list(parts.bandwidth.prefixes.values()) == [2_000_000]
        assert (parts.reclaim.keeps("org--m"), parts.reclaim.keeps("other")) == (True, False)
        scrubs = parts.scrubs.as_document()
        assert (scrubs["bytes_per_second"], scrubs["interval_seconds"]) == (7, 70)


def test_so_many_pulls_run_and_wait(root: Path, origin: Origin) -> None:
    hold = origin.hold("*", after=1)
    specs = [spec_of(origin.add(f"/{name}", noise(64))) for name in ("one", "two", "three")]
    with assembled(options(root, pulls=1, queued_pulls=1, keep_opened_seconds=0)) as parts:
        begun = [parts.pulls.start(spec) for spec in specs[:2]]
        assert hold.reached.wait(PATIENCE_SECONDS)
        with pytest.raises(Busy):
            parts.pulls.start(specs[2])
        assert len(parts.pulls.at_work()) == 1
        hold.release()
        for pull in begun:
            assert pull is not None
            assert pull.done.result(PATIENCE_SECONDS)


def test_a_source_that_does_not_list_its_files_is_a_failure_of_its_origin(root: Path, origin: Origin) -> None:
    ref = origin.add("/m", noise(64))
    origin.fault("/m", Status(503))
    with assembled(options(root, retries=0, resolve_seconds=0.2)) as parts:
        pull = parts.pulls.start(spec_of(ref))
        assert pull is not None
        with pytest.raises(CachdError):
            pull.done.result(PATIENCE_SECONDS)
        families = {family.name: family.samples for family in parts.metrics.registry.collect()}
        assert sum(sample.value for sample in families["cachd_origin_failures"])


def test_an_exit_ends_every_thread_and_the_next_process_may_use_the_root(root: Path) -> None:
    before = threads()
    for _ in range(2):
        with assembled(options(root)):
            names = " ".join(each.name for each in threads() - before)
            assert all(word in names for word in ("stream", "pull", "hash", "refusals", "resolve")), names
        assert threads() <= before


def test_a_variable_that_is_no_option_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHD_STREMS", "3")
    with capture_logs() as logs, assembled(options(root)):
        pass
    assert "CACHD_STREMS" in next(e["reason"] for e in logs if e["event"] == "unknown environment variable")
