"""On the node and in the daemon's pod, the command line finds the daemon and a token by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachd.kernel.listening import listening_users
from cachd.settings.own_token import own_token, token_in
from tests.attacks.test_listeners import certified
from tests.ground.needs import needs
from tests.ground.node import Node
from tests.ground.program import CACHD, run
from tests.ground.site import PATIENCE_SECONDS

Nodes = Callable[..., Node]


def here(config: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command whose environment says no more than that of the daemon's container."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("CACHD_")}
    return run([*CACHD, *words], env={**ours, "CACHD_CONFIG": str(config), **env}, timeout=PATIENCE_SECONDS)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def listed(**roles: str) -> dict[str, Any]:
    return {
        "tokens": [{"name": name, "role": role, "token": f"canary-{name}"} for name, role in roles.items()]
    }


def test_in_the_pod_of_the_daemon_a_write_needs_neither_an_address_nor_a_token(
    node: Nodes, tmp_path: Path
) -> None:
    """As `kubectl exec ds/cachd -- cachd unpin x`: the environment has CACHD_CONFIG alone."""
    token = tmp_path / "token"
    token.write_text("canary-admin\n")
    running = node(listen=f"0.0.0.0:{free_port()}", token_file=str(token), anonymous_reads=False)
    assert here(running.config, "ls", "-o", "json").stdout == '{\n "models": []\n}\n'
    ended = here(running.config, "unpin", "x")
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (3, "  code: no_such_model")
    assert here(running.config, "sweep").returncode == 0
    assert "canary" not in ended.stdout + ended.stderr


def test_a_socket_of_the_node_is_found(node: Nodes, tmp_path: Path) -> None:
    running = node(listen=["127.0.0.1:0 probes", f"unix:{tmp_path}/s mode=0600"])
    assert here(running.config, "ls").returncode == 0


def test_the_environment_of_the_daemon_says_it_too(node: Nodes, tmp_path: Path) -> None:
    place = f"unix:{tmp_path}/s"
    node(listen=["127.0.0.1:0", place])
    assert here(tmp_path / "absent.yaml", "ls", CACHD_LISTEN=place).returncode == 0


def test_the_daemons_own_certificate_is_trusted_and_no_other(node: Nodes, tmp_path: Path) -> None:
    pem, other = certified(tmp_path / "tls.pem"), certified(tmp_path / "other.pem")
    port = free_port()
    running = node(listen=["127.0.0.1:0 probes plain", f"127.0.0.1:{port}"], tls_cert_file=str(pem))
    assert here(running.config, "ls").returncode == 0
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({"listen": f"127.0.0.1:{port}", "tls_cert_file": str(other)}))
    assert here(wrong, "ls").returncode == 6
    wrong.write_text(yaml.safe_dump({"listen": f"127.0.0.1:{port}", "tls_cert_file": "/dev/null"}))
    assert here(wrong, "ls").returncode == 2


def test_a_token_goes_to_the_daemon_of_this_node_alone(node: Nodes, tmp_path: Path) -> None:
    """A token of the configuration is not sent to an address that somebody typed."""
    token = tmp_path / "token"
    token.write_text("canary-admin")
    running = node(listen=f"127.0.0.1:{free_port()}", token_file=str(token))
    assert here(running.config, "sweep").returncode == 0
    assert here(running.config, "sweep", "--url", running.url).returncode == 5
    assert here(running.config, "sweep", CACHD_URL=running.url).returncode == 5


LISTENS_AS = """
import os, socket, sys
os.setgid(10001); os.setuid(10001)
listening = socket.socket()
listening.bind(("127.0.0.1", 0)); listening.listen()
print(listening.getsockname()[1], flush=True)
client = listening.accept()[0]
print(client.recv(65536).decode("latin-1"), flush=True)
"""


@needs("root")
def test_another_user_who_took_the_port_of_the_daemon_gets_no_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("canary-admin")
    (tmp_path / "root").mkdir()
    with subprocess.Popen([sys.executable, "-c", LISTENS_AS], stdout=subprocess.PIPE, text=True) as thief:
        try:
            assert thief.stdout is not None
            port = int(thief.stdout.readline())
            assert listening_users(port) == {10001}
            options = {"root": str(tmp_path / "root"), "token_file": str(tmp_path / "token")}
            (tmp_path / "config.yaml").write_text(yaml.safe_dump({**options, "listen": f"127.0.0.1:{port}"}))
            here(tmp_path / "config.yaml", "ls")
            heard = thief.stdout.read()
        finally:
            thief.kill()
    assert heard.startswith("GET /v1/models")
    assert "canary" not in heard


def test_the_users_who_listen_on_a_port_are_found() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        assert listening_users(listening.getsockname()[1]) == set()
        listening.listen()
        assert listening_users(listening.getsockname()[1]) == {os.geteuid()}


def test_the_token_with_the_highest_role_is_chosen(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    for content, token in (
        ("one\n", "one"),
        (yaml.safe_dump(listed(a="read", b="admin", c="pull")), "canary-b"),
        (yaml.safe_dump(listed(a="read")["tokens"]), "canary-a"),
        ("sha256:" + 64 * "0", None),
        (yaml.safe_dump({"tokens": [{"name": "a", "role": "admin", "sha256": 64 * "0"}]}), None),
        ("", None),
        ("two words", None),
        ("{", None),
    ):
        file.write_text(content)
        assert own_token(file) == token, content
        assert token_in(content.encode()) == token, content
    both = listed(all="admin", some="admin")
    both["tokens"][1]["namespaces"] = ["team-*"]
    file.write_text(yaml.safe_dump(both))
    assert own_token(file) == "canary-all"
    assert own_token(tmp_path / "absent") is None


def test_a_directory_of_tokens_is_a_token_file(tmp_path: Path, node: Nodes) -> None:
    place = tmp_path / "tokens"
    place.mkdir()
    for name, role in (("reader", "read"), ("boss", "admin")):
        (place / name).write_text(yaml.safe_dump({"role": role, "token": f"canary-{name}"}))
    assert own_token(place) == "canary-boss"
    running = node(token_file=str(place))
    for found in (place, place / "boss"):
        assert running.cli("sweep", "--token-file", str(found)).returncode == 0, found
        assert running.cli("sweep", CACHD_TOKEN_FILE=str(found)).returncode == 0
    assert running.cli("sweep", "--token-file", str(place / "reader")).returncode == 5


def test_without_any_setting_the_default_address_is_asked(tmp_path: Path) -> None:
    ended = here(tmp_path / "absent.yaml", "ls", CACHD_CONFIG=str(tmp_path / "absent.yaml"))
    assert ended.returncode in (0, 6), "a daemon may run on this machine"
    if ended.returncode:
        assert "http://127.0.0.1:8470" in ended.stderr


@pytest.mark.parametrize(
    "content", ["listen: [", "listen: {a: 1}", "listen: 7", "- x", "\x00", "listen: '::'"]
)
def test_a_broken_configuration_keeps_nobody_from_asking(tmp_path: Path, content: str) -> None:
    """doctor must work then, too."""
    config = tmp_path / "config.yaml"
    config.write_text(content)
    ended = here(config, "ls", "--url", "http://127.0.0.1:1")
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (6, "  code: daemon_unreachable")
    assert "Traceback" not in here(config, "ls").stderr


def test_a_file_that_is_not_yaml_keeps_nobody_from_the_daemon(node: Nodes) -> None:
    running = node(listen=f"127.0.0.1:{free_port()}")
    with running.config.open("a") as file:
        file.write("models: [\n")
    assert here(running.config, "ls").returncode == 0
    running.config.write_text(f"listen: [\nroot: {running.root}\n")
    assert here(running.config, "ls").returncode == 0, "the last good configuration says where it listens"


def test_an_address_that_a_broken_file_hides_is_said_to_be_uncertain(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"listen: 127.0.0.1:{free_port()}\nmodels: [\n")
    ended = here(config, "ls")
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (6, "  code: daemon_unreachable")
    assert f"{config}:3: not YAML" in ended.stderr
    assert "correct the file" in ended.stderr
    absent = here(tmp_path / "absent.yaml", "ls", CACHD_LISTEN=f"127.0.0.1:{free_port()}")
    assert f"{tmp_path}/absent.yaml: the configuration file cannot be read" in absent.stderr


def test_who_does_not_answer_is_said_in_plain_words(tmp_path: Path) -> None:
    port = free_port()
    for address in (f"http://127.0.0.1:{port}", f"unix:{tmp_path}/s"):
        ended = here(tmp_path / "absent.yaml", "ls", "--url", address)
        said = ended.stderr.splitlines()[0]
        reason = "No such file or directory" if address.startswith("unix") else "Connection refused"
        assert said == f"error: no cachd answers at {address}: {reason}"
