"""The wall clock jumps, is wrong or stands elsewhere: nothing that matters hangs on it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cachd.store.disk_store import DiskStore
from tests.ground.clock import Clock
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.s3 import S3Server
from tests.ground.site import MIB, assert_problem
from tests.ground.stored import (
    CONTENT,
    FILE,
    ONE,
    PARTS,
    TWO,
    A,
    B,
    assert_whole,
    manifest_of,
    publish,
    refs_of,
    write,
)

Nodes = Callable[..., Node]
PATIENCE_SECONDS = 120


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Clock]:
    with closing(Clock(tmp_path)) as made:
        yield made


def published_at(node: Node, name: str) -> datetime:
    return datetime.fromisoformat(json.loads((node.root / f"ready/{name}.json").read_text())["published_at"])


JUMPS = ("+1d", "-1d", "@1970-01-01 00:00:10")


def test_a_pull_goes_on_over_jumps_of_the_clock_and_nothing_that_was_ready_goes(
    clock: Clock, origin: Origin, node: Nodes
) -> None:
    """Its connection waits: had it been given up for a day of silence, its bytes would come twice."""
    running = node(env=clock.env, allow=[f"{origin.url}/"])
    running.pull(origin.add("/kept.bin", noise(MIB)))
    assert running.ready("kept.bin").status == 200
    ref = origin.add("/pulled.bin", noise(6 * MIB, 2))
    hold = origin.hold("/pulled.bin", after=3 * MIB)
    running.pull(ref)
    assert hold.reached.wait(PATIENCE_SECONDS)
    names = [f"{number}.bin" for number in range(len(JUMPS))]
    for seed, (name, jump) in enumerate(zip(names, JUMPS, strict=True)):
        clock.set(jump)
        running.pull(origin.add(f"/{name}", noise(MIB, 3 + seed)))
        assert running.ready(name).status == 200
        assert abs(published_at(running, name) - datetime.now(UTC)) > timedelta(hours=23), "it jumped"
    hold.release()
    assert running.ready("pulled.bin").status == 200
    assert origin.bytes_sent("/pulled.bin") == 6 * MIB
    assert running.metric("cachd_origin_retries_total") == 0
    running.kill()
    running.start()
    for name in ("kept.bin", "pulled.bin", *names):
        assert running.ready(name, wait=0).status == 200
    assert (running.root / "models/pulled.bin/pulled.bin").read_bytes() == noise(6 * MIB, 2)


def test_a_branch_names_what_was_published_last_though_the_clock_went_back(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    publish(store, ONE, name="old", revision=A, now=2_000_000_000.0)
    publish(store, TWO, name="new", revision=B, now=10.0)
    assert refs_of(root) == {"main": B}
    next_life()
    assert refs_of(root) == {"main": B}


def test_a_clock_that_is_wrong_to_s3_is_told_as_such(clock: Clock, s3: S3Server, node: Nodes) -> None:
    s3.put("models", "skewed/model.bin", noise(MIB))
    clock.set("-1h")
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    running = node(env=clock.env | keys, s3_endpoint_url=s3.url, s3_region=s3.region)
    running.pull("s3://models/skewed/")
    told = running.ready("skewed")
    assert_problem(told, 403, "clock_skewed")
    assert "RequestTimeTooSkewed" in told.document["detail"]
    assert "UTC" in told.document["detail"], "what the node takes for the time"
    assert "clock" in told.document["hint"]


def test_times_of_files_from_another_node_mean_nothing(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    """All of a root as if written in 1970, then in 2100: nothing is fetched again, nothing goes."""
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, PARTS[0])
    publish(store, ONE)
    for year in (1970, 2100):
        moment = datetime(year, 1, 2, tzinfo=UTC).timestamp()
        for path in [root, *root.rglob("*")]:
            os.utime(path, (moment, moment), follow_symlinks=False)
        store = next_life()
        store.sweep_snapshots()
        assert_whole(root, "org--model", ONE, commit=A)
        assert store.content.missing(manifest_of(ONE)) == []
        with closing(store.content.begin(FILE)) as ingest:
            assert ingest.resumed == PARTS[0].size


def test_a_certificate_that_is_not_yet_valid_is_asked_for_again_until_the_clock_is_set(
    clock: Clock, node: Nodes
) -> None:
    """A node that boots in 1970 has its models as soon as its clock is right: nobody asks again."""
    clock.set("@1970-01-01 00:00:10")
    with Origin(tls=True) as origin:
        wanted = {"ref": origin.add("/model.bin", noise(MIB)), "name": "model.bin", "required": True}
        running = node(env=clock.env, ca_file=str(origin.ca_file), models=[wanted])
        running.wait_for("resolve will be retried", code="clock_skewed")
        assert running.ask("GET", "/readyz?set=required").status == 503
        clock.set("+0")
        assert running.ready("model.bin").status == 200
        assert running.ask("GET", "/readyz?set=required").status == 200


def test_records_are_in_utc_wherever_the_node_stands(origin: Origin, node: Nodes) -> None:
    running = node(env={"TZ": "FAR-13:45"}, allow=[f"{origin.url}/"])
    running.pull(origin.add("/model.bin", noise(MIB)))
    assert running.ready("model.bin").status == 200
    told = published_at(running, "model.bin")
    assert told.utcoffset() == timedelta(0)
    assert abs(told - datetime.now(UTC)) < timedelta(hours=1)
    logged = [datetime.fromisoformat(entry["timestamp"]) for entry in running.log if "timestamp" in entry]
    assert {moment.utcoffset() for moment in logged} == {timedelta(0)}
    assert all(abs(moment - datetime.now(UTC)) < timedelta(hours=1) for moment in logged)
