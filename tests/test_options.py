"""The options of a running daemon: which are in force, and what becomes of a file that is edited wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cachd.config import Config
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import Ground, assert_problem, until

Nodes = Callable[..., Node]


def options_of(node: Node) -> dict[str, Any]:
    return {each["key"]: each for each in node.ask("GET", "/v1/options").document["options"]}


def file_of(node: Node) -> dict[str, Any]:
    told: dict[str, Any] = node.ask("GET", "/v1/options").document["file"]
    return told


def edited(node: Node, text: str) -> None:
    """Replace the configuration file in one step."""
    beside = node.config.with_suffix(".new")
    beside.write_text(text)
    beside.replace(node.config)


def test_a_daemon_tells_its_options_and_who_gave_them(node: Nodes) -> None:
    running = node(streams=5, env={"CACHD_PULLS": "7"})
    options = options_of(running)
    assert list(options) == list(Config.model_fields)
    told = {key: (options[key]["value"], options[key]["where"]) for key in ("root", "pulls", "retries")}
    assert told == {
        "root": (str(running.root), "--root"),
        "pulls": (7, "CACHD_PULLS"),
        "retries": (8, ""),
    }
    assert options["streams"]["where"].startswith(f"{running.config}:")
    file = file_of(running)
    loaded_at = datetime.fromisoformat(file.pop("loaded_at")).timestamp()
    assert abs(loaded_at - running.metric("cachd_config_last_reload_timestamp_seconds")) < 0.01
    assert file == {
        "path": str(running.config),
        "in_force": True,
        "last_good": False,
        "waiting_for_restart": [],
        "error": None,
    }


def test_limits_that_the_api_set_are_told_as_such(node: Nodes) -> None:
    running = node(limit_bytes_per_second="100MB")
    running.ask("PUT", "/v1/limits", {"sources": {"hf": "1MB"}})
    options = options_of(running)
    assert options["limit_bytes_per_second"]["value"] == 0
    assert options["source_limits"] == {
        "key": "source_limits",
        "value": {"hf": 10**6},
        "source": "api",
        "where": "PUT /v1/limits",
    }


def test_while_the_file_is_wrong_the_options_before_it_stay_in_force_and_everybody_is_told(
    node: Nodes, origin: Origin
) -> None:
    ref = origin.add("/it", b"{}")
    running = node(models=[{"ref": ref, "name": "it"}], limit_bytes="1GB")
    assert running.ready("it").status == 200
    assert running.metric("cachd_config_in_force") == 1
    before = options_of(running)
    edited(running, f"models: []\nlimit_bytes: 2GB\n\nstreams: many\nallow: {json.dumps(['127.0.0.0/8'])}\n")
    reason = running.wait_for("configuration file not taken over", level="error")["reason"]
    assert reason == f"{running.config}:4: streams: 'many' is not a whole number from 1 to 256"
    assert options_of(running) == before
    assert file_of(running)["error"]["detail"] == reason
    assert running.metric("cachd_config_in_force") == 0
    assert running.ask("GET", "/readyz").status == 200
    sick = running.cli("doctor")
    assert sick.returncode == 1
    assert f"FAIL the configuration file on disk is not in force: {reason}" in sick.stdout
    edited(running, "limit_bytes: 2GB\n")
    until(lambda: options_of(running)["limit_bytes"]["value"] == 2 * 10**9)
    assert file_of(running)["error"] is None


@pytest.mark.parametrize("text", ["a: [", "- a\n", "streams: 1\nstreams: 1\n", None], ids=str)
def test_a_file_that_is_none_any_more_changes_nothing(node: Nodes, text: str | None) -> None:
    running = node(streams=5)
    before = options_of(running)
    if text is None:
        running.config.unlink()
    else:
        edited(running, text)
    running.wait_for("configuration file not taken over", level="error")
    assert options_of(running) == before
    assert file_of(running)["error"]["code"] in ("bad_config", "bad_option")


def test_an_option_that_waits_for_a_restart_is_told_until_it_is_taken_back(node: Nodes) -> None:
    running = node(streams=5)
    running.configure(**{**running.options, "streams": 6, "retries": 2})
    running.wait_for("options of the file wait for a restart", options=["streams", "retries"])
    assert (file_of(running)["in_force"], options_of(running)["streams"]["value"]) == (False, 5)
    assert (
        "FAIL these options take effect when the daemon restarts: streams, retries"
        in running.cli("doctor").stdout
    )
    running.configure(**{**running.options, "streams": 5, "retries": 8})
    until(lambda: file_of(running)["in_force"])
    assert running.metric("cachd_config_in_force") == 1


def test_models_of_the_environment_stay_when_the_file_changes(node: Nodes, origin: Origin) -> None:
    ref = origin.add("/it", b"{}")
    running = node(env={"CACHD_MODELS": json.dumps([{"ref": ref, "name": "it", "required": True}])})
    assert running.ready("it").status == 200
    running.configure(**running.options, limit_bytes="1GB", models=[])
    until(lambda: options_of(running)["limit_bytes"]["value"] == 10**9)
    assert options_of(running)["models"]["where"] == "CACHD_MODELS"


# --- on the command line ---


def test_the_command_line_tells_the_options_here_or_of_a_daemon(ground: Ground, tmp_path: Path) -> None:
    there = ground.node.cli("options", "--effective", "-o", "json")
    assert json.loads(there.stdout) == ground.node.ask("GET", "/v1/options").document
    file = tmp_path / "it.yaml"
    file.write_text("streams: 5\nmodels: [{ref: hf://a/b}, {ref: hf://c/d}]\nsource_limits: {hf: 1GB}\n")
    here = ground.node.cli(
        *("options", "--effective", "--config", str(file)), CACHD_SERVER="", HF_TOKEN="canary"
    )
    assert (here.returncode, here.stderr) == (0, "")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in here.stdout.splitlines()}
    assert rows["KEY"] == "VALUE FROM"
    assert rows["streams"] == f"5 {file}:1"
    assert rows["models"] == f"hf://a/b, hf://c/d {file}:2"
    assert rows["source_limits"] == f"hf=1000000000 {file}:3"
    assert rows["evict"] == "true default"
    assert rows["hf_token_file"] == "set HF_TOKEN"
    assert "canary" not in here.stdout


def test_the_command_line_tells_every_fault_and_unknown_variables(ground: Ground, tmp_path: Path) -> None:
    file = tmp_path / "it.yaml"
    file.write_text("strems: 5\npulls: no\n")
    ended = ground.node.cli(
        *("options", "--effective", "--config", str(file)), CACHD_SERVER="", CACHD_STREMS="5"
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[:3] == [
        "CACHD_STREMS is no option; did you mean CACHD_STREAMS?",
        f"error: {file}:1: strems: no such key; did you mean streams?",
        f"{file}:2: pulls: 'no' is not a whole number from 1 to 256",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    {
        ("pull", "hf://a/b", "--wiat"): "--wait",
        ("opions",): "options",
        ("wait", "x", "--timeout", "5M"): "minutes",
        ("wait", "x", "--timeout", "soon"): "a time, such as",
    }.items(),
)
def test_a_word_that_is_nearly_right_is_told_with_the_right_one(
    ground: Ground, words: tuple[str, ...], told: str
) -> None:
    ended = ground.node.cli(*words)
    assert ended.returncode == 2
    assert told in " ".join(ended.stderr.split())


def test_a_wait_takes_a_time_in_any_usual_spelling(ground: Ground) -> None:
    ended = ground.node.cli("wait", ground.have("it").rpartition("/")[2], "--timeout", "1m30s")
    assert ended.returncode == 0


# --- fields of the API ---


def test_fields_of_the_api_take_units_in_any_usual_spelling(ground: Ground) -> None:
    ground.have("units.bin")
    lease = ground.node.ask("POST", "/v1/models/units.bin/leases", {"seconds": "1h30m"})
    assert lease.status == 201
    assert ground.node.ask("GET", "/v1/models/units.bin/ready?wait=1m").status == 200
    room = ground.node.ask("POST", "/v1/evictions?dry_run=true", {"bytes": "1 mb"})
    assert room.document["need_bytes"] == 10**6
    limits = ground.node.ask("PUT", "/v1/limits", {"bytes_per_second": "8 Gbit/s", "sources": {"hf": "1e9"}})
    assert limits.document == {"bytes_per_second": 10**9, "sources": {"hf": 10**9}}
    ground.node.ask("PUT", "/v1/limits", {})


@pytest.mark.parametrize(
    ("call", "body", "told"),
    [
        ("POST /v1/models", {"ref": "hf://a/b", "exlude": []}, "exlude: no such key; did you mean exclude?"),
        (
            "POST /v1/models",
            {"ref": "hf://a/b", "priority": "high"},
            "priority: 'high' is not a whole",
        ),
        ("POST /v1/models", {"ref": "hf://a/b", "priority": 101}, "priority: 101 is more than 100"),
        ("POST /v1/models", {"ref": "hf://a/b", "pin": "maybe"}, "pin: 'maybe' is neither true nor false"),
        ("POST /v1/models", {"ref": 5, "include": "*"}, "ref: is not a string; include: is not a list"),
        ("POST /v1/models", {}, "ref: is missing"),
        ("POST /v1/models", [], "body: is not a mapping of keys to values"),
        ("POST /v1/models", b"{", "is not JSON"),
        ("PUT /v1/limits", {"bytes_per_second": "5Mb"}, "bytes_per_second: '5Mb' may mean bits or bytes"),
        ("PUT /v1/limits", {"sources": {"hub": 1}}, "sources.hub: 'hub' is none of 'hf', 'ms', 's3'"),
        ("POST /v1/evictions", {"bytes": "lots"}, "bytes: 'lots' is not a size, such as"),
        ("POST /v1/evictions", {}, "body: write either bytes or ref"),
        ("GET /v1/models/x/ready?wait=soon", None, "wait: 'soon' is not a time, such as"),
        ("GET /v1/models/x/ready?wait=2h", None, "wait: '2h' is more than 3600"),
        ("GET /readyz?set=all", None, "set: "),
    ],
)
def test_a_wrong_field_is_told_in_plain_words(ground: Ground, call: str, body: object, told: str) -> None:
    method, _, path = call.partition(" ")
    answer = ground.node.ask(method, path, body)
    assert_problem(answer, 422, "invalid_request")
    assert told in answer.document["detail"]
    assert not any(word in answer.document["detail"] for word in ("Input", "Value error", "valid "))


def test_of_a_body_of_wrong_fields_alone_only_the_first_are_told(ground: Ground) -> None:
    body = {"ref": "hf://a/b", **dict.fromkeys((f"exclud{n}" for n in range(50_000)), 1)}
    answer = ground.node.ask("POST", "/v1/models", body)
    assert_problem(answer, 422, "invalid_request")
    assert answer.document["detail"].count("no such key") == 20
