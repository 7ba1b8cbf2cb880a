"""An origin whose answer kills the daemon that pulls from it, at each start again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import until

MIB = 1 << 20
PATIENCE_SECONDS = 120
Nodes = Callable[..., Node]


def die_while_it_pulls(running: Node, times: int) -> None:
    """Kill a daemon so often, each time with the model m at work; it is down in the end."""
    for number in range(times):
        if number:
            running.start()
        until(partial(has_begun, running, number + 1))
        running.kill()


def has_begun(running: Node, lives: int) -> bool:
    began = running.root / ".cachd/pending/m.began"
    return began.exists() and began.read_text() == str(lives)


def test_a_pull_with_which_the_daemon_died_three_times_in_a_row_is_not_begun_by_itself_again(
    node: Nodes, origin: Origin
) -> None:
    """Promised: A pull with which the daemon died three times in a row is not started again by itself."""
    running = node(retries=0)
    ref = origin.add_model("m", {"f": noise(8 * MIB)})
    hold = origin.hold("/m/f", after=0)
    running.pull(ref)
    die_while_it_pulls(running, 3)
    origin.forget()
    for _ in range(2):  # and so it stays
        running.start()
        told = running.ask("GET", "/v1/models/m").document
        assert (told["state"], told["final"]) == ("failed", True)
        assert told["pull"]["error"]["code"] == "crash_loop"
        assert "ask for it again" in told["pull"]["error"]["hint"]
        assert running.ready("m", wait=0).document["code"] == "crash_loop"
        assert origin.requests == []
        running.kill()
    running.start()
    hold.release()
    assert running.pull(ref).status == 202
    assert running.ready("m").status == 200
    running.kill()
    running.start()
    assert running.ready("m", wait=0).status == 200
    assert not list((running.root / ".cachd/pending").iterdir())


def test_one_in_a_crash_loop_can_be_deleted(node: Nodes, origin: Origin) -> None:
    running = node(retries=0)
    origin.hold("/m/f", after=0)
    running.pull(origin.add_model("m", {"f": noise(MIB)}))
    die_while_it_pulls(running, 3)
    running.start()
    assert running.ask("DELETE", "/v1/models/m").status == 200
    assert running.ask("GET", "/v1/models/m").status == 404
    assert not list((running.root / ".cachd/pending").iterdir())


@pytest.mark.parametrize("required", [False, True])
def test_a_listed_model_with_which_the_daemon_died_is_not_begun_by_itself_either(
    node: Nodes, origin: Origin, required: bool
) -> None:
    ref = origin.add_model("m", {"f": noise(MIB)})
    hold = origin.hold("/m/f", after=0)
    running = node(retries=0, models=[{"ref": ref, "name": "m", "required": required}])
    die_while_it_pulls(running, 3)
    origin.forget()
    running.start()
    running.wait_for("desired model not pulled", name="m")
    assert running.ask("GET", "/v1/models/m").document["pull"]["error"]["code"] == "crash_loop"
    assert running.ask("GET", "/readyz?set=required").status == (503 if required else 200)
    assert origin.requests == []
    hold.release()
    assert running.pull(ref, name="m").status == 202
    assert running.ready("m").status == 200


def test_a_clean_stop_counts_no_death(node: Nodes, origin: Origin) -> None:
    running = node(retries=0)
    hold = origin.hold("/m/f", after=0)
    running.pull(origin.add_model("m", {"f": noise(MIB)}))
    die_while_it_pulls(running, 2)
    running.start()
    until(lambda: has_begun(running, 3))
    until(lambda: running.ask("GET", "/v1/models/m").document["state"] == "downloading")
    running.stop()
    assert not (running.root / ".cachd/pending/m.began").exists()
    running.start()
    die_while_it_pulls(running, 2)
    running.start()
    hold.release()
    assert running.ready("m").status == 200


def test_a_pull_that_only_waited_when_the_daemon_died_is_begun_again(node: Nodes, origin: Origin) -> None:
    running = node(retries=0, pulls=1)
    hold = origin.hold("/m/f", after=0)
    running.pull(origin.add_model("m", {"f": noise(MIB)}), priority=1)
    until(lambda: has_begun(running, 1))
    running.pull(origin.add_model("n", {"f": noise(MIB)}))
    die_while_it_pulls(running, 3)
    hold.release()
    running.start()
    assert running.ready("n").status == 200
    assert running.ask("GET", "/v1/models/m").document["state"] == "failed"
