"""Some test names every error code. The tests here cover codes of branches that are rarely taken."""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachd.errors import Unavailable
from cachd.store.disk_store import DiskStore
from cachd.store.leases import MAX_LEASES
from tests.conftest import Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import Ground
from tests.test_hold import cachd, published

PROJECT = Path(__file__).parent.parent
TESTS = (
    "\n".join(path.read_text() for path in (PROJECT / "tests").rglob("*.py") if path != Path(__file__))
    + Path(__file__).read_text().rpartition("# --- each of them ---")[2]
)
# The default codes of two classes, and the code for a wait that no test takes.
NO_TEST = {"unavailable", "disk_slow", "file_leased"}


def codes() -> dict[str, str]:
    """Every error code in the source of cachd, each with a module that has it."""
    found: dict[str, str] = {}
    for module in sorted((PROJECT / "cachd").rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_text())):
            match node:
                case (
                    ast.keyword(arg="code", value=value)
                    | ast.Assign(targets=[ast.Name(id="code" | "TOO_SLOW")], value=value)
                ):
                    for text in ast.walk(value):
                        if isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value:
                            found[text.value] = str(module.relative_to(PROJECT))
    return found


def test_every_code_of_an_error_is_named_by_a_test() -> None:
    named = set(re.findall(r"\w+", TESTS))
    unnamed = {code: module for code, module in codes().items() if code not in named}
    assert set(unnamed) == NO_TEST, unnamed
    assert len(codes()) > 100


# --- each of them ---


@pytest.fixture
def leased(root: Path) -> Iterator[DiskStore]:
    """A store with as many lease files as may be, of which one lease is over."""
    with DiskStore(root) as opened:
        leases = opened.layout.leases
    for number, until in enumerate([time.time() + 3600] * (MAX_LEASES - 1) + [1.0]):
        told = {"id": str(number), "name": "m", "holder": "pod/a", "expires_at": until}
        (leases / f"{number}.json").write_text(json.dumps(told))
    with DiskStore(root) as opened:
        yield opened


def test_one_lease_too_many_is_refused_until_another_is_over(leased: DiskStore) -> None:
    leases, now = leased.leases, time.time()
    with pytest.raises(Unavailable) as refusal:
        leases.take("m", "pod/b", until=now + 60)
    assert (refusal.value.code, refusal.value.retry_after) == ("too_many_leases", 60.0)
    assert len(leases.expire(now)) == 1
    leases.take("m", "pod/b", until=now + 60)
    with pytest.raises(Unavailable):
        leases.take("m", "pod/b", until=now + 60)


def test_a_daemon_that_stops_takes_no_pull_any_more(engine: Callable[..., Engine], origin: Origin) -> None:
    running = engine()
    spec = spec_of(origin.add("/it", noise(1000)))
    running.pulls.interrupt()
    with pytest.raises(Unavailable) as refusal:
        running.pulls.start(spec)
    assert refusal.value.code == "stopping"
    assert refusal.value.retry_after
    assert running.pulls.running() == []
    assert origin.requests == []


def test_a_holder_whose_link_cannot_be_made_says_that_the_pod_is_wrong(
    ground: Ground, tmp_path: Path
) -> None:
    published(ground, "linked")
    (tmp_path / "file").touch()
    ended = cachd("hold", "linked", "--cache", ground.node.root, "--link", tmp_path / "file")
    assert (ended.returncode, "code: pod_misconfigured" in ended.stderr) == (2, True), ended.stderr
    assert "check the pod's mounts" in ended.stderr
