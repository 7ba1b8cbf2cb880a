"""How a daemon opens its store: the limits it gives it, whose lease it waits for, and who shares the root."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cachd import config
from cachd.daemon.store import Bounds, Sharing, open_store, place_of, shared_volume, unleased
from cachd.daemon.turns import Waited, take_turn
from cachd.errors import CachdError, Forbidden, InUse, Invalid, Leased, NotFound
from cachd.kubelet import is_used_by_node
from cachd.model import ModelSpec, Snapshot
from cachd.store.disk_store import DiskStore
from cachd.store.layout import Layout
from cachd.store.nodes import Nodes, Term
from tests.conftest import Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin


def options(root: Path, **more: Any) -> config.Config:
    return config.load(root=root, **more)


# --- leases ---


def test_a_read_that_a_lease_blocks_is_made_again_for_a_minute(root: Path) -> None:
    answers: list[object] = [Leased("by a pod"), Leased("by a pod"), "read"]
    times = iter([0.0, 30.0, 60.0])

    def read() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Leased):
            raise answer
        return answer

    with capture_logs() as logs:
        assert unleased(root, read, clock=lambda: next(times)) == "read"
    assert [each["reason"] for each in logs] == ["by a pod"] * 2
    answers[:], times = [Leased("by a pod")], iter([0.0, 60.1])
    with pytest.raises(Leased):
        unleased(root, read, clock=lambda: next(times))


# --- the root ---


def test_the_root_is_the_directory_that_is_named_or_the_daemon_s_own_in_it(root: Path) -> None:
    assert place_of(options(root)) == root
    assert os.listdir(root) == []
    own = place_of(options(root, own_directory=True))
    assert (own.parent, own.is_dir()) == (root, True)


def test_a_root_that_everybody_may_replace_is_refused(root: Path) -> None:
    root.parent.chmod(0o777)
    try:
        with pytest.raises(Forbidden):
            place_of(options(root))
    finally:
        root.parent.chmod(0o755)


@pytest.mark.parametrize(
    ("shared", "why"), [(True, "the option shared"), (False, ""), (None, "")], ids=["yes", "no", "unset"]
)
def test_a_root_is_shared_if_the_option_or_the_file_system_says_so(
    root: Path, *, shared: bool | None, why: str
) -> None:
    for counts_uncertain in (True, False):
        assert shared_volume(options(root, shared=shared), root, counts_uncertain=counts_uncertain) == why
        absent = root / "absent"
        assert shared_volume(options(root, shared=shared), absent, counts_uncertain=counts_uncertain) == why


def test_a_shared_root_is_logged_once_and_not_if_everything_is_forced(root: Path) -> None:
    shared = "shared volume: nothing is evicted or deleted without force"
    for sharing, expected in ((Sharing(), [shared]), (Sharing(force=True), [])):
        with capture_logs() as logs, open_store(options(root, shared=True), sharing=sharing) as store:
            assert store.layout.root == root
        assert [each["event"] for each in logs if each["event"] == shared] == expected


def test_a_locked_root_is_waited_for_only_if_somebody_can_wait(root: Path) -> None:
    waits: list[tuple[str, Path]] = []
    first = DiskStore(root).__enter__()

    def until_free(error: CachdError, lock: Path) -> None:
        waits.append((error.code, lock))
        first.__exit__(None, None, None)

    with pytest.raises(InUse):
        open_store(options(root)).__enter__()
    with open_store(options(root), until_free) as store:
        assert store.layout.root == root
    assert waits == [("root_locked", Layout(root).lock)]


# --- limits ---


@pytest.fixture
def store(root: Path) -> Iterator[DiskStore]:
    with DiskStore(root) as opened:
        yield opened


def test_the_limit_and_the_reserves_are_those_of_the_options(store: DiskStore, root: Path) -> None:
    bounds = Bounds(store)
    bounds.set(options(root, limit_bytes="1GB", reserve_free="5MB", reserve_inodes=7))
    now = store.space.bounded()
    assert (now.limit, now.reserve_free, now.reserve_inodes) == (10**9, 5 * 10**6, 7)
    bounds.set(options(root, reserve_free=0, reserve_inodes=0))
    now = store.space.bounded()
    assert (now.limit, now.reserve_free, now.reserve_inodes) == (None, 0, 0)


def test_on_a_disk_that_the_node_uses_the_kubelet_s_thresholds_are_kept_and_reported(
    store: DiskStore, root: Path
) -> None:
    bounds = Bounds(store)
    assert (bounds.report(), bounds.kubelet_ratio()) == (None, {})
    if not is_used_by_node(root):
        pytest.skip("the node uses another disk")
    stated = {"nodefs.available": "10%", "nodefs.inodesFree": "4%"}
    with capture_logs() as logs:
        bounds.set(options(root, kubelet_thresholds=stated))
    assert logs == []
    report = bounds.report()
    assert report is not None
    assert (report.available_percent, report.inodes_percent, report.thresholds_from) == (10, 4, "option")
    assert report.reason is None
    assert bounds.kubelet_ratio() == {"option": 0.1}
    now = store.space.bounded()
    assert now.reserve_free == pytest.approx(0.15 * now.total, abs=1)
    with capture_logs() as logs:
        bounds.set(options(root, kubelet_thresholds=stated, reserve_free=0))
    (warning,) = logs
    assert (warning["reserve_free_bytes"], warning["log_level"]) == (0, "warning")
    assert warning["kubelet_bytes"] == pytest.approx(0.1 * now.total, abs=1)
    with capture_logs() as logs:
        bounds.set(options(root, kubelet_thresholds={"nodefs.available": "1000000"}, reserve_free=10**6))
    assert logs == []


# --- turns on a shared volume ---


class Enough(Exception):
    """A waiter has seen what it wanted."""


def turn(root: Path, spec: ModelSpec, *, ready: bool = True, waits: Callable[[Waited], object]) -> Any:
    return take_turn(root, spec, accepts_ready=ready, waits=waits, fenced=lambda: None)


def nobody(_: Waited) -> None:
    raise AssertionError("nobody is to be waited for")


def test_the_first_process_may_write_and_another_one_waits_and_sees_how_far_it_is(root: Path) -> None:
    spec, seen = spec_of("hf://org/m"), list[Waited]()
    term = turn(root, spec, waits=nobody)
    assert isinstance(term, Term)
    term.begin()

    def look(waited: Waited) -> None:
        seen.append(waited)
        if len(seen) == 2:
            raise Enough
        status = {"state": "downloading", "bytes": {"done": 5, "total": 9}, "rate_bytes_per_second": 3}
        Layout(root).status_file(spec.name).write_text(json.dumps(status))

    try:
        with pytest.raises(Enough):
            turn(root, spec, waits=look)
    finally:
        term.end()
    begun, running = seen
    assert (begun.writer.number, begun.writer.name) == (term.number, spec.name)
    assert (begun.state, begun.done, begun.total, begun.rate) == ("resolving", 0, 0, 0)
    assert (running.state, running.done, running.total, running.rate) == ("downloading", 5, 9, 3)
    after = turn(root, spec, waits=nobody)
    assert isinstance(after, Term)
    assert after.number == term.number + 1
    after.begin()
    after.end()


def test_the_error_of_the_process_is_that_of_all_who_waited_for_the_same_model(
    root: Path,
) -> None:
    for other, raised in (("hf://org/m", NotFound), ("hf://org/other", None)):
        term = turn(root, spec_of("hf://org/m"), waits=nobody)
        term.begin()
        error = NotFound("no such model", code="no_such_repo").as_document()
        ends = iter([lambda term=term, error=error: term.end(error)])

        def end(_: Waited, ends: Iterator[Callable[[], None]] = ends) -> None:
            with suppress(StopIteration):
                next(ends)()

        if raised:
            with pytest.raises(raised) as refused:
                turn(root, spec_of(other), waits=end)
            assert refused.value.code == "no_such_repo"
        else:
            assert isinstance(turn(root, spec_of(other), waits=end), Term)


def test_a_model_that_is_ready_needs_no_turn_unless_it_is_to_be_fetched_anew(
    engine: Callable[..., Engine], origin: Origin, root: Path
) -> None:
    ref = origin.add("/m", noise(64))
    engine().pull(ref, name="m")
    spec = spec_of(ref, name="m")
    ready = turn(root, spec, waits=nobody)
    assert isinstance(ready, Snapshot)
    assert ready.spec == spec


def test_a_root_that_is_none_is_refused(root: Path) -> None:
    with pytest.raises(Invalid):
        turn(root / "absent", spec_of("hf://org/m"), waits=nobody)
    assert Nodes(root).seen == (0, b"")
