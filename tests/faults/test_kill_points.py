"""cachd killed at every point of a model's way that has a name; then the next life, which needs nobody."""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachd.upkeep.prewarm import Desired, Prewarm
from tests.faults.children import in_child
from tests.faults.injection import KILLS, Injection, Plan, Tally
from tests.faults.lives import (
    CONTENTS,
    KIB,
    MIB,
    PATIENCE_SECONDS,
    Digests,
    Life,
    Origins,
    known_manifests,
    left_over,
    opened,
    specs,
    states,
    visible,
)
from tests.ground.chance import FACTOR
from tests.ground.models import noise
from tests.ground.needs import refuse
from tests.ground.node import Node
from tests.ground.origin import Origin

NAMED = r"rename \.cachd/ingest/.*/data \.cachd/blobs/"
KEPT = hashlib.sha256(CONTENTS["c"]["model.safetensors"]).hexdigest()  # of a model that stays
Known = dict[str, Digests]

POINTS: dict[str, tuple[Plan, ...]] = {
    "after the reservation, before the ingest": (Plan("killed before", 0, point=r"mkdir \.cachd/ingest/"),),
    "the ingest made, nothing told of it": (
        Plan("killed after", 0, point=r"mkdir \.cachd/ingest/"),
        Plan("killed half-way", 0, point=r"pwrite \.cachd/ingest/.*/about\.json"),
    ),
    "in the middle of a write": (Plan("killed half-way", 0, point=r"pwrite \.cachd/ingest/.*/data"),),
    "what has come of a part written and not kept": (
        Plan("killed before", 0, point=r"write \.cachd/ingest/.*/received"),
        Plan("killed half-way", 0, point=r"write \.cachd/ingest/.*/received"),
        Plan("killed after", 0, point=r"write \.cachd/ingest/.*/received"),
    ),
    "between the data and its journal line": (
        Plan("killed before", 0, point=r"write \.cachd/ingest/.*/journal"),
        Plan("killed half-way", 0, point=r"write \.cachd/ingest/.*/journal"),
    ),
    "the journal line written and not synced": (
        Plan("killed after", 0, point=r"write \.cachd/ingest/.*/journal"),
    ),
    "all bytes written, the digest not taken": (Plan("killed before", 0, point=r"fchmod \.cachd/ingest/"),),
    "the digest taken, the blob not named": (Plan("killed before", 0, point=NAMED),),
    "the blob named, its name not durable": (
        Plan("killed after", 0, point=NAMED),
        Plan("killed after", 0, point=rf"rename \.cachd/ingest/sha256-{KEPT}-\d+/data "),
        Plan("killed before", 0, point=r"fsync \.cachd/blobs/sha256$"),
    ),
    "some files of a model are blobs": (Plan("killed before", 1, point=NAMED),),
    "recorded, and nothing to hold it by": (
        Plan("killed before", 0, point=r"open \.cachd/staging/[0-9a-f]+\.hold"),
        Plan("killed before", 0, point=r"rename \.cachd/staging/[0-9a-f]+\.hold models/\.holds/"),
    ),
    "it can be held, its tree is not shown": (
        Plan("killed after", 0, point=r"rename \.cachd/staging/[0-9a-f]+\.hold models/\.holds/"),
    ),
    "its address is there, its name is not": (
        Plan("killed before", 0, point=r"rename \.cachd/staging/m@\w+\.link models/m@"),
        Plan("killed after", 0, point=r"rename \.cachd/staging/m@\w+\.link models/m@"),
    ),
    "the tree shown, the name not moved": (
        Plan("killed after", 0, point=r"rename \.cachd/staging/[0-9a-f]+ models/\.trees/"),
        Plan("killed before", 0, point=r"rename \.cachd/staging/m\.link models/m"),
    ),
    "the name moved, not ready": (
        Plan("killed after", 0, point=r"rename \.cachd/staging/m\.link models/m"),
        Plan("killed before", 0, point=r"rename \.cachd/staging/m\.json ready/m\.json"),
    ),
    "ready, the spec not forgotten": (
        Plan("killed after", 0, point=r"rename \.cachd/staging/m\.json ready/m\.json"),
        Plan("killed before", 0, point=r"unlink \.cachd/pending/m\.json"),
        Plan("killed after", 0, point=r"unlink \.cachd/pending/m\.json"),
    ),
    "withdrawn, not deleted": (
        Plan("killed before", 0, point=r"unlink \.cachd/pins/d\.bin"),
        Plan("killed before", 0, point=r"unlink models/d\.bin"),
        Plan("killed before", 0, point=r"rename models/\.trees/[0-9a-f]+ \.cachd/trash/"),
    ),
    "nobody can hold it any more, and all else is there": (
        Plan("killed before", 0, point=r"unlink models/\.holds/"),
        Plan("killed after", 0, point=r"unlink models/\.holds/"),
    ),
    "its address gone, its tree is there": (Plan("killed after", 0, point=r"unlink models/d\.bin@"),),
    "half deleted": (
        Plan("killed after", 0, point=r"rename models/\.trees/[0-9a-f]+ \.cachd/trash/"),
        Plan("killed after", 0, point=r"unlink \.cachd/trash/[0-9a-f]+/"),
        Plan("killed before", 0, point=r"rmdir \.cachd/trash/[0-9a-f]+$"),
    ),
}


