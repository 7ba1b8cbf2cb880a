"""Who pinned a model is recorded: what only the configuration pinned is unpinned when it leaves the list."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import DiskFailed, InUse
from cachd.store.disk_store import DiskStore
from cachd.store.pins import PinnedBy
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import assert_problem, until
from tests.ground.synced import synced

Nodes = Callable[..., Node]
API, CONFIGURATION = PinnedBy.api, PinnedBy.configuration


def listing(*refs: str, **more: object) -> list[dict[str, object]]:
    return [{"ref": ref, "name": ref.rpartition("/")[2], "pin": True, **more} for ref in refs]


def listed(running: Node, models: list[dict[str, object]]) -> None:
    """Write another list of models."""
    running.configure(**{**running.options, "models": models})


def pinned_by(running: Node, name: str) -> list[str]:
    shown = running.ask("GET", f"/v1/models/{name}").document
    assert shown["pinned"] is bool(shown["pinned_by"])
    found: list[str] = shown["pinned_by"]
    return found


def pins_on_disk(root: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in (root / ".cachd").glob("*pins/*")}


# --- the store ---


def test_a_name_is_pinned_while_anybody_pins_it_also_in_the_next_life(
    next_life: Callable[[], DiskStore],
) -> None:
    store = next_life()
    store.pins.add("m", CONFIGURATION)
    store.pins.add("m")
    assert (store.pins.by("m"), store.pins.configured()) == ([API, CONFIGURATION], ["m"])
    store = next_life()
    store.pins.release("m", CONFIGURATION)
    assert (store.pins.has("m"), store.pins.by("m"), store.pins.configured()) == (True, [API], [])
    store.pins.unpin("m")
    assert not store.pins.has("m")
    store.pins.unpin("m")


def test_a_pin_of_the_configuration_is_not_removed_by_a_request_and_both_go_with_the_model(
    store: DiskStore,
) -> None:
    store.pins.add("m", CONFIGURATION)
    store.pins.add("m")
    with pytest.raises(InUse) as refusal:
        store.pins.unpin("m")
    assert refusal.value.code == "pinned_by_configuration"
    assert "pin: false" in refusal.value.hint
    assert store.pins.by("m") == [API, CONFIGURATION], "a refusal changes nothing"
    store.pins.remove("m")
    assert not store.pins.has("m")


def test_a_pin_is_durable_and_told_when_it_begins_and_ends(store: DiskStore, root: Path) -> None:
    private = root / ".cachd"
    for by, directory in ((API, private / "pins"), (CONFIGURATION, private / "config_pins")):
        told: list[list[tuple[object, object]]] = []
        synced_paths: list[list[str]] = []
        for change in (store.pins.add, store.pins.add, store.pins.release, store.pins.release):
            with capture_logs() as logs, synced() as paths:
                change("m", by)
            told.append([(each["event"], each["by"]) for each in logs])
            synced_paths.append(paths)
        assert told == [[("pinned", by.value)], [], [("unpinned", by.value)], []]
        written = [str(directory / ".m.new"), str(directory)]
        assert synced_paths == [written, written, [str(directory)], []]
    (private / "config_pins/.hidden").touch()
    assert store.pins.configured() == []


def test_a_disk_that_refuses_a_pin_is_named(store: DiskStore, root: Path) -> None:
    (root / ".cachd/pins/m").mkdir()
    for change in (store.pins.add, lambda name: store.pins.release(name, API)):
        with pytest.raises(DiskFailed):
            change("m")
    (root / ".cachd/config_pins").rmdir()
    with pytest.raises(DiskFailed):
        store.pins.configured()


def test_a_pin_of_an_earlier_version_counts_as_the_apis(
    next_life: Callable[[], DiskStore], root: Path
) -> None:
    next_life()
    (root / ".cachd/config_pins").rmdir()  # which that version did not have
    (root / ".cachd/pins/m").touch()
    assert next_life().pins.by("m") == [API]


# --- the configuration ---


def test_what_only_the_configuration_pinned_is_unpinned_when_it_leaves_the_list(
    origin: Origin, node: Nodes
) -> None:
    refs = [origin.add(f"/{name}", noise(1000)) for name in ("gone", "both", "stays")]
    running = node(models=listing(*refs))
    for name in ("gone", "both", "stays"):
        assert running.ready(name).status == 200
    until(lambda: pinned_by(running, "gone") == ["configuration"])
    assert running.ask("PUT", "/v1/models/both/pin").status == 204
    assert pinned_by(running, "both") == ["api", "configuration"]
    listed(running, listing(refs[2]))
    until(lambda: pinned_by(running, "gone") == [])
    assert running.wait_for("unpinned", name="gone", by="configuration")["who"] == "cachd:configuration"
    until(lambda: pinned_by(running, "both") == ["api"])
    assert pinned_by(running, "stays") == ["configuration"]
    assert running.ask("DELETE", "/v1/models/gone").status == 200, "nothing keeps it any more"
    assert_problem(running.ask("DELETE", "/v1/models/both"), 409, "pinned")


def test_a_listed_model_that_is_no_longer_to_be_pinned_is_unpinned(origin: Origin, node: Nodes) -> None:
    ref = origin.add("/m", noise(1000))
    running = node(models=listing(ref))
    assert running.ready("m").status == 200
    until(lambda: pinned_by(running, "m") == ["configuration"])
    listed(running, listing(ref, pin=False))
    until(lambda: pinned_by(running, "m") == [])


def test_a_model_that_never_arrived_is_unpinned_when_it_leaves_the_list(origin: Origin, node: Nodes) -> None:
    running = node(models=listing(f"{origin.url}/nowhere"), retries=0)
    running.wait_for("pull ended", name="nowhere")
    assert pins_on_disk(running.root) == {"config_pins/nowhere"}
    listed(running, [])
    running.wait_for("unpinned", name="nowhere")
    assert pins_on_disk(running.root) == set()


def test_a_list_that_changed_while_no_daemon_ran_unpins_at_the_next_start(
    origin: Origin, node: Nodes
) -> None:
    refs = [origin.add(f"/{name}", noise(1000)) for name in ("gone", "stays")]
    running = node(models=[*listing(*refs), *listing(f"{origin.url}/nowhere")], retries=0)
    for name in ("gone", "stays"):
        assert running.ready(name).status == 200
    until(lambda: len(pins_on_disk(running.root)) == 3)
    running.kill()
    listed(running, listing(refs[1]))
    running.start()
    until(lambda: pins_on_disk(running.root) == {"config_pins/stays"})
    assert pinned_by(running, "gone") == []


def test_pins_follow_the_last_good_configuration_while_it_is_in_force(origin: Origin, node: Nodes) -> None:
    refs = [origin.add(f"/{name}", noise(1000)) for name in ("gone", "stays")]
    running = node(models=listing(*refs))
    for name in ("gone", "stays"):
        assert running.ready(name).status == 200
    until(lambda: len(pins_on_disk(running.root)) == 2)
    running.kill()
    running.config.write_text("streams: many\n")
    running.start()
    running.wait_for("last good configuration in force")
    running.wait_for("desired models read", count=2)
    assert pins_on_disk(running.root) == {"config_pins/gone", "config_pins/stays"}
    running.config.write_text("models: [\n")
    running.wait_for("configuration file not taken over")
    assert pins_on_disk(running.root) == {"config_pins/gone", "config_pins/stays"}
    listed(running, listing(refs[1]))
    until(lambda: pins_on_disk(running.root) == {"config_pins/stays"})


def test_who_pinned_is_shown_and_a_pin_of_the_configuration_is_not_undone_by_hand(
    origin: Origin, node: Nodes
) -> None:
    running = node(models=listing(origin.add("/m", noise(1000))))
    assert running.ready("m").status == 200
    until(lambda: pinned_by(running, "m") == ["configuration"])
    refused = running.ask("DELETE", "/v1/models/m/pin")
    assert_problem(refused, 409, "pinned_by_configuration")
    assert "pin: false" in refused.document["hint"]
    by_hand = running.cli("unpin", "m")
    assert (by_hand.returncode, "the configuration pins m" in by_hand.stderr) == (9, True)
    assert pinned_by(running, "m") == ["configuration"]
    assert running.cli("pin", "m").returncode == 0
    assert re.search("^pinned +by api, configuration$", running.cli("show", "m").stdout, re.MULTILINE)
    assert "by api, configuration" in running.cli("ls", "-o", "wide").stdout
