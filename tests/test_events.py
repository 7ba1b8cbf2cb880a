"""GET /v1/events: what happened, who asked for it, and how a stream of it begins, goes on and ends."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import http.client
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from cachd.api.events import EventStream, Times
from cachd.api.lanes import Lanes
from cachd.daemon.logs import configure_logs
from cachd.metrics import EVICTION_REASONS
from cachd.report.events import HEARD, MAX_EVENTS, Event, EventKind, EventLog
from tests.ground.models import noise
from tests.ground.node import Answer, Node
from tests.ground.origin import Origin, Status
from tests.ground.site import MIB, Ground, assert_problem, said, until

PATIENCE_SECONDS = 120.0
PACKAGE = Path(__file__).parent.parent / "cachd"
Nodes = Callable[..., Node]
Block = dict[str, str]


class Stream:
    """A stream of events as a client reads it."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.response = response

    def block(self) -> Block:
        """The next block; empty when the stream has ended."""
        found: Block = {}
        while line := self.response.readline().decode():
            if line == "\n":
                if found:
                    return found
                continue
            key, _, value = line.rstrip("\n").partition(": ")
            found[key] = value
        return found

    def next(self, kind: str) -> Any:
        """The data of the next block of a kind."""
        while block := self.block():
            if block.get("event") == kind:
                return json.loads(block["data"])
        raise AssertionError(f"the stream ended without {kind}")

    def rest(self) -> list[Block]:
        """The blocks to the end of the stream."""
        return list(iter(self.block, {}))


@contextmanager
def listening(node: Node, query: str = "", **headers: str) -> Iterator[Stream]:
    host, _, port = node.url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", f"/v1/events{query}", headers=headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        yield Stream(response)
    finally:
        connection.close()


def page(node: Node, query: str = "follow=false") -> Any:
    answer = node.ask("GET", f"/v1/events?{query}", headers={"Accept": "application/json"})
    assert answer.status == 200, answer
    return answer.document


def kinds(node: Node, model: str) -> list[str]:
    return [each["kind"] for each in page(node, f"model={model}")["events"]]


def the(node: Node, kind: str, model: str) -> Any:
    """The last event of a kind about a model."""
    return [each for each in page(node, f"model={model}")["events"] if each["kind"] == kind][-1]


# --- what is told ---


def test_a_pull_is_asked_begins_and_ends_and_each_event_says_who_asked(ground: Ground) -> None:
    ref = ground.have("told.bin")
    ground.node.wait_for("pull ended", name="told.bin")
    events = page(ground.node, "model=told.bin")["events"]
    assert [each["kind"] for each in events] == ["pull_asked", "pull_began", "pull_ready"]
    assert {(each["who"], each["ref"], each["model"]) for each in events} == {("anonymous", ref, "told.bin")}
    assert (events[-1]["size_bytes"], events[-1]["fetched_bytes"]) == (MIB, MIB)
    assert [each["id"] for each in events] == sorted({each["id"] for each in events})


def test_a_failed_pull_has_the_code_and_the_detail_that_the_api_shows(ground: Ground) -> None:
    ground.origin.fault("/gone.bin", Status(404))
    ground.node.pull(f"{ground.origin.url}/gone.bin")
    assert ground.node.ready("gone.bin").status == 404
    failed, error = the(ground.node, "pull_failed", "gone.bin"), ground.show("gone.bin")["pull"]["error"]
    assert (failed["code"], failed["detail"]) == (error["code"], error["detail"])


def test_a_cancelled_pull_and_a_deleted_model_are_told(ground: Ground) -> None:
    with ground.held("halfway.bin"):
        assert ground.node.ask("DELETE", "/v1/models/halfway.bin").status == 200
    assert kinds(ground.node, "halfway.bin") == ["pull_asked", "pull_began", "pull_cancelled", "deleted"]
    assert the(ground.node, "deleted", "halfway.bin")["who"] == "anonymous"