@pytest.fixture(scope="module")
def origins() -> Iterator[Origins]:
    started = Origins()
    yield started
    started.close()


@pytest.fixture(scope="module")
def known(origins: Origins, tmp_path_factory: pytest.TempPathFactory) -> Known:
    """What each manifest holds."""
    root = tmp_path_factory.mktemp("known")

    def life() -> list[str]:
        found: Known = {}
        with opened(root, origins) as parts:
            Life(parts, origins, pulled=lambda model: known_manifests(root, model, found)).run()
        return [json.dumps(found)]

    return dict(json.loads(in_child(life).told[0]))


@pytest.fixture
def killed_at(root: Path, origins: Origins) -> Callable[[Plan], bool]:
    """Runs a life over the test's root that dies as planned; whether it did."""

    def run(plan: Plan) -> bool:
        def life() -> list[str]:
            injection = Injection(root, plan, Tally())
            with opened(root, origins) as parts:
                Life(parts, origins).run()
            injection.over()
            return []

        return in_child(life).killed

    return run


def each_plan(points: dict[str, tuple[Plan, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "plan", [pytest.param(plan, id=f"{name}: {plan}") for name, plans in points.items() for plan in plans]
    )


@each_plan(POINTS)
def test_killed_at_a_point_the_model_is_whole_or_absent_and_the_next_life_ends_what_was_begun(
    root: Path, origins: Origins, known: Known, killed_at: Callable[[Plan], bool], plan: Plan
) -> None:
    """Promised: After kill -9, every published model is complete or absent, and the restart needs no
    human."""
    assert killed_at(plan), "it never came to that point"
    assert visible(root, known) == []
    assert in_child(lambda: recovered(root, origins)).told == []
    assert visible(root, known) == []


def recovered(root: Path, origins: Origins) -> list[str]:
    """A life in which nothing fails; what is not as it should be in the end."""
    with opened(root, origins) as parts:
        life = Life(parts, origins)
        life.run()
        seen = states(parts)
    found = [repr(error) for error in life.errors]
    if seen != {"m": "ready", "c": "ready"}:
        found.append(f"states {seen}")
    return found + left_over(root)


LISTED: dict[str, tuple[Plan, ...]] = {
    "pinned, not asked for": (
        Plan("killed before", 0, point=r"rename \.cachd/config_pins/\.m\.new \.cachd/config_pins/m"),
        Plan("killed after", 0, point=r"rename \.cachd/config_pins/\.m\.new \.cachd/config_pins/m"),
    ),
    "asked for, not begun": (
        Plan("killed before", 0, point=r"rename \.cachd/pending/\.m\.json\.new "),
        Plan("killed after", 0, point=r"rename \.cachd/pending/\.m\.json\.new "),
    ),
    "begun": (Plan("killed half-way", 0, point=r"pwrite \.cachd/ingest/.*/data"),),
    "the old ready file gone": (Plan("killed after", 0, point=r"unlink ready/m\.json"),),
    "the name moved": (Plan("killed after", 0, point=r"rename \.cachd/staging/m\.link models/m"),),
    "ready": (Plan("killed after", 0, point=r"rename \.cachd/staging/m\.json ready/m\.json"),),
}


def listed(root: Path, origins: Origins, model: str, injected: Plan | None = None) -> list[str]:
    """One life with a configuration that lists `model` as m, pinned; what is wrong in the end."""
    injection = Injection(root, injected, Tally()) if injected else None
    with opened(root, origins) as parts:
        desired = iter([[Desired(specs(origins)[model], pin=True)]])
        parts.pulls.resume()
        prewarm = Prewarm(parts.pulls, parts.store, parts.warms, lambda: next(desired, None))
        prewarm.start()
        if running := parts.pulls.awaited("m"):
            running.done.result(PATIENCE_SECONDS)
        prewarm.close()
        if injection:
            injection.over()
        shown = parts.store.names.get("m")
        return [
            *([] if shown and shown.spec == specs(origins)[model] else [f"m is {shown}"]),
            *([] if parts.store.pins.has("m") else ["m is not pinned"]),
        ]


@each_plan(LISTED)
def test_killed_while_a_changed_configuration_is_taken_over_the_next_life_does_what_it_says(
    root: Path, origins: Origins, known: Known, plan: Plan
) -> None:
    """The list has another ref under the same name: the name moves to it, though it is pinned."""
    assert in_child(lambda: listed(root, origins, "a")).told == []
    (root / ".cachd/config_pins/m").unlink()
    assert in_child(lambda: listed(root, origins, "b", plan)).killed, "it never came to that point"
    assert visible(root, known) == []
    assert in_child(lambda: listed(root, origins, "b")).told == []
    assert visible(root, known) == []


ROLLED_BACK: dict[str, tuple[Plan, ...]] = {
    "asked for, not recorded": (Plan("killed before", 0, point=r"rename \.cachd/rollbacks/\.m\.json\.new "),),
    "recorded": (Plan("killed after", 0, point=r"rename \.cachd/rollbacks/\.m\.json\.new "),),
    "the history changed, the name not": (
        Plan("killed after", 0, point=r"rename \.cachd/previous/\.m\.json\.new "),
    ),
    "the old ready file gone": (Plan("killed after", 0, point=r"unlink ready/m\.json"),),
    "the name moved": (Plan("killed after", 0, point=r"rename \.cachd/staging/m\.link models/m"),),
    "ready, the record still there": (
        Plan("killed after", 0, point=r"rename \.cachd/staging/m\.json ready/m\.json"),
        Plan("killed before", 0, point=r"unlink \.cachd/rollbacks/m\.json"),
    ),
}


@each_plan(ROLLED_BACK)
def test_killed_in_a_rollback_the_next_life_has_the_model_and_the_way_back(
    root: Path, origins: Origins, known: Known, plan: Plan
) -> None:
    def published() -> list[str]:
        with opened(root, origins) as parts:
            for model in ("a", "b"):
                Life(parts, origins).pull(model)
        return []

    def rolled_back() -> list[str]:
        with opened(root, origins) as parts:
            injection = Injection(root, plan, Tally())
            parts.pulls.rollback("m")
            injection.over()
        return []

    def back_and_forth() -> list[str]:
        found, sent = [], origins.sent()
        with opened(root, origins) as parts:
            both = {specs(origins)[model] for model in ("a", "b")}
            shown = parts.store.names.get("m")
            other = parts.pulls.rollback("m")
            if shown is None or {shown.spec, other.spec} != both:
                found.append(f"m was {shown}, and is {other} after a rollback")
        return [*found, *([] if origins.sent() == sent else ["bytes were fetched"])]

    assert in_child(published).told == []
    assert in_child(rolled_back).killed, "it never came to that point"
    assert visible(root, known) == []
    assert in_child(back_and_forth).told == []
    assert visible(root, known) == []


def test_a_recovery_killed_again_and_again_ends_when_it_is_let(
    root: Path, origins: Origins, known: Known, killed_at: Callable[[Plan], bool]
) -> None:
    """Killed at a random call, and at the recovery's own work in turn: whatever a start does may be cut.

    25 times; FUZZ_FACTOR=4 makes it a hundred, and `make torture` kills for ten minutes.
    """
    assert killed_at(Plan("killed after", 0, point=r"rename models/\.trees/[0-9a-f]+ \.cachd/trash/"))
    chosen, deaths = random.Random(12), 0
    while deaths < 25 * FACTOR:
        plan = Plan(chosen.choice(KILLS), chosen.randrange(chosen.choice((50, 120))))
        deaths += killed_at(plan)
        assert visible(root, known) == [], f"after {deaths} deaths, the last: {plan}"
    assert in_child(lambda: recovered(root, origins)).told == []
    assert visible(root, known) == []


@pytest.mark.parametrize("length", [0, 1, 3 * MIB], ids=["empty", "one byte left", "its last bytes gone"])
@pytest.mark.parametrize("path", ["1.bin", "config.json"])
def test_a_blob_that_lost_its_bytes_with_the_page_cache_is_not_ready_and_is_fetched_again(
    root: Path, origins: Origins, known: Known, path: str, length: int
) -> None:
    """What a disk leaves that lies about its syncs: the ready file there, a file of the model cut off."""
    length = min(length, len(CONTENTS["a"][path]) - 1)

    def life() -> list[str]:
        with opened(root, origins) as parts:
            Life(parts, origins).pull("a")
        return []

    def next_life() -> list[str]:
        with opened(root, origins) as parts:
            found = [] if states(parts) == {} else [f"at once {states(parts)}"]
            before = origins.sent()
            Life(parts, origins).pull("a")
            fetched = origins.sent() - before
        lost = len(CONTENTS["a"][path])
        return found if lost <= fetched < lost + 10 * KIB else [*found, f"{fetched} bytes fetched for {lost}"]

    assert in_child(life).told == []
    cut_off = root / "models/m" / path
    cut_off.chmod(0o644)  # root may write what its owner may not
    os.truncate(cut_off, length)
    assert in_child(next_life).told == []
    assert visible(root, known) == []
    assert left_over(root) == []


@pytest.mark.parametrize("event", [None, "pull ended"], ids=["at once", "its pull interrupted"])
def test_a_stop_that_is_cut_short_by_a_kill_loses_no_pull(
    origin: Origin, node: Callable[..., Node], event: str | None
) -> None:
    content = noise(6 * MIB)
    ref = origin.add("/model.bin", content)
    running = node(allow=[f"{origin.url}/"])
    hold = origin.hold("/model.bin", after=MIB)
    running.pull(ref)
    assert hold.reached.wait(30)
    os.kill(running.pid, signal.SIGTERM)
    if event:
        running.wait_for(event)
    running.kill()
    hold.release()
    running.start()
    assert running.ready("model.bin").status == 200
    assert (running.root / "models/model.bin/model.bin").read_bytes() == content


@pytest.fixture
def short_of_memory() -> Iterator[Callable[[int], Path]]:
    """Lets a process have a mebibyte more and no byte after it; gives the directory of its cgroup."""
    cgroup = Path("/sys/fs/cgroup/memory") / f"cachd-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        refuse("cgroup", str(error))

    def limited(pid: int) -> Path:
        (cgroup / "memory.limit_in_bytes").write_text(str(MIB))
        (cgroup / "cgroup.procs").write_text(str(pid))
        return cgroup

    yield limited
    cgroup.rmdir()


def test_killed_by_the_kernel_for_want_of_memory_it_goes_on_when_started_again(
    origin: Origin, node: Callable[..., Node], short_of_memory: Callable[[int], Path]
) -> None:
    content = noise(32 * MIB)
    ref = origin.add("/model.bin", content)
    running = node(allow=[f"{origin.url}/"])
    hold = origin.hold("/model.bin", after=MIB)
    running.pull(ref)
    assert hold.reached.wait(30)
    pidfd = os.pidfd_open(running.pid)
    cgroup = short_of_memory(running.pid)
    hold.release()
    assert select.select([pidfd], [], [], 60)[0], "it lives on"
    os.close(pidfd)
    running.kill()
    assert "oom_kill 1" in (cgroup / "memory.oom_control").read_text()
    running.start()
    assert running.ready("model.bin").status == 200
    assert (running.root / "models/model.bin/model.bin").read_bytes() == content
