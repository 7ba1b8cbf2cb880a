"""Bandwidth limits: how long pulls take with them, and how they are set."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachd.config import load
from cachd.errors import Cancelled, Invalid
from cachd.model import Limits
from cachd.policy.rate_limiter import BURST_SECONDS, SLOT_SECONDS
from cachd.transfer.streams import StreamQuota, Streams
from tests.conftest import Engine, spec_of
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import IgnoreRange, Origin, Seen, Stall
from tests.ground.site import assert_problem

MIB = 1 << 20
PATIENCE_SECONDS = 120
Engines = Callable[..., Engine]
Nodes = Callable[..., Node]


# --- pulls ---


def least_seconds(size: int, rate: int) -> float:
    """What `size` bytes take at the least: a burst and the first turn are free."""
    return size / rate - BURST_SECONDS - SLOT_SECONDS


@pytest.mark.parametrize(
    "options",
    [
        {"limit_bytes_per_second": "16MB"},
        {"source_limits": {"http": "16MB"}},
        {"limit_bytes_per_second": "500MB", "source_limits": {"http": "16MB", "hf": "1KB"}},
        {"limit_bytes_per_second": "16MB", "source_limits": {"http": "500MB"}},
    ],
)
def test_a_pull_takes_the_time_that_its_limit_says(
    origin: Origin, root: Path, engine: Engines, options: dict[str, object]
) -> None:
    ref = origin.add("/model.bin", noise(24 * MIB))
    running = engine(streams=3, **options)
    began = time.monotonic()
    running.pull(ref)
    assert time.monotonic() - began >= least_seconds(24 * MIB, 16 * 10**6)
    assert (root / "models/model.bin/model.bin").read_bytes() == noise(24 * MIB)


def test_bytes_that_are_read_only_to_be_dropped_are_limited_too(
    origin: Origin, root: Path, engine: Engines
) -> None:
    """An origin without ranges sends what is here already."""
    ref = origin.add("/model.bin", noise(12 * MIB))
    running = engine(streams=1)
    second_part = threading.Event()

    def is_beyond_the_first_part(seen: Seen) -> bool:
        if seen.extent and seen.extent[0]:
            second_part.set()  # one stream: it has made the first part durable
        return second_part.is_set()

    origin.fault("/model.bin", Stall(at=0), when=is_beyond_the_first_part)
    first = running.begin(spec_of(ref))
    assert second_part.wait(PATIENCE_SECONDS)
    running.pulls.cancel("model.bin", force=True)
    with pytest.raises(Cancelled):
        first.done.result(PATIENCE_SECONDS)
    origin.clear()
    origin.fault("/model.bin", IgnoreRange())
    running.bandwidth.change(Limits(12 * 10**6))
    began = time.monotonic()
    running.pull(ref)
    assert time.monotonic() - began >= least_seconds(12 * MIB, 12 * 10**6)
    assert (root / "models/model.bin/model.bin").read_bytes() == noise(12 * MIB)


def test_two_pulls_together_keep_to_one_limit(origin: Origin, engine: Engines) -> None:
    refs = [origin.add(f"/{name}.bin", noise(8 * MIB, seed)) for seed, name in enumerate("ab")]
    running = engine(streams=3, limit_bytes_per_second="16MB")
    began = time.monotonic()
    for pull in [running.begin(spec_of(ref)) for ref in refs]:
        pull.done.result(PATIENCE_SECONDS)
    assert time.monotonic() - began >= least_seconds(16 * MIB, 16 * 10**6)


def test_a_limit_that_is_lifted_in_mid_pull_lets_it_end(origin: Origin, root: Path, engine: Engines) -> None:
    """At this limit it would take an hour."""
    ref = origin.add("/model.bin", noise(12 * MIB))
    hold = origin.hold("/model.bin", after=0)
    running = engine(streams=3, limit_bytes_per_second="3KB")
    pull = running.begin(spec_of(ref))
    assert hold.reached.wait(PATIENCE_SECONDS)
    hold.release()
    running.bandwidth.change(Limits())
    pull.done.result(PATIENCE_SECONDS)
    assert (root / "models/model.bin/model.bin").read_bytes() == noise(12 * MIB)


def test_a_pull_that_waits_for_a_limit_is_cancelled_at_once(origin: Origin, engine: Engines) -> None:
    """At one byte a second the last of its streams would have its turn after more than our patience."""
    ref = origin.add("/model.bin", bytes(160 * MIB))
    hold = origin.hold("/model.bin", after=0)
    running = engine(streams=40, limit_bytes_per_second=1)
    pull = running.begin(spec_of(ref))
    assert hold.reached.wait(PATIENCE_SECONDS)
    hold.release()
    running.pulls.cancel("model.bin", force=True)
    with pytest.raises(Cancelled):
        pull.done.result(PATIENCE_SECONDS)


def test_a_limit_is_no_fault_of_the_origin(origin: Origin, root: Path, engine: Engines) -> None:
    """500 bytes a second from an origin would be too slow."""
    ref = origin.add("/model.bin", noise(800))
    running = engine(streams=1, retries=0, stall_seconds=0.3, limit_bytes_per_second=500)
    running.pull(ref)
    assert (root / "models/model.bin/model.bin").read_bytes() == noise(800)


def test_a_later_pull_gets_its_streams_out_of_a_part_and_the_part_goes_on(
    origin: Origin, root: Path, engine: Engines
) -> None:
    long, short = origin.add("/long.bin", noise(64 * MIB)), origin.add("/short.bin", noise(100_000))
    running = engine(streams=2, limit_bytes_per_second="1MB")
    hold = origin.hold("/long.bin", after=0)
    first = running.begin(spec_of(long))
    assert hold.reached.wait(PATIENCE_SECONDS)
    hold.release()
    running.begin(spec_of(short)).done.result(PATIENCE_SECONDS)
    assert 0 < first.progress.fetched < 8 * MIB, "less than a part of it"
    running.bandwidth.change(Limits())
    first.done.result(PATIENCE_SECONDS)
    assert (root / "models/long.bin/long.bin").read_bytes() == noise(64 * MIB)
    assert first.progress.fetched == 64 * MIB, "no byte was kept twice"
    assert b"cachd_origin_retries_total{" not in running.metrics.text(), "it was no failure"


def test_a_pull_that_goes_first_gets_the_stream_of_a_small_file_which_goes_on(
    origin: Origin, root: Path, engine: Engines
) -> None:
    content = noise(200_000)
    small, first = origin.add("/small.json", content), origin.add("/first.json", noise(1000))
    running = engine(streams=1, limit_bytes_per_second="100KB")
    hold = origin.hold("/small.json", after=0)
    waiting = running.begin(spec_of(f"{small}#sha256={hashlib.sha256(content).hexdigest()}"))
    assert hold.reached.wait(PATIENCE_SECONDS)
    hold.release()
    running.begin(spec_of(first), priority=1).done.result(PATIENCE_SECONDS)
    assert 0 < waiting.progress.fetched < len(content)
    running.bandwidth.change(Limits())
    waiting.done.result(PATIENCE_SECONDS)
    assert (root / "models/small.json/small.json").read_bytes() == content
    assert waiting.progress.fetched == len(content), "no byte was fetched twice"
    asked = [seen.extent for seen in origin.requests if (seen.method, seen.path) == ("GET", "/small.json")]
    assert len(asked) == 2
    assert asked[0] is None
    assert asked[1]
    assert asked[1][1] == len(content)
    assert b"cachd_origin_retries_total{" not in running.metrics.text(), "it was no failure"


def test_a_stream_is_owed_to_who_has_two_less_or_goes_first() -> None:
    busy, gate, many, one = threading.Semaphore(0), threading.Event(), StreamQuota(), StreamQuota()

    def hold(_buffer: memoryview) -> None:
        busy.release()
        gate.wait(PATIENCE_SECONDS)

    streams = Streams(3, first=3)
    try:
        streams.append(many, *[hold] * 4)
        for _ in range(3):
            assert busy.acquire(timeout=PATIENCE_SECONDS)
        assert not streams.should_yield(many), "nobody else waits"
        streams.append(one, hold)
        assert streams.should_yield(many)
        assert not streams.should_yield(one), "it waits itself, and has none"
        assert not streams.should_yield(StreamQuota(1)), "a higher priority keeps its streams"
        one.running = 2
        assert not streams.should_yield(many), "one less is as near as it comes"
        one.priority, one.running = 1, 3
        assert streams.should_yield(many)
        one.running = 0
    finally:
        gate.set()
        streams.close()


# --- options ---


@pytest.fixture
def no_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("CACHD_"):
            monkeypatch.delenv(name)


WRONG_LIMITS: tuple[Any, ...] = ({"gopher": 5}, {"hf": -1}, {"hf": "x"}, "hf", 5, "{")
WRONG_RATES: tuple[Any, ...] = (-1, "-1", "fast", "5MB/h", [], 1.5)


@pytest.mark.usefixtures("no_options_in_the_environment")
class TestOptions:
    def test_there_is_no_limit_by_default(self) -> None:
        assert load().limits == Limits()

    def test_limits_are_read_from_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "cachd.yaml"
        file.write_text("limit_bytes_per_second: 1.5GB/s\nsource_limits: {hf: 200MB, s3: 1000, file: 0}\n")
        assert load(config=file).limits == Limits(1_500_000_000, {"hf": 200_000_000, "s3": 1000})

    @pytest.mark.parametrize("value", ["hf=200MB, s3=1GiB/s", '{"hf": "200MB", "s3": 1073741824}'])
    def test_limits_are_read_from_the_environment(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("CACHD_LIMIT_BYTES_PER_SECOND", "5 MB")
        monkeypatch.setenv("CACHD_SOURCE_LIMITS", value)
        assert load().limits == Limits(5_000_000, {"hf": 200_000_000, "s3": 1 << 30})

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            *(("limit_bytes_per_second", wrong) for wrong in WRONG_RATES),
            *(("source_limits", wrong) for wrong in WRONG_LIMITS),
        ],
    )
    def test_a_wrong_limit_is_refused_under_its_name(self, option: str, value: Any, tmp_path: Path) -> None:
        file = tmp_path / "cachd.yaml"
        file.write_text(yaml.safe_dump({option: value}))
        for flags in ({option: value}, {"config": file}):
            with pytest.raises(Invalid) as refusal:
                load(**flags)
            assert refusal.value.code == "bad_option"
            assert option in refusal.value.detail


# --- at run time ---

NONE: dict[str, Any] = {"bytes_per_second": None, "sources": {}}
SET = {"bytes_per_second": 10**8, "sources": {"hf": 5 * 10**7}}


def limits_of(node: Node) -> object:
    return node.ask("GET", "/v1/limits").document


def test_limits_are_shown_replaced_and_measured(node: Nodes) -> None:
    running = node()
    assert limits_of(running) == NONE
    put = running.ask(
        "PUT", "/v1/limits", {"bytes_per_second": "100MB", "sources": {"hf": 5 * 10**7, "s3": None}}
    )
    assert (put.status, put.document, limits_of(running)) == (200, SET, SET)
    assert running.metric("cachd_limit_bytes_per_second", source="all") == 10**8
    assert running.metric("cachd_limit_bytes_per_second", source="hf") == 5 * 10**7
    assert running.ask("PUT", "/v1/limits", {"sources": {"s3": "1GB/s"}}).document == {
        "bytes_per_second": None,
        "sources": {"s3": 10**9},
    }
    assert running.metric("cachd_limit_bytes_per_second") == 10**9
    assert running.ask("PUT", "/v1/limits", {"bytes_per_second": 0}).document == NONE


WRONG = [
    {"bytes_per_second": "fast"},
    {"bytes_per_second": -1},
    {"bytes_per_second": 1.5},
    {"bytes_per_second": 1 << 63},
    {"sources": {"gopher": 5}},
    {"sources": {"all": 5}},
    {"sources": {"hf": "slow"}},
    {"sources": [5]},
    {"limit": 5},
    [],
]


def test_wrong_limits_are_refused_and_change_nothing(node: Nodes) -> None:
    running = node(limit_bytes_per_second=10**8, source_limits={"hf": "50MB"})
    for asked in WRONG:
        assert_problem(running.ask("PUT", "/v1/limits", asked), 422, "invalid_request")
        assert limits_of(running) == SET, asked


def test_a_limit_set_at_run_time_holds_for_a_running_pull(origin: Origin, node: Nodes) -> None:
    """At the first limit it would take an hour."""
    ref = origin.add("/model.bin", noise(12 * MIB))
    hold = origin.hold("/model.bin", after=0)
    running = node(limit_bytes_per_second="3KB")
    running.pull(ref)
    assert hold.reached.wait(PATIENCE_SECONDS)
    hold.release()
    assert running.ask("PUT", "/v1/limits", {"bytes_per_second": "1GB"}).status == 200
    assert running.ready("model.bin").status == 200
    assert running.metric("cachd_limited_seconds_total", source="http") > 0


def test_limits_of_the_file_are_taken_over_when_they_change_and_only_then(
    origin: Origin, node: Nodes
) -> None:
    running = node(limit_bytes_per_second="100MB")
    by_hand = {"bytes_per_second": 7, "sources": {}}
    assert running.ask("PUT", "/v1/limits", by_hand).document == by_hand
    models = [{"ref": origin.add("/model.bin", b""), "name": "model.bin"}]
    running.configure(**{**running.options, "models": models})
    running.wait_for("published", name="model.bin")
    assert limits_of(running) == by_hand, "the limits of the file are what they were"
    running.configure(**{**running.options, "source_limits": {"hf": "50MB"}})
    running.wait_for("bandwidth limits", all=10**8, hf=5 * 10**7)
    assert limits_of(running) == SET
    running.configure(**{**running.options, "source_limits": {"gopher": 5}})
    assert "gopher" in running.wait_for("configuration file not taken over", level="error")["reason"]
    assert limits_of(running) == SET


def test_the_environment_wins_over_the_limits_of_a_changed_file(node: Nodes) -> None:
    running = node(env={"CACHD_LIMIT_BYTES_PER_SECOND": "100MB"})
    running.configure(**running.options, limit_bytes_per_second="1KB", source_limits={"hf": "50MB"})
    running.wait_for("bandwidth limits", hf=5 * 10**7)
    assert limits_of(running) == SET


def test_a_direct_pull_keeps_to_the_limit_of_its_options(origin: Origin, root: Path, node: Nodes) -> None:
    ref = origin.add("/model.bin", noise(6 * MIB))
    began = time.monotonic()
    ended = node().cli(
        *("pull", ref, "--direct", "--root", str(root), "--allow", "127.0.0.0/8"),
        CACHD_LIMIT_BYTES_PER_SECOND="1.5MB",
        CACHD_RESERVE_FREE="0",
    )
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - began >= least_seconds(6 * MIB, 1_500_000)


def test_the_command_line_shows_sets_and_lifts_limits(node: Nodes, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("canary")
    running = node(token_file=str(tmp_path / "token"))

    def said(*words: str, **env: str) -> list[list[str]]:
        ended = running.cli("limit", *words, **env)
        assert (ended.returncode, ended.stderr) == (0, "")
        return [line.strip().split(maxsplit=1) for line in ended.stdout.splitlines()]

    token = {"CACHD_TOKEN": "canary"}
    assert said() == [["SOURCE", "LIMIT"], ["all", "none"]]
    assert said("100MB", **token)[1:] == [["all", "100.0 MB/s"]]
    assert said("50MB/s", "--source", "hf", **token)[1:] == [["all", "100.0 MB/s"], ["hf", "50.0 MB/s"]]
    assert json.loads(running.cli("limit", "-o", "json").stdout) == limits_of(running) == SET
    assert said("none", **token)[1:] == [["all", "none"], ["hf", "50.0 MB/s"]]
    assert said("none", "--source", "hf", **token)[1:] == [["all", "none"]]
    refusals = {("5MB",): (5, {}), ("fast",): (2, token), ("5MB", "--source", "gopher"): (2, token)}
    for words, (status, env) in refusals.items():
        ended = running.cli("limit", *words, **env)
        assert (ended.returncode, ended.stdout) == (status, ""), words
    assert limits_of(running) == NONE