def test_what_operators_do_is_told_once_and_with_who_did_it(
    origin: Origin, node: Nodes, tmp_path: Path
) -> None:
    tokens = [{"name": f"of-{role}", "role": role, "token": f"t-{role}"} for role in ("pull", "admin")]
    (tmp_path / "tokens").write_text(json.dumps({"tokens": tokens}))
    running = node(token_file=str(tmp_path / "tokens"), keep_previous=1)

    def ask(role: str, method: str, path: str, body: object = None) -> Answer:
        answer = running.ask(method, path, body, headers={"Authorization": f"Bearer t-{role}"})
        assert answer.status < 300, answer
        return answer

    for number, role in ((1, "pull"), (2, "admin")):
        ref = origin.add(f"/{number}/it", noise(1000, number))
        ask(role, "POST", "/v1/models", {"ref": ref, "name": "it", "replace": number == 2})
        running.wait_for("pull ended", name="it", ref=ref)
    for _ in range(2):
        ask("admin", "PUT", "/v1/models/it/pin")
    for _ in range(2):
        ask("admin", "DELETE", "/v1/models/it/pin")
    ask("admin", "POST", "/v1/models/it/rollback")
    ask("admin", "DELETE", "/v1/models/it")
    told = [(each["kind"], each.get("who")) for each in page(running, "model=it")["events"]]
    assert told == [
        *((kind, "of-pull") for kind in ("pull_asked", "pull_began", "pull_ready")),
        *((kind, "of-admin") for kind in ("pull_asked", "pull_began", "pull_ready")),
        *((kind, "of-admin") for kind in ("pinned", "unpinned", "rolled_back", "deleted")),
    ]
    assert "of-admin" in running.wait_for("pinned")["who"]


def test_an_eviction_is_told_with_its_reason_and_damage_with_its_repair(origin: Origin, node: Nodes) -> None:
    running = node(limit_bytes=64 * MIB)  # what is free on the disk changes, as others use it
    for number, name in enumerate(("hurt", "gone")):
        running.pull(origin.add(f"/{name}", noise(MIB, number)))
        assert running.ready(name).status == 200
    blob = (running.root / "models/hurt/hurt").resolve()
    blob.chmod(0o644)
    with blob.open("r+b") as opened:
        opened.write(b"damaged")
    running.ask("POST", "/v1/models/hurt/verify")
    running.wait_for("repaired", name="hurt")
    told = kinds(running, "hurt")
    assert {"damaged", "quarantined", "repaired"} <= set(told), told
    assert the(running, "damaged", "hurt")["file"] == "hurt"
    assert [e["who"] for e in page(running)["events"] if e["kind"] == "pull_asked"][-1] == "cachd:repair"
    need = running.ask("GET", "/v1/capacity").document["available_bytes"] + 1
    assert running.ask("POST", "/v1/evictions", {"bytes": need}).status == 200
    evicted = [each for each in page(running)["events"] if each["kind"] == "evicted"]
    assert {each["reason"] for each in evicted} == {"asked"} <= set(EVICTION_REASONS)
    assert all(each["freed_bytes"] > 0 and each["who"] == "anonymous" for each in evicted)


def test_the_configuration_is_told_without_what_only_an_admin_may_read(origin: Origin, node: Nodes) -> None:
    ref = origin.add("/it", noise(1000))
    running = node(models=[{"ref": ref, "name": "it", "pin": True}])
    assert running.ready("it").status == 200
    assert the(running, "pull_asked", "it")["who"] == "cachd:configuration"
    assert the(running, "pinned", "it")["who"] == "cachd:configuration"
    running.configure(**{**running.options, "streams": "canary"})
    running.wait_for("configuration file not taken over")
    (refused,) = [each for each in page(running)["events"] if each["kind"] == "config_refused"]
    assert (refused["model"], refused["code"]) == (None, "bad_option")
    assert refused["options"] == ["streams"]
    assert "canary" not in json.dumps(refused)
    assert str(running.config) not in json.dumps(refused)
    running.configure(**{**running.options, "streams": 7})
    running.wait_for("options of the file wait for a restart")
    (waiting,) = [each for each in page(running)["events"] if each["kind"] == "config_waiting"]
    assert waiting["options"] == ["streams"]
    running.configure(**{**running.options, "canary": 7})
    running.wait_for("configuration file not taken over", options=[])
    assert "canary" not in json.dumps(page(running))


