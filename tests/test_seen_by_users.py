"""Small things that were wrong in what people see: bars, states, paths, exit codes and hints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import CachdError, Forbidden
from cachd.model import Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.web import WebSource
from tests.fetching import EITHER, http
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Status
from tests.ground.program import CACHD, Program, run
from tests.ground.proxy import Proxy
from tests.ground.site import Ground

MIB = 1 << 20
PATIENCE_SECONDS = 120
Nodes = Callable[..., Node]
Alone = Callable[..., Ground]
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def on_terminal(*words: object, **env: str) -> tuple[int, str, str]:
    """Status, standard output, and all that was drawn on a terminal that is the standard error."""
    master, slave = pty.openpty()
    terminal = {"TERM": "xterm-256color", "COLUMNS": "160"}
    running = Program(
        [*CACHD, *words], env={**os.environ, **terminal, **env}, stdout=subprocess.PIPE, stderr=slave
    )
    os.close(slave)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: the process has ended
        while more := os.read(master, 1 << 16):
            drawn += more
    os.close(master)
    stdout, _ = running.communicate(timeout=PATIENCE_SECONDS)
    return running.returncode, stdout, _CONTROL.sub("", drawn.decode())


# --- bars ---

ALL_OF_3_MIB = r" +━+ +3\.1/3\.1 MB *$"


def last_bar(drawn: str) -> str:
    """The last line of the terminal that holds a bar. Each state of the bar is in it, the newest last."""
    return next(line for line in reversed(drawn.splitlines()) if "━" in line)


def test_a_bar_ends_full(ground: Ground) -> None:
    ref = ground.add("full.bin", 3 * MIB)
    status, _, drawn = on_terminal("pull", ref, "--name", "full.bin", "--wait", CACHD_SERVER=ground.node.url)
    assert status == 0
    assert re.search(r"full\.bin ready" + ALL_OF_3_MIB, last_bar(drawn)), drawn


def test_a_bar_of_a_model_without_a_pull_is_full(ground: Ground) -> None:
    ground.have("before.bin", 3 * MIB)
    ground.node.kill()
    ground.node.start()
    status, _, drawn = on_terminal("wait", "before.bin", CACHD_SERVER=ground.node.url)
    assert status == 0
    assert re.search(r"before\.bin ready" + ALL_OF_3_MIB, last_bar(drawn)), drawn


def test_a_bar_of_a_job_ends_full(ground: Ground) -> None:
    ground.have("job.bin", 3 * MIB)
    status, _, drawn = on_terminal("verify", "job.bin", CACHD_SERVER=ground.node.url)
    assert status == 0
    assert re.search(r"job\.bin intact" + ALL_OF_3_MIB, last_bar(drawn)), drawn


def test_a_bar_of_a_direct_pull_ends_full(origin: Origin, root: Path) -> None:
    ref = origin.add("/direct.bin", noise(3 * MIB))
    words = ("pull", "--direct", ref, "--root", root, "--allow", "127.0.0.0/8")
    status, _, drawn = on_terminal(*words, CACHD_RESERVE_FREE="0")
    assert status == 0
    assert re.search(r"direct\.bin ready" + ALL_OF_3_MIB, last_bar(drawn)), drawn


def test_a_bar_of_a_pull_that_fails_says_so(ground: Ground) -> None:
    words = ("pull", f"{ground.origin.url}/absent.bin", "--name", "absent.bin", "--wait")
    status, _, drawn = on_terminal(*words, CACHD_SERVER=ground.node.url)
    assert status == 3
    assert re.search(r"absent\.bin failed ", last_bar(drawn)), drawn
    assert re.search(r"^error: .*404 Not Found", drawn, re.MULTILINE)


def test_a_bar_of_a_direct_pull_that_fails_says_so(origin: Origin, root: Path) -> None:
    words = ("pull", "--direct", f"{origin.url}/absent.bin", "--name", "absent.bin", "--root", root)
    status, _, drawn = on_terminal(*words, "--allow", "127.0.0.0/8", CACHD_RESERVE_FREE="0")
    assert status == 3
    assert re.search(r"absent\.bin failed ", last_bar(drawn)), drawn
    assert re.search(r"^error: .*404 Not Found", drawn, re.MULTILINE)


# --- verified ---


def test_no_model_is_shown_as_verified_before_its_bytes_are(ground: Ground) -> None:
    ref = ground.add("slow.bin")
    digest = hashlib.sha256(noise(6 * MIB, seed=len("slow.bin"))).hexdigest()
    held = ground.origin.hold("/slow.bin", after=3 * MIB)
    ground.node.pull(f"{ref}#sha256={digest}", name="slow")
    assert held.reached.wait(PATIENCE_SECONDS)
    shown = ground.show("slow")
    assert (shown["verified"], shown["verified_by"], shown["pull"]["verified"]) == (None, None, None)
    row = next(line for line in ground.node.cli("ls").stdout.splitlines() if line.startswith("slow "))
    assert row.split()[1:4] == ["downloading", "6.3", "MB"], row
    assert not {"yes", "verified"} & set(row.split()), row
    held.release()
    assert ground.node.ready("slow").status == 200
    shown = ground.show("slow")
    assert (shown["verified"], shown["pull"]["verified"]) == (True, True)


def test_a_corrupt_model_is_not_shown_as_verified(ground: Ground) -> None:
    ref = ground.add("corrupt.bin", MIB)
    ground.node.cli("pull", f"{ref}#sha256={64 * '0'}", "--name", "corrupt.bin", "--wait")
    shown = ground.show("corrupt.bin")
    assert (shown["state"], shown["pull"]["error"]["code"]) == ("failed", "corrupt")
    assert (shown["verified"], shown["pull"]["verified"]) == (None, None)
    facts = ground.node.cli("show", "corrupt.bin").stdout
    assert re.search(r"^verified +-$", facts, re.MULTILINE), facts


# --- paths ---


def test_paths_are_absolute_even_if_the_daemon_was_given_relative_ones(
    origin: Origin, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir(mode=0o755)
    (tmp_path / "token").write_text("s3cret")
    (tmp_path / "conf.yaml").write_text(
        "allow: [127.0.0.0/8]\nreserve_free: 0\nhf_token_file: token\nlisten: 127.0.0.1:0\n"
    )
    ref = origin.add("/it.bin", noise(1000))
    words = ("pull", "--direct", ref, "--name", "it.bin", "--root", "here", "--config", "conf.yaml")
    ended = run([*CACHD, *words], cwd=tmp_path, env={**os.environ}, timeout=PATIENCE_SECONDS)
    assert (ended.returncode, ended.stdout) == (0, f"{tmp_path}/here/models/it.bin/it.bin\n"), ended.stderr
    shown_here = ("options", "--effective", "--config", "conf.yaml", "-o", "json")
    ended = run([*CACHD, *shown_here], cwd=tmp_path, env={**os.environ, "CACHD_ROOT": "here"}, timeout=60)
    shown = {option["key"]: option for option in json.loads(ended.stdout)["options"]}
    assert shown["root"]["value"] == f"{tmp_path}/here"
    assert shown["hf_token_file"]["value"] == f"{tmp_path}/token"
    assert shown["hf_token_file"]["where"] == f"{tmp_path}/conf.yaml:3"
    assert shown["config"]["value"] == f"{tmp_path}/conf.yaml"


# --- exit codes ---


def served(tmp_path: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "another").mkdir(mode=0o755, exist_ok=True)
    command = [*CACHD, "serve", "--root", str(tmp_path / "another"), *words]
    return run(command, env={**os.environ, **env}, timeout=PATIENCE_SECONDS)


def test_a_port_that_is_taken_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = served(tmp_path, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (ended.returncode, "code: cannot_listen" in ended.stderr) == (9, True), ended.stderr


def test_an_address_of_another_machine_is_a_wrong_option(tmp_path: Path) -> None:
    ended = served(tmp_path, "--listen", "192.0.2.1:8470", CACHD_ANONYMOUS_WRITES="true")
    assert (ended.returncode, "code: cannot_listen" in ended.stderr) == (2, True), ended.stderr
    ended = served(tmp_path, "--listen", f"unix:{tmp_path}/absent/s.sock")
    assert (ended.returncode, "code: cannot_listen" in ended.stderr) == (2, True), ended.stderr


def test_a_certificate_that_cannot_be_used_is_a_wrong_option(tmp_path: Path) -> None:
    (tmp_path / "tls.pem").write_text("nothing")
    ended = served(tmp_path, "--listen", "127.0.0.1:0", CACHD_TLS_CERT_FILE=str(tmp_path / "tls.pem"))
    assert (ended.returncode, "code: bad_certificate" in ended.stderr) == (2, True), ended.stderr


def test_authorities_for_the_daemon_that_cannot_be_read_are_a_wrong_option(tmp_path: Path) -> None:
    words = ("--ca-file", str(tmp_path / "absent.pem"), "ls", "--url", "https://127.0.0.1:1")
    ended = run([*CACHD, *words], env={**os.environ}, timeout=PATIENCE_SECONDS)
    assert (ended.returncode, "code: bad_ca_file" in ended.stderr) == (2, True), ended.stderr
    assert f"{tmp_path}/absent.pem" in ended.stderr
    assert "--ca-file" in ended.stderr


# --- hints ---


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("localhost:8470", "write http://localhost:8470 ("),
        ("127.0.0.1", "write http://127.0.0.1 ("),
        ("[::1]:8470", "write http://[::1]:8470 ("),
        ("/run/cachd.sock", "write unix:/run/cachd.sock ("),
        ("http://", "write http://HOST:PORT"),
        ("http://host:99999", "write http://HOST:PORT"),
        ("http:localhost:8470", "write http://HOST:PORT"),
        ("ftp://localhost", "write http://HOST:PORT"),
    ],
)
def test_a_server_address_without_its_scheme_has_a_hint_that_completes_it(typed: str, hint: str) -> None:
    ended = run([*CACHD, "ls", "--url", typed], env={**os.environ}, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 2
    assert f"  hint: {hint}" in ended.stderr
    assert "code: bad_url" in ended.stderr


@pytest.mark.parametrize("option", ["hf_endpoint", "ms_endpoint", "s3_endpoint_url"])
@pytest.mark.parametrize(
    "typed",
    ["huggingface.co", "https://", "https://user:pw@host", "https://h/?q=1", "https://h:99999", "ftp://h"],
)
def test_an_error_about_an_endpoint_names_its_option(tmp_path: Path, option: str, typed: str) -> None:
    ended = served(tmp_path, "--listen", "127.0.0.1:0", **{f"CACHD_{option.upper()}": typed})
    assert ended.returncode == 2
    assert f"CACHD_{option.upper()}: {option}: write https://HOST" in ended.stderr
    assert "allow" not in ended.stderr
    assert "pw" not in ended.stderr


def refusal(origin: Origin, status: int) -> CachdError:
    origin.add(f"/{status}", b"x")
    origin.fault(f"/{status}", Status(status), methods=EITHER)
    with pytest.raises(Forbidden) as refused:
        WebSource(http()).resolve(Ref.parse(f"{origin.url}/{status}"), CancelToken())
    return refused.value


def test_no_error_speaks_of_credentials_that_nobody_sent(ground: Ground, origin: Origin) -> None:
    """The Hub, a web server and a proxy refuse a caller without any."""
    ground.hub.add("org/closed", {"config.json": b"{}"}, private=True)
    ended = ground.node.cli("pull", "hf://org/closed", "--wait")
    assert (ended.returncode, "no token is set" in ended.stderr) == (5, True), ended.stderr
    assert "not accepted" not in ended.stderr
    assert "give it a headers_file" in refusal(origin, 401).hint
    assert "if it has any" in refusal(origin, 403).hint


def test_a_proxy_that_wants_credentials_is_told_apart_from_one_that_refuses_them(
    tmp_path: Path, origin: Origin
) -> None:
    (tmp_path / "wrong").write_text("user:wrong")
    with Proxy(credentials="user:right") as proxy:
        env = {"CACHD_PROXY": proxy.url, "CACHD_RETRIES": "0", "CACHD_RESERVE_FREE": "0"}
        said = []
        for own in ({}, {"CACHD_PROXY_CREDENTIALS_FILE": str(tmp_path / "wrong")}):
            (tmp_path / "root").mkdir(mode=0o755, exist_ok=True)
            words = ("pull", "--direct", "https://origin.test/it", "--root", str(tmp_path / "root"))
            ended = run([*CACHD, *words], env={**os.environ, **env, **own}, timeout=PATIENCE_SECONDS)
            assert "code: proxy_auth" in ended.stderr
            said.append(ended.stderr)
    assert "none are set: set proxy_credentials_file" in said[0]
    assert "hint: check proxy_credentials_file" in said[1]


# --- words ---


def test_who_reaches_no_daemon_reads_the_system_s_words() -> None:
    ended = run([*CACHD, "ls", "--server", "http://127.0.0.1:1"], timeout=PATIENCE_SECONDS)
    assert ended.stderr.splitlines()[0] == "error: no cachd answers at http://127.0.0.1:1: Connection refused"


def test_the_usage_names_the_command_that_people_type() -> None:
    ended = run([*CACHD, "pul"], timeout=PATIENCE_SECONDS, env={**os.environ, "COLUMNS": "100"})
    assert ended.stderr.startswith("Usage: cachd [OPTIONS]")


def test_a_log_for_people_has_no_empty_values() -> None:
    script = """
import structlog
from cachd.daemon.logs import configure_logs
configure_logs("info", "text")
structlog.get_logger().info("pull ended", code="", waits=None, withheld={}, resumed_bytes=0, state="ready")
"""
    ended = run([sys.executable, "-c", script], timeout=PATIENCE_SECONDS)
    words = re.sub(r"\x1b\[[0-9;]*m", "", ended.stderr).split()
    assert [word for word in words if "=" in word] == ["resumed_bytes=0", "state=ready"]
