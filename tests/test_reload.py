"""Every option that is reloaded reaches the object that it is for, and a wrong file changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.config import RELOADED_KEYS, read
from cachd.daemon.parts import Daemon, assembled
from cachd.daemon.reload import Reload
from cachd.errors import Forbidden, Invalid
from cachd.kubelet import ThresholdsFrom
from cachd.model import Limits, Percentage, Ref
from cachd.sources.cancel import CancelToken
from tests.conftest import PATIENCE_SECONDS, spec_of
from tests.ground.models import noise
from tests.ground.pause import at_event

PLAIN = "reserve_free: 0\nstreams: 2\n"


@dataclass
class Running:
    """What a daemon reloads its options with, over a root, without its API."""

    reload: Reload
    parts: Daemon
    file: Path
    shelf: Path  # a directory with one file

    def write(self, text: str) -> None:
        self.file.write_text(PLAIN + text)

    def may_reach(self, ref: str) -> bool:
        try:
            self.parts.sources.of(Ref.parse(ref)).resolve(Ref.parse(ref), CancelToken())
        except Forbidden:
            return False
        return True


@pytest.fixture
def running(root: Path, tmp_path: Path) -> Iterator[Running]:
    file, shelf = tmp_path / "cachd.yaml", tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "model.bin").write_bytes(noise(64))
    file.write_text(PLAIN)
    loaded = read(config=file, root=root)
    with assembled(loaded.config) as parts:
        yield Running(Reload(loaded, parts), parts, file, shelf)


def bounds(running: Running) -> tuple[object, ...]:
    now = running.parts.store.space.bounded()
    return now.limit, now.reserve_free, now.reserve_inodes


# For each option: the lines of the file, and whether the options are in force where they are used.
TAKEN: dict[str, tuple[str, Callable[[Running], bool]]] = {
    "models": ("models: [{{ref: 'hf://org/m'}}]", lambda running: running.parts.reclaim.keeps("org--m")),
    "allow": ("allow: ['file://{shelf}/']", lambda running: running.may_reach(f"file://{running.shelf}")),
    "refuse": ("refuse: ['hf://org/bad']", lambda running: not running.may_reach("hf://org/bad")),
    "sources": (
        "sources: [{{prefix: 'file://{shelf}/', allow: true, limit: 3MB}}]",
        lambda running: (
            running.may_reach(f"file://{running.shelf}")
            and list(running.parts.bandwidth.prefixes.values()) == [3_000_000]
        ),
    ),
    "limit_bytes": ("limit_bytes: 5GB", lambda running: bounds(running)[0] == 5 * 10**9),
    "reserve_free": ("reserve_free: 6MB", lambda running: bounds(running)[1] == 6 * 10**6),
    "reserve_inodes": ("reserve_inodes: 7", lambda running: bounds(running)[2] == 7),
    "kubelet_thresholds": (
        "kubelet_thresholds: {{nodefs.available: 20%}}",
        lambda running: ThresholdsFrom.option in running.parts.bounds.kubelet_ratio(),
    ),
    "limit_bytes_per_second": (
        "limit_bytes_per_second: 8MB",
        lambda running: running.parts.bandwidth.limits == Limits(8_000_000),
    ),
    "source_limits": (
        "source_limits: {{hf: 9MB}}",
        lambda running: running.parts.bandwidth.limits == Limits(None, {"hf": 9_000_000}),
    ),
}


def test_the_table_above_has_every_option_that_is_reloaded() -> None:
    assert TAKEN.keys() == RELOADED_KEYS


ELSEWHERE = ("refuse", "kubelet_thresholds")  # tested below, and in test_kubelet.py


@pytest.mark.parametrize("key", [key for key in TAKEN if key not in ELSEWHERE])
def test_a_reloaded_option_is_in_force_after_the_poll_and_a_wrong_one_is_not(
    running: Running, key: str
) -> None:
    text, is_taken = TAKEN[key]
    plain = PLAIN.replace("reserve_free: 0\n", "") if key == "reserve_free" else PLAIN
    assert running.reload.poll() is not None
    assert not is_taken(running)
    running.file.write_text(f"{plain}{text.format(shelf=running.shelf)}\nretries: many\n")
    assert running.reload.poll() is None
    assert not is_taken(running), "another line of the file is wrong"
    assert not running.reload.is_in_force
    running.file.write_text(f"{plain}{text.format(shelf=running.shelf)}\n")
    assert running.reload.poll() is not None
    assert is_taken(running)
    assert running.reload.is_in_force
    assert running.reload.poll() is None, "the file has not changed since"


def test_a_refused_model_is_withdrawn_at_the_poll(running: Running) -> None:
    text, _ = TAKEN["allow"]
    running.write(text.format(shelf=running.shelf))
    running.reload.poll()
    digest = hashlib.sha256(noise(64)).hexdigest()
    (running.shelf / "SHA256SUMS").write_text(f"{digest}  model.bin\n")
    started = running.parts.pulls.start(spec_of(f"file://{running.shelf}", name="m"))
    assert started is not None
    started.done.result(PATIENCE_SECONDS)
    running.write(f"{text.format(shelf=running.shelf)}\nrefuse: ['sha256:{digest}']\n")
    with at_event("model refused", lambda: None) as refused:
        running.reload.poll()
        assert refused.wait(PATIENCE_SECONDS)
    assert running.parts.store.names.get("m") is None


def test_the_models_are_known_at_the_first_poll_even_if_the_file_became_wrong_meanwhile(
    root: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cachd.yaml"
    file.write_text(f"{PLAIN}models: [{{ref: 'hf://org/m'}}]\n")
    loaded = read(config=file, root=root)
    with assembled(loaded.config) as parts:
        reload = Reload(loaded, parts)
        file.write_text("nonsense: [")
        desired = reload.poll()
        assert desired is not None
        assert [each.spec.name for each in desired] == ["org--m"]
        assert not reload.is_in_force
        assert reload.poll() is None
        file.write_text(PLAIN)
        assert reload.poll() == []
        assert reload.is_in_force
        assert not parts.reclaim.keeps("org--m")


def test_an_option_that_is_not_reloaded_waits_for_a_restart(running: Running) -> None:
    running.reload.poll()
    running.write("retries: 3\nlimit_bytes: 50%\n")
    assert running.reload.poll() is not None
    document = running.reload.as_document()["file"]
    assert isinstance(document, dict)
    assert (document["in_force"], document["waiting_for_restart"]) == (False, ["retries"])
    total = running.parts.store.space.bounded().total
    assert bounds(running)[0] == Percentage(50).of(total)
    running.write("limit_bytes: 50%\n")
    running.reload.poll()
    assert running.reload.is_in_force


def test_limits_of_the_api_stay_until_those_of_the_file_change(running: Running) -> None:
    running.reload.poll()
    running.parts.bandwidth.change(Limits(1_000_000))
    running.write("limit_bytes: 5GB\n")
    running.reload.poll()
    assert running.parts.bandwidth.limits == Limits(1_000_000)
    running.write("limit_bytes_per_second: 2MB\n")
    running.reload.poll()
    assert running.parts.bandwidth.limits == Limits(2_000_000)


def test_a_request_reads_an_unchanged_file_again(running: Running) -> None:
    running.reload.poll()
    assert running.reload.poll() is None
    running.reload.request()
    assert running.reload.poll() == []
    assert running.reload.poll() is None


def test_a_file_that_vanishes_changes_nothing_until_it_is_back(running: Running) -> None:
    running.write("limit_bytes: 5GB\n")
    running.reload.poll()
    running.file.rename(running.file.with_suffix(".away"))
    assert running.reload.poll() is None
    assert not running.reload.is_in_force
    assert bounds(running)[0] == 5 * 10**9
    running.file.with_suffix(".away").rename(running.file)
    assert running.reload.poll() == []
    assert running.reload.is_in_force


def test_a_refused_file_is_told_with_the_options_that_are_wrong_and_shows_no_other_key(
    running: Running,
) -> None:
    reload = running.reload
    reload.poll()
    with capture_logs() as logs:
        running.write("retries: many\ns3cret: x\n")
        assert reload.poll() is None
    (told,) = [each for each in logs if each["log_level"] == "error"]
    assert (told["code"], told["options"]) == ("bad_option", ["retries"])
    assert (reload.is_loaded, reload.is_in_force, reload.waiting) == (False, False, 0)
    document = reload.as_document()["file"]
    assert isinstance(document, dict)
    assert (document["path"], document["error"]["code"]) == (str(running.file), "bad_option")
    assert not document["last_good"]
    running.write("retries: 3\nstall_seconds: 7\n")
    with capture_logs() as logs:
        assert reload.poll() is not None
    (waiting,) = [each for each in logs if "wait for a restart" in each["event"]]
    assert sorted(waiting["options"]) == ["retries", "stall_seconds"]
    assert (reload.is_loaded, reload.is_in_force, reload.waiting) == (True, False, 2)
    document = reload.as_document()["file"]
    assert isinstance(document, dict)
    assert document["error"] is None


def test_the_configuration_is_kept_once_it_is_in_force(running: Running) -> None:
    kept = running.parts.store.layout.last_good
    assert not kept.exists()
    running.reload.poll()
    first = kept.read_bytes()
    running.write("limit_bytes: many\n")
    running.reload.poll()
    assert kept.read_bytes() == first
    running.write("limit_bytes: 5GB\n")
    running.reload.poll()
    assert b"5GB" in kept.read_bytes()
    assert b"5GB" not in first


def test_the_entries_of_sources_and_the_settings_of_a_ref_are_those_in_force(running: Running) -> None:
    prefix = f"file://{running.shelf}/"
    running.write(f"sources: [{{prefix: '{prefix}', allow: true}}]\n")
    running.reload.poll()
    entries = running.reload.sources(None)["sources"]
    assert isinstance(entries, list)
    assert len(entries) == 1
    assert prefix in str(entries[0])
    assert prefix in str(running.reload.sources(f"file://{running.shelf}/model.bin"))
    with pytest.raises(Invalid):
        running.reload.sources("nonsense://x")
