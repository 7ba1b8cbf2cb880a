"""A start with a wrong configuration file serves what is here, with the last good configuration."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.program import CACHD, Program, run
from tests.ground.site import assert_problem

PATIENCE_SECONDS = 120.0
Nodes = Callable[..., Node]
WRONG = {
    "an option": "streams: many\n",
    "no YAML": "streams: [\n",
    "a key that nobody knows": "tokens_file: /etc/token\n",
    "writes that are open to everybody": "listen: 0.0.0.0:0\n",
    "no file": None,
}


def spoil(running: Node, text: str | None) -> None:
    """Make its configuration file wrong; None removes it."""
    if text is None:
        running.config.unlink()
    else:
        running.config.write_text(text)


def file_of(running: Node, **headers: str) -> Any:
    return running.ask("GET", "/v1/options", headers=headers).document["file"]


def options_of(running: Node) -> dict[str, Any]:
    return {each["key"]: each for each in running.ask("GET", "/v1/options").document["options"]}


def kinds(running: Node) -> list[str]:
    events = running.ask("GET", "/v1/events?follow=false").document["events"]
    return [each["kind"] for each in events]


def start(running: Node, **env: str) -> tuple[int, str]:
    """How a start ends that is refused: its status, and what it says."""
    command = [*CACHD, "serve", "--root", str(running.root), "--config", str(running.config)]
    ended = run(command, env={**os.environ, "CACHD_LOG_FORMAT": "json", **env}, timeout=PATIENCE_SECONDS)
    return ended.returncode, ended.stderr


def kept(running: Node) -> Path:
    return running.root / ".cachd/last_good.json"


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_a_restart_with_a_wrong_file_serves_what_is_here_and_says_so_loudly(
    origin: Origin, node: Nodes, text: str | None
) -> None:
    ref = origin.add("/it", noise(1000))
    models = [{"ref": ref, "name": "it", "required": True}]
    running = node(models=models, streams=5)
    assert running.ready("it").status == 200
    assert running.metric("cachd_config_last_reload_successful") == 1
    assert running.stop() == 0
    spoil(running, text)
    running.start()
    said = running.wait_for("last good configuration in force", level="error")
    assert said["code"] in ("bad_option", "bad_config", "open_writes")
    assert running.ask("GET", "/v1/models/it/ready").status == 200
    assert running.ask("GET", "/readyz?set=required").status == 200
    assert options_of(running)["streams"]["value"] == 5
    file = file_of(running)
    assert (file["in_force"], file["last_good"], file["error"]["code"]) == (False, True, said["code"])
    assert running.metric("cachd_config_last_reload_successful") == 0
    assert running.metric("cachd_config_in_force") == 0
    loaded_at = running.metric("cachd_config_last_reload_timestamp_seconds")
    assert abs(loaded_at - kept(running).stat().st_mtime) < 0.01
    assert "config_last_good" in kinds(running)
    running.configure(**{**running.options, "models": models, "limit_bytes": "1GB", "streams": 6})
    running.wait_for("configuration file taken over")
    assert options_of(running)["limit_bytes"]["value"] == 10**9
    file = file_of(running)
    assert (file["last_good"], file["error"], file["waiting_for_restart"]) == (False, None, ["streams"])
    assert running.metric("cachd_config_last_reload_successful") == 1
    assert running.metric("cachd_config_waiting_options") == 1
    assert "config_in_force" in kinds(running)


def test_the_last_good_configuration_is_the_one_that_was_in_force(node: Nodes) -> None:
    running = node(streams=5, limit_bytes="1GB")
    running.configure(**{**running.options, "streams": 6, "limit_bytes": "2GB"})
    running.wait_for("configuration file taken over", options=["limit_bytes"])
    running.kill()
    spoil(running, "streams: many")
    for _ in range(2):
        running.start()
        now = options_of(running)
        assert (now["streams"]["value"], now["limit_bytes"]["value"]) == (5, 2 * 10**9)
        assert now["streams"]["where"] == str(kept(running))
        running.kill()


def test_a_first_start_with_a_wrong_file_is_refused(node: Nodes) -> None:
    running = node()
    running.stop()
    kept(running).unlink()
    spoil(running, "streams: many")
    status, said = start(running)
    assert (status, "streams" in said) == (2, True)


def test_what_is_kept_is_the_operators_alone_and_has_no_secret(node: Nodes, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("canary-token")
    running = node(env={"HF_TOKEN": "canary-token"}, token_file=str(token), hf_token_file=str(token))
    running.stop()
    assert stat.S_IMODE(kept(running).stat().st_mode) == 0o600
    assert "canary" not in kept(running).read_text()


# --- it never protects less ---


def test_tokens_are_those_of_the_last_good_configuration(node: Nodes, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("the-token")
    running = node(token_file=str(token), anonymous_reads=False)
    running.stop()
    spoil(running, "anonymous_reads: true\nstreams: many\n")
    running.start()
    assert_problem(running.ask("GET", "/v1/models"), 401, "unauthorized")
    assert_problem(running.ask("PUT", "/v1/models/it/pin"), 401, "unauthorized")
    assert file_of(running, Authorization="Bearer the-token")["last_good"]
    token.unlink()
    assert running.ask("GET", "/v1/models", headers={"Authorization": "Bearer the-token"}).status == 401


@pytest.mark.parametrize("text", ["streams: many", None], ids=["wrong", "no file"])
def test_what_protected_from_outside_must_still_be_there(
    node: Nodes, tmp_path: Path, text: str | None
) -> None:
    token = tmp_path / "token"
    token.write_text("the-token")
    running = node(env={"CACHD_TOKEN_FILE": str(token)})
    running.stop()
    spoil(running, text)
    running.start()
    running.stop()
    status, said = start(running)
    assert status == 2
    assert "last good configuration not used" in said
    assert "token_file" in said


@pytest.mark.parametrize("how", ["writable for others", "no document", "of another root", "a link"])
def test_what_somebody_else_may_have_written_is_not_used(node: Nodes, tmp_path: Path, how: str) -> None:
    running = node()
    running.stop()
    document, path = json.loads(kept(running).read_text()), kept(running)
    if how == "writable for others":
        path.chmod(0o666)
    elif how == "no document":
        path.write_text('{"keys": []')
    elif how == "of another root":
        path.write_text(json.dumps({**document, "keys": {**document["keys"], "own_directory": "true"}}))
    else:
        path.rename(tmp_path / "elsewhere.json")
        path.symlink_to(tmp_path / "elsewhere.json")
    spoil(running, "streams: many")
    status, said = start(running)
    assert status == 2
    assert "last good configuration not used" in said


def test_it_is_found_in_a_directory_of_the_daemons_own_and_by_the_root_that_the_file_names(
    tmp_path: Path, node: Nodes
) -> None:
    running = node(own_directory=True)
    assert running.stop() == 0
    own = running.root / "cachd/.cachd/last_good.json"
    assert own.exists()
    running.root.chmod(0o777)  # as the kubelet leaves an emptyDir
    spoil(running, f"root: {running.root}\nstreams: many\n")
    running.start()
    assert running.wait_for("listening")["root"] == str(running.root / "cachd")
    assert file_of(running)["last_good"]


def first_line(config: Path, event: str) -> str:
    """The line of the log in which an event is, of a daemon that is started with a file alone, and killed."""
    command, env = [*CACHD, "serve", "--config", config], {**os.environ, "CACHD_LOG_FORMAT": "json"}
    with Program(command, env=env, stderr=subprocess.PIPE) as started:
        try:
            assert started.stderr is not None
            return next((line for line in started.stderr if event in line), "")
        finally:
            started.kill()


def test_a_file_that_is_not_yaml_still_names_the_root_of_the_last_good_configuration(tmp_path: Path) -> None:
    root, config = tmp_path / "root", tmp_path / "config.yaml"
    root.mkdir(mode=0o755)
    config.write_text(f"root: {root}\nlisten: 127.0.0.1:0\n")
    assert first_line(config, "desired models read")
    with config.open("a") as file:
        file.write("models: [\n")
    assert first_line(config, "last good configuration in force")
    config.write_text("models: [\n")
    ended = run([*CACHD, "serve", "--config", str(config)], timeout=PATIENCE_SECONDS)
    assert ended.returncode == 2
    assert "name the root of the cache: --root" in ended.stderr