def logged() -> dict[str, set[str]]:
    """The keys of each log event that cachd logs."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in (each for each in calls if ast.unparse(each.func).startswith("log.") and each.args):
            event = ast.unparse(call.args[0]).strip("'")
            found.setdefault(event, set()).update(each.arg or "" for each in call.keywords)
    return found


@pytest.mark.parametrize("event", HEARD)
def test_each_log_event_that_is_heard_is_one_that_cachd_logs_with_these_keys(event: str) -> None:
    heard, keys = HEARD[event], logged()[event] | {"who"}  # `who` may come from the context
    assert set(heard.fields.values()) <= keys
    assert heard.kind.startswith("config") or heard.names in keys
    assert set(heard.fields) <= {each.name for each in dataclasses.fields(Event)}


def test_every_kind_of_event_is_one_of_a_log_event() -> None:
    states = ("ready", "failed", "cancelled", "interrupted")
    told = {heard.kind.format(state=state) for heard in HEARD.values() for state in states}
    assert told == {kind.value for kind in EventKind}


def test_text_of_strangers_is_escaped_and_bounded(log: EventLog) -> None:
    happen("pull ended", name="m", state="failed", code="x", detail="\x1b[2J" + "y" * 10_000)
    (event,) = log.after(None).events
    assert event.detail is not None
    assert event.detail.startswith("\\x1b[2Jyyy")
    assert len(event.detail) <= 1010


def test_events_are_kept_whatever_the_level_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    before, log = structlog.get_config(), EventLog()
    handlers = logging.root.handlers[:]
    try:
        configure_logs("error", "json", log)
        structlog.get_logger().info("pinned", name="m")
        structlog.get_logger().error("blob damaged", models=["m"], path="f", wrong="w")
    finally:
        structlog.configure(**before)
        logging.root.handlers[:] = handlers
    assert [each.kind for each in log.after(None).events] == ["pinned", "damaged"]
    lines = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["blob damaged"]


# --- pages ---


@pytest.fixture
def log() -> Iterator[EventLog]:
    """An event log that hears of `happen`."""
    before, made = structlog.get_config(), EventLog(most=10)
    structlog.configure(processors=[made, _dropped])
    yield made
    structlog.configure(**before)


def _dropped(*_: object) -> Any:
    raise structlog.DropEvent


def happen(event: str, **facts: object) -> None:
    structlog.get_logger().error(event, **facts)


def test_a_page_goes_on_after_an_id_and_says_when_events_may_be_missing(log: EventLog) -> None:
    empty = log.after(None)
    assert (empty.events, empty.gap) == ([], False)
    for number in range(12):
        happen("pinned", name=f"m{number % 2}")
    every = log.after(None)
    ids = [each.id for each in every.events]
    assert (ids, every.last) == (list(range(ids[0], ids[0] + 10)), ids[-1])
    assert [each.id for each in log.after(ids[3]).events] == ids[4:]
    assert (log.after(ids[0] - 1).events, log.after(ids[0] - 1).gap) == (every.events, False)
    assert (log.after(ids[0] - 2).events, log.after(ids[0] - 2).gap) == (every.events, True)
    assert (log.after(ids[-1]).events, log.after(ids[-1]).gap) == ([], False)
    assert log.after(ids[-1] + 1).gap, "an id of another life"
    assert [each.model for each in log.after(ids[3], "m1").events] == ["m1"] * 3


def test_ids_go_on_over_a_restart_and_the_gap_is_told(origin: Origin, node: Nodes) -> None:
    running = node()
    running.pull(origin.add("/it", noise(1000)))
    running.wait_for("pull ended", name="it")
    last = page(running)["last"]
    running.stop()
    running.start()
    after = page(running, f"after={last}")
    assert after["last"] > last
    assert after["gap"]
    with listening(running, f"?after={last}") as stream:
        assert stream.next("gap") == {"after": last}


@pytest.mark.parametrize(
    ("query", "accept", "is_stream"),
    [
        ("", "application/json", False),
        ("", "*/*", True),
        ("", "text/event-stream", True),
        ("", "text/event-stream, application/json", True),
        ("?follow=false", "text/event-stream", False),
        ("?follow=true", "application/json", True),
    ],
)
def test_who_asks_for_json_gets_a_page_and_everybody_else_a_stream(
    ground: Ground, query: str, accept: str, is_stream: bool
) -> None:
    if is_stream:
        with listening(ground.node, query, Accept=accept) as stream:
            assert stream.block() == {"retry": "1000"}
    else:
        answer = ground.node.ask("GET", f"/v1/events{query}", headers={"Accept": accept})
        assert (answer.status, said(answer, "Content-Type")) == (200, "application/json")


def test_the_head_of_a_stream_comes_at_once_and_its_connection_goes_on(ground: Ground) -> None:
    host, _, port = ground.node.url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_SECONDS)
    for method in ("HEAD", "HEAD"):
        connection.request(method, "/v1/events")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
    connection.close()


@pytest.mark.parametrize("wrong", ["after=-1", "after=x", "model=../x", "follow=maybe", "after=9" + "9" * 30])
def test_wrong_parameters_are_refused(ground: Ground, wrong: str) -> None:
    assert ground.node.ask("GET", f"/v1/events?{wrong}").status in (400, 422)


# --- streams ---


def test_a_stream_brings_what_is_kept_and_then_what_happens(ground: Ground) -> None:
    ground.have("streamed.bin")
    path = "/v1/models/streamed.bin/pin"
    with listening(ground.node, "?model=streamed.bin") as stream:
        assert stream.next("pull_ready")["model"] == "streamed.bin"
        ground.node.ask("PUT", path)
        pinned = stream.next("pinned")
    ground.node.ask("DELETE", path)
    with listening(
        ground.node, "?model=streamed.bin&after=0", **{"Last-Event-ID": str(pinned["id"])}
    ) as again:
        assert again.block() == {"retry": "1000"}
        block = again.block()
        assert block["event"] == "unpinned"
        assert int(block["id"]) == json.loads(block["data"])["id"] > pinned["id"]


def test_a_stop_ends_every_stream_in_time_and_says_so(origin: Origin, node: Nodes) -> None:
    hold = origin.hold("/it", after=MIB)
    running = node()
    running.pull(origin.add("/it", noise(6 * MIB)))
    assert hold.reached.wait(PATIENCE_SECONDS)
    with listening(running) as stream:
        stream.next("pull_began")
        assert running.stop() == 0
        blocks = stream.rest()
    hold.release()
    assert json.loads(blocks[-1]["data"]) == {"reason": "stopping"}
    assert [block["event"] for block in blocks if "event" in block] == ["pull_interrupted", "end"]


def test_only_so_many_clients_may_listen_at_once(tmp_path: Path) -> None:
    limited = ("prlimit", "--nofile=512")  # a quarter may be connections, of which four may listen
    with Node(tmp_path / "node", before=limited) as running:
        with listening(running) as one, listening(running), listening(running), listening(running):
            one.block()
            refused = running.ask("GET", "/v1/events")
            assert_problem(refused, 503, "busy")
            assert int(said(refused, "Retry-After")) > 0
            assert running.ask("GET", "/v1/events?follow=false").status == 200
        until(lambda: running.ask("GET", "/livez").status == 200)

        def may_listen_again() -> bool:
            try:
                with listening(running) as again:
                    return again.block() != {}
            except AssertionError:
                return False

        until(may_listen_again)


def streaming(log: EventLog, after: int | None = None, **times: float) -> AsyncIterator[bytes]:
    lanes = Lanes(connections=16)
    lanes.close()
    return EventStream(log, lanes, model=None, after=after, times=Times(**times)).blocks()


def test_a_client_that_falls_behind_by_more_than_is_kept_is_dropped_with_a_clear_end(log: EventLog) -> None:
    async def slow() -> list[bytes]:
        stream = streaming(log)
        begun = [await anext(stream)]
        happen("pinned", name="first")
        begun.append(await anext(stream))
        for number in range(12):
            happen("pinned", name=f"m{number}")
        return [*begun, *[block async for block in stream]]

    blocks = asyncio.run(slow())
    assert b'"model":"first"' in blocks[1]
    assert blocks[2:] == [b'event: end\ndata: {"reason":"slow"}\n\n']


def test_a_silent_stream_repeats_the_last_id_and_ends_at_its_deadline(log: EventLog) -> None:
    happen("pinned", name="m")
    last = log.after(None).last

    async def silent() -> list[bytes]:
        return [block async for block in streaming(log, last, heartbeat_seconds=0.01, most_seconds=0.2)]

    blocks = asyncio.run(silent())
    assert blocks[0] == b"retry: 1000\n\n"
    assert set(blocks[1:-1]) == {b"id: %d\n\n" % last}
    assert blocks[-1] == b'event: end\ndata: {"reason":"deadline"}\n\n'


def test_the_daemon_keeps_a_thousand_events() -> None:
    assert MAX_EVENTS == 1000
    log = EventLog()
    for _ in range(1001):
        log(None, "info", {"event": "pinned", "name": "m"})
    assert len(log.after(None).events) == 1000
