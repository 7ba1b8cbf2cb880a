"""A tenant who asks for thousands of models that never come: what is remembered of them has bounds."""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from cachd.errors import CachdError
from cachd.kernel.threads import pool
from cachd.store.layout import Layout
from cachd.store.usage_log import UsageLog
from cachd.transfer.newest import MAX_REMEMBERED, MAX_REMEMBERED_BYTES
from cachd.upkeep.jobs import Job, Jobs, JobState
from tests.conftest import Engine, spec_of
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import until

MIB = 1 << 20
PATIENCE_SECONDS = 120
Engines = Callable[..., Engine]
Nodes = Callable[..., Node]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A root in memory, where thousands of syncs take no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        root = Path(place) / "root"
        root.mkdir(mode=0o755)
        yield root


def ask_and_fail(running: Engine, name: str, **asked: tuple[str, ...]) -> None:
    pull = running.pulls.start(spec_of("file:///nowhere/model", name=name, **asked))
    assert pull is not None
    with pytest.raises(CachdError):
        pull.done.result(PATIENCE_SECONDS)


def test_ended_pulls_of_thousands_of_names_cost_little_and_the_oldest_go_first(
    engine: Engines, memory: Path
) -> None:
    """Promised: Ended pulls are remembered for up to 1,000 names and 16 MiB, and the oldest are forgotten
    first."""
    running = engine(root=memory)
    ask_and_fail(running, "first")
    tracemalloc.start()
    try:
        for number in range(MAX_REMEMBERED + 100):
            ask_and_fail(running, f"m-{number}")
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    known = running.pulls.known()
    assert len(known) == MAX_REMEMBERED
    assert running.pulls.get("first") is None
    assert running.pulls.get(f"m-{MAX_REMEMBERED + 99}") is not None
    assert taken < 16 * MIB


def test_ended_pulls_with_the_longest_patterns_each_cost_no_more_than_their_bound(
    engine: Engines, memory: Path
) -> None:
    running = engine(root=memory)
    patterns = tuple(f"{'x' * 1000}{number}" for number in range(32))
    taken = 4 * sum(map(len, patterns))
    names = [f"m-{number}" for number in range(MAX_REMEMBERED_BYTES // taken + 10)]
    for name in names:
        ask_and_fail(running, name, include=patterns)
    assert len(running.pulls.known()) * taken <= MAX_REMEMBERED_BYTES
    assert running.pulls.get(names[-1]) is not None
    assert running.pulls.get(names[0]) is None


def test_what_an_ended_pull_had_in_memory_goes_with_its_end(engine: Engines, origin: Origin) -> None:
    running = engine()
    origin.add_model("m", {"f": noise(MIB), "g": noise(10)})
    running.pull(f"{origin.url}/m/")
    pull = running.pulls.get("m")
    assert pull is not None
    assert pull.progress._downloads == {}
    assert (pull.progress.now.done, pull.progress.now.files_done) == (MIB + 10, 2)
    failed = running.pulls.start(spec_of("file:///nowhere/model", name="x"))
    assert failed is not None
    wait([failed.done])
    assert failed.error is not None
    assert (failed.error.__traceback__, failed.error.__cause__, failed.error.__context__) == (None,) * 3


def test_uses_of_thousands_of_names_and_refs_have_bounds_in_memory_and_on_disk(root: Path) -> None:
    (root / ".cachd").mkdir()
    uses = UsageLog(Layout(root))
    for number in range(30_000):
        uses.used(f"m-{number}", time.time())
        uses.set_priority(f"m-{number}", 5)
        uses.set_priority(f"never-used-{number}", 5)
        uses.lost(f"hf://{'o' * 80}/{number}", "gone")
        uses.lost(f"hf://{'o' * 100_000}/{number % 3}", "gone")
        uses.opened(f"{number:032x}", time.time())
    uses.save()
    assert Layout(root).usage_log.stat().st_size < 4 * MIB
    told = json.loads(Layout(root).usage_log.read_bytes())
    assert {len(told[key]) for key in ("names", "priorities", "lost", "opened")} == {10_000}
    assert uses.of("m-0") is None
    assert uses.of("m-29999") is not None
    Layout(root).usage_log.write_text(json.dumps({**told, "lost": {f"{n}": "gone" for n in range(50_000)}}))
    again = UsageLog(Layout(root))
    again.used("x", time.time())
    again.save()
    assert len(json.loads(Layout(root).usage_log.read_bytes())["lost"]) == 10_000


def test_ended_jobs_of_thousands_of_names_are_forgotten_the_oldest_first() -> None:
    threads = pool(1, "verify", lambda: None)
    jobs = Jobs[Job](threads)
    for number in range(3000):
        jobs.start(Job(f"m-{number}", 1), lambda job: job.end(JobState.intact)).ended.wait(PATIENCE_SECONDS)
    assert jobs.last("m-0") is None
    assert jobs.last("m-2999") is not None
    assert len(jobs._last) <= 1001
    jobs.close()


def test_a_name_that_was_evicted_can_be_deleted_and_its_status_file_goes(node: Nodes, origin: Origin) -> None:
    running = node(limit_bytes="10MiB")
    running.pull(origin.add("/a", noise(MIB)))
    assert running.ready("a").status == 200
    status = running.root / "status/a.json"
    running.kill()
    running.start()
    assert running.ask("POST", "/v1/evictions", {"bytes": "10MB"}).document["freed_bytes"] >= MIB
    until(lambda: json.loads(status.read_text())["state"] == "evicted")
    assert running.ask("DELETE", "/v1/models/a").status == 200
    assert not status.exists()
    assert running.ask("DELETE", "/v1/models/a").status == 404
