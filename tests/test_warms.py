"""Warmings without a daemon: what fits into memory, what is read, and what each counts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import closing

import pytest

from cachd.errors import NoSpace, NotFound
from cachd.upkeep.jobs import JobState
from cachd.upkeep.warms import Warms
from tests.conftest import PATIENCE_SECONDS, Engine
from tests.ground.models import noise
from tests.ground.origin import Origin

SIZE = (1 << 20) + 100


@pytest.fixture
def on(engine: Callable[..., Engine]) -> Engine:
    return engine(scrub_bytes_per_second=0, retries=0)


def pulled(on: Engine, origin: Origin, name: str = "m") -> None:
    on.pull(origin.add(f"/{name}", noise(SIZE, len(name))), name=name)


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
