"""Threads on one core: when they gather there, and when they scatter again."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http
from cachd.sources.response import Response
from cachd.transfer.cores import OneCore
from tests.conftest import Engine
from tests.ground.models import noise
from tests.ground.origin import Origin

KIB, MIB = 1 << 10, 1 << 20
EVERY = os.sched_getaffinity(0)

pytestmark = pytest.mark.skipif(len(EVERY) < 2, reason="on one core all threads are gathered as it is")

Two = tuple[ThreadPoolExecutor, ThreadPoolExecutor]


@pytest.fixture
def two() -> Iterator[Two]:
    """A thread each: where it may run is its own."""
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        yield first, second


def cores(thread: ThreadPoolExecutor, after: Callable[[], object]) -> set[int]:
    """Where the thread may run once it has done something."""

    def look() -> set[int]:
        after()
        return os.sched_getaffinity(0)

    return thread.submit(look).result(30)


def test_threads_that_gather_share_a_core_until_they_scatter(two: Two) -> None:
    first, second = two
    together = OneCore()
    shared = cores(first, together.gather)
    assert len(shared) == 1
    assert cores(second, together.gather) == shared
    assert cores(first, together.scatter) == EVERY
    assert cores(second, lambda: None) == shared
    assert cores(second, together.scatter) == EVERY
    assert os.sched_getaffinity(0) == EVERY


def test_the_core_is_the_schedulers_choice_made_anew(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is free for a while, and where it is then, there all gather."""
    first, second = two
    one, other = sorted(EVERY)[:2]
    now, here = 100.0, one
    monkeypatch.setattr("cachd.transfer.cores.time.monotonic", lambda: now)
    monkeypatch.setattr("cachd.transfer.cores.running_on", lambda: here)
    together = OneCore()
    assert cores(first, together.gather) == {one}
    assert cores(second, together.gather) == {one}
    now, here = 102.0, other
    assert cores(first, together.gather) == EVERY
    assert cores(second, together.gather) == {one}
    assert cores(first, together.gather) == {other}
    assert cores(second, together.gather) == {other}


def test_a_core_that_was_taken_away_keeps_nobody_from_work(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two
    monkeypatch.setattr("cachd.transfer.cores.running_on", lambda: max(EVERY) + 1000)
    together = OneCore()
    assert cores(first, together.gather) == EVERY
    assert cores(second, together.gather) == EVERY


def test_what_begins_among_the_gathered_is_gathered(two: Two) -> None:
    together, begun = OneCore(), []

    def begin() -> None:
        with together.gathered(), ThreadPoolExecutor(1) as pool:
            begun.append((os.sched_getaffinity(0), pool.submit(os.sched_getaffinity, 0).result(30)))

    assert cores(two[0], begin) == EVERY
    [(its_own, theirs)] = begun
    assert theirs == its_own
    assert len(its_own) == 1


def test_a_stream_gathers_for_a_small_file_and_scatters_for_a_large_one(
    origin: Origin, engine: Callable[..., Engine], root: Path
) -> None:
    running = engine(streams=1)
    [stream] = [t for t in threading.enumerate() if t.name == "stream-0"]
    assert stream.native_id is not None
    seen = []
    for size in (100 * KIB, 20 * MIB, 100 * KIB, 200 * KIB):
        content, name = noise(size, seed=len(seen)), f"file-{len(seen)}"
        origin.add(f"/{name}", content)
        running.pull(f"{origin.url}/{name}#sha256={hashlib.sha256(content).hexdigest()}")
        assert (root / f"models/{name}/{name}").read_bytes() == content
        seen.append(os.sched_getaffinity(stream.native_id))
    assert [len(cores) == 1 for cores in seen] == [True, False, True, False]
    assert seen[1] == seen[3] == EVERY


def test_a_source_is_asked_about_many_files_by_threads_that_gathered(
    origin: Origin, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[frozenset[int]] = set()
    head = Http.head

    def noted(http: Http, url: str, token: CancelToken, *, secrets: Mapping[str, str]) -> Response:
        seen.add(frozenset(os.sched_getaffinity(0)))
        return head(http, url, token, secrets=secrets)

    monkeypatch.setattr(Http, "head", noted)
    ref = origin.add_model("model", {f"file-{n}.json": noise(KIB, seed=n) for n in range(20)})
    engine().pull(ref)
    [cores] = seen
    assert len(cores) == 1
