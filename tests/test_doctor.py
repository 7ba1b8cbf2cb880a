"""`cachd doctor`: each thing is really made wrong, and is found with its code, its state and a hint."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import cachd
from cachd.doctor import codes
from cachd.doctor.at_once import MAX_AT_ONCE, at_once
from cachd.doctor.codes import Code
from cachd.doctor.finding import State
from cachd.doctor.running import Reported, check_in_force
from cachd.errors import CachdError
from cachd.kubelet import is_used_by_node
from tests.ground.clock import Clock
from tests.ground.hub import Hub
from tests.ground.kube_api import KubeApi
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Status
from tests.ground.origin.certificates import Tls, certify
from tests.ground.program import CACHD, Program, run
from tests.ground.proxy import Proxy
from tests.ground.s3 import S3Server
from tests.ground.scripted import Scripted, heard

MIB = 1 << 20
PATIENCE_SECONDS = 120
PROJECT = Path(__file__).parent.parent
Nodes = Callable[..., Node]
OTHER_USER = 10001
PATIENT = ("-o", "json", "--timeout", "60s")  # the machine may be busy
needs = pytest.mark.needs


class Examined:
    """What one run of the doctor said."""

    def __init__(self, ended: subprocess.CompletedProcess[str]) -> None:
        assert not ended.stderr, ended.stderr
        self.status, self.stdout = ended.returncode, ended.stdout
        self.findings: list[dict[str, str]] = json.loads(ended.stdout)["findings"]

    def of(self, code: Code, subject: str = "") -> dict[str, str]:
        """The finding of a code, or the one of several that is about `subject`."""
        found = [each for each in self.findings if each["code"] == code]
        if subject:
            found = [each for each in found if subject in each.get("subject", "") + each["what"]]
        assert len(found) == 1, (code, found)
        return found[0]

    def state(self, code: Code, subject: str = "") -> str:
        return self.of(code, subject)["state"]

    @property
    def wrong(self) -> set[str]:
        return {each["code"] for each in self.findings if each["state"] == "wrong"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as started:
        yield started


class Machine:
    """A node without a daemon: a root, a configuration file, and a Hub that answers.

    It does not name the default address, where another test may have a daemon just now.
    """

    def __init__(self, place: Path, hub: Hub) -> None:
        self.root, self.file, self.hub = place / "root", place / "config.yaml", hub
        self.root.mkdir(mode=0o755)
        self.options: dict[str, Any] = {
            "root": str(self.root),
            "hf_endpoint": hub.url,
            "reserve_free": 0,
            "listen": f"127.0.0.1:{closed_port()}",
        }
        self.env = {"HOME": str(place), "AWS_EC2_METADATA_DISABLED": "true"}

    def examined(self, *words: str, **options: Any) -> Examined:
        """`options` in capitals are variables; `before` are the words of a command that runs another."""
        before: tuple[str, ...] = options.pop("before", ())
        env = {key: str(value) for key, value in options.items() if key.isupper()}
        own = {key: value for key, value in options.items() if not key.isupper()}
        self.file.write_text(yaml.safe_dump({**self.options, **own}))
        command = [*before, *CACHD, "doctor", "--config", str(self.file), *PATIENT, *words]
        return Examined(run(command, env={**os.environ, **self.env, **env}, timeout=PATIENCE_SECONDS))


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path, hub)


@pytest.fixture
def public(hub: Hub) -> Iterator[Machine]:
    """A machine whose files another user may see."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Machine(Path(directory), hub)


def as_user(uid: int) -> tuple[str, ...]:
    """The words before a command that run it as another user."""
    return ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- as a whole ---


def test_a_sound_node_without_a_daemon_is_0_and_each_finding_says_what_it_is(machine: Machine) -> None:
    found = machine.examined()
    assert (found.status, found.wrong) == (0, set()), found.stdout
    assert found.state(Code.daemon) == "warning", "none was named, and none holds the root"
    for each in found.findings:
        assert each["what"]
        assert each["state"] == "ok" or each["hint"], each
    assert list(machine.root.iterdir()) == [], "it left something there"


def test_every_code_is_documented_and_tested() -> None:
    assert set(codes.MEANINGS) == set(Code)
    tree = ast.parse(Path(__file__).read_text())
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {code.name for code in Code} <= named


def test_text_is_in_colour_on_a_terminal_alone(machine: Machine) -> None:
    machine.examined(disk_at_least="900TB")
    command = [*CACHD, "doctor", "--config", str(machine.file)]
    env = {**os.environ, **machine.env, "TERM": "xterm-256color", "COLUMNS": "200"}
    plain = run(command, env=env, timeout=PATIENCE_SECONDS)
    assert plain.returncode == 1
    assert re.search(r"^wrong    file_system +\S", plain.stdout, re.MULTILINE), plain.stdout
    assert re.search(r"^ +hint: mount the intended disk", plain.stdout, re.MULTILINE)
    assert re.fullmatch(r"1 wrong, \d+ warnings?, \d+ ok", plain.stdout.splitlines()[-1])
    assert "\x1b" not in plain.stdout
    master, slave = pty.openpty()
    with Program(command, env=env, stdout=slave) as running:
        os.close(slave)
        drawn = b""
        try:
            while more := os.read(master, 1 << 16):
                drawn += more
        except OSError:  # EIO: it has ended
            pass
        os.close(master)
    assert running.returncode == 1
    assert b"\x1b[31mwrong" in drawn
    assert b"\x1b[32mok" in drawn


def test_a_daemon_that_started_with_the_last_good_configuration_is_wrong() -> None:
    error = {"code": "bad_option", "detail": "config.yaml:1: streams: 'many' is no number"}
    file = {"error": error, "last_good": True, "loaded_at": "2026-01-02T03:04:05Z", "in_force": False}
    (found,) = check_in_force(Reported("http://127.0.0.1:8470", options={"file": file, "options": []}))
    assert (found.state, found.error) == (State.wrong, "bad_option")
    assert "the last good one, of 2026-01-02T03:04:05Z" in found.what


def test_more_calls_than_run_at_once_follow_each_other() -> None:
    calls = [partial(str, number) for number in range(3 * MAX_AT_ONCE)]
    assert at_once(calls, PATIENCE_SECONDS) == [str(number) for number in range(3 * MAX_AT_ONCE)]


def test_a_call_that_never_returns_is_left_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def waits() -> bytes:
            with socket.create_connection(silent.getsockname()) as connection:
                return connection.recv(1)

        stuck, done = at_once([waits, lambda: b"done"], 0.2)
        assert isinstance(stuck, CachdError)
        assert (stuck.code, done) == ("no_answer", b"done")
        silent.accept()[0].close()  # it ends now


# --- the daemon ---


def test_a_daemon_that_was_named_and_does_not_answer_is_wrong(machine: Machine) -> None:
    found = machine.examined("--url", f"http://127.0.0.1:{closed_port()}")
    assert (found.status, found.wrong) == (1, {Code.daemon})
    assert found.of(Code.daemon)["error"] == "daemon_unreachable"
    elsewhere = machine.examined("--url", f"http://192.0.2.1:{closed_port()}", CACHD_ROOT="/nonexistent")
    assert [each["code"] for each in elsewhere.findings] == [Code.daemon], "another node's"


def test_a_daemon_that_holds_the_root_and_does_not_answer_is_wrong(node: Nodes, machine: Machine) -> None:
    running = node(hf_endpoint=machine.hub.url)
    found = machine.examined(root=str(running.root))
    assert found.wrong == {Code.daemon}
    assert f"pid {running.pid}" in found.of(Code.daemon)["what"]
    running.stop()
    assert machine.examined(root=str(running.root)).wrong == set()


def test_a_daemon_that_hangs_is_wrong_and_the_node_is_checked_all_the_same(
    node: Nodes, machine: Machine
) -> None:
    running = node(hf_endpoint=machine.hub.url)
    os.kill(running.pid, signal.SIGSTOP)
    try:
        found = machine.examined("--url", running.url, "--timeout", "3s", root=str(running.root))
    finally:
        os.kill(running.pid, signal.SIGCONT)
    assert found.state(Code.daemon) == "wrong"
    assert f"pid {running.pid}" in found.of(Code.daemon)["what"]
    assert found.state(Code.root) == "ok"


def test_a_running_daemon_says_where_its_root_and_its_file_are(node: Nodes, hub: Hub) -> None:
    running = node(hf_endpoint=hub.url, streams=5)
    found = Examined(running.cli("doctor", *PATIENT))
    assert (found.status, found.wrong) == (0, set()), found.stdout
    assert str(running.root) in found.of(Code.root)["what"]
    assert str(running.config) in found.of(Code.configuration)["what"]
    assert "the daemon may open" in found.of(Code.open_files)["what"]
    assert found.state(Code.hard_links) == found.state(Code.inotify) == found.state(Code.leases) == "ok"


def test_a_daemon_is_where_the_named_file_says_even_if_that_file_is_not_yaml(
    node: Nodes, machine: Machine
) -> None:
    running = node(hf_endpoint=machine.hub.url, listen=f"127.0.0.1:{closed_port()}")
    found = machine.examined(root=str(running.root), listen=running.options["listen"])
    assert found.state(Code.daemon) == "ok"
    assert found.of(Code.daemon)["subject"] == running.url
    for file in (f"root: {running.root}\nmodels: [\n", f"listen: {running.options['listen']}\nmodels: [\n"):
        machine.file.write_text(file)
        command = [*CACHD, "doctor", "--config", str(machine.file), *PATIENT]
        broken = Examined(run(command, env={**os.environ, **machine.env}, timeout=PATIENCE_SECONDS))
        assert broken.wrong == {Code.configuration}, broken.stdout
        assert str(running.root) in broken.of(Code.root)["what"]
    assert running.stop() == 0
    machine.file.write_text(f"root: {running.root}\nmodels: [\n")
    stopped = Examined(run(command, env={**os.environ, **machine.env}, timeout=PATIENCE_SECONDS))
    assert stopped.wrong == {Code.configuration}, stopped.stdout


def test_a_daemon_that_refuses_the_token_is_wrong(node: Nodes, tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "tokens").write_text("canary-admin")
    running = node(hf_endpoint=hub.url, token_file=str(tmp_path / "tokens"), anonymous_reads=False)
    found = Examined(running.cli("doctor", *PATIENT))
    assert found.of(Code.daemon)["error"] == "unauthorized"
    assert "--token-file" in found.of(Code.daemon)["hint"]
    running.configure(**{**running.options, "anonymous_reads": True})
    running.stop()
    running.start()
    assert Examined(running.cli("doctor", *PATIENT)).state(Code.daemon) == "ok"
    wrong = Examined(running.cli("doctor", *PATIENT, CACHD_TOKEN="canary-wrong"))
    assert (wrong.status, wrong.of(Code.daemon)["error"]) == (1, "unauthorized")
    given = Examined(running.cli("doctor", *PATIENT, CACHD_TOKEN="canary-admin"))
    assert (given.status, given.state(Code.daemon)) == (0, "ok")
    assert given.state(Code.configuration_in_force) == "ok"
    assert "canary" not in found.stdout + given.stdout


# --- configuration ---


def test_wrong_options_are_found_and_the_right_ones_are_used(machine: Machine) -> None:
    found = machine.examined(streams="many", steams=4, CACHD_PULS="3")
    assert found.wrong == {Code.configuration}
    assert "'many' is not a whole number" in found.of(Code.configuration, "streams:")["what"]
    assert f"{machine.file}:" in found.of(Code.configuration, "steams")["what"]
    assert found.state(Code.configuration, "CACHD_PULS") == "warning"
    assert str(machine.root) in found.of(Code.root)["what"]


def test_a_file_that_was_not_taken_over_is_wrong_and_keys_that_wait_are_a_warning(
    node: Nodes, hub: Hub
) -> None:
    running = node(hf_endpoint=hub.url)
    running.configure(**{**running.options, "streams": 6})
    running.wait_for("options of the file wait for a restart", options=["streams"])
    waiting = Examined(running.cli("doctor", *PATIENT))
    assert (waiting.status, waiting.state(Code.restart_needed)) == (0, "warning")
    assert "streams" in waiting.of(Code.restart_needed)["what"]
    running.configure(**{**running.options, "streams": "many"})
    running.wait_for("configuration file not taken over")
    refused = Examined(running.cli("doctor", *PATIENT))
    assert refused.status == 1
    assert refused.wrong == {Code.configuration_in_force, Code.configuration}
    assert "'many' is not" in refused.of(Code.configuration_in_force)["what"]


# --- the root ---


def test_a_root_that_is_missing_or_that_others_may_change_is_wrong(machine: Machine, tmp_path: Path) -> None:
    absent = machine.examined(root=str(tmp_path / "absent"))
    assert absent.of(Code.root)["error"] == "bad_root"
    assert "install -d" in absent.of(Code.root)["hint"]
    machine.root.chmod(0o777)
    unsafe = machine.examined()
    assert (unsafe.of(Code.root)["error"], unsafe.wrong) == ("unsafe_root", {Code.root})
    assert "chmod 0755" in unsafe.of(Code.root)["hint"]
    machine.root.chmod(0o750)
    assert machine.examined().state(Code.root) == "warning", "pods cannot read it"
    inside = machine.examined(own_directory=True)
    assert inside.state(Code.root) in ("ok", "warning")


def may_run_cachd(uid: int) -> bool:
    """Whether another user may read the Python and the cachd that this process runs."""
    program = (*as_user(uid), "cat", os.__file__, cachd.__file__)
    return not subprocess.run(program, capture_output=True).returncode


def test_a_directory_that_the_user_may_not_write_is_wrong(public: Machine) -> None:
    public.root.chmod(0o555)
    before: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if not may_run_cachd(OTHER_USER):
            pytest.skip("root may write everywhere, and no other user may read this checkout")
        os.chown(public.root, OTHER_USER, OTHER_USER)
        before = as_user(OTHER_USER)
    found = public.examined(before=before)
    public.root.chmod(0o755)
    assert found.of(Code.root)["error"] == "bad_root"
    assert found.state(Code.hard_links) == "wrong"


@needs("root")
def test_root_takes_on_the_daemons_user_and_another_user_checks_no_root(public: Machine) -> None:
    """A root that no daemon has used is its owner's, too. Without that user's access to Python, it cannot."""
    private, token = public.root / ".cachd", public.root.parent / "token"
    token.write_text("of root alone")
    token.chmod(0o600)
    os.chown(public.root, OTHER_USER, OTHER_USER)
    fresh = public.examined()
    private.mkdir(mode=0o700)
    os.chown(private, OTHER_USER, OTHER_USER)
    found = public.examined(hf_token_file=str(token))
    if not may_run_cachd(OTHER_USER):
        assert fresh.state(Code.user) == found.state(Code.user) == "warning"
        return
    assert f"uid {OTHER_USER}" in fresh.of(Code.user)["what"]
    assert f"uid {OTHER_USER}" in found.of(Code.user)["what"]
    assert fresh.state(Code.root) == found.state(Code.root) == "ok"
    assert found.of(Code.hub_token)["error"] == "bad_secret", "the daemon cannot read it"
    other = public.examined(before=as_user(10002))
    assert other.state(Code.user) == "warning"
    assert "sudo" in other.of(Code.user)["hint"]
    assert not [each for each in other.findings if each["code"] == Code.root]


@needs("root")
def test_a_user_that_root_took_on_has_none_of_its_rights() -> None:
    script = (
        f"import os; from cachd.doctor.this_node import become, can_become; can_become({OTHER_USER}, 7);"
        f" assert os.geteuid() == 0; become({OTHER_USER}, 7);"
        " print(os.getresuid(), os.getresgid(), os.getgroups())"
    )
    ended = subprocess.run([CACHD[0], "-c", script], capture_output=True, text=True, cwd=PROJECT)
    assert ended.stdout == f"({OTHER_USER}, {OTHER_USER}, {OTHER_USER}) (7, 7, 7) []\n", ended.stderr


def test_a_disk_that_is_too_small_or_read_only_is_wrong(
    machine: Machine, small_disk: Callable[..., Path]
) -> None:
    disk = small_disk(8 * MIB)
    small = machine.examined(root=str(disk), disk_at_least="1GB")
    assert small.of(Code.file_system)["error"] == "disk_too_small"
    assert "tmpfs" in machine.examined(root=str(disk)).of(Code.file_system)["what"]
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    sealed = machine.examined(root=str(disk))
    assert sealed.of(Code.file_system)["error"] == "read_only"
    assert sealed.of(Code.root)["error"] == "read_only"


@needs("mount")
def test_a_directory_of_the_root_that_is_a_mount_of_its_own_is_wrong(machine: Machine) -> None:
    (machine.root / "models").mkdir(mode=0o755)
    subprocess.run(["mount", "--bind", machine.root / "models", machine.root / "models"], check=True)
    try:
        found = machine.examined()
    finally:
        subprocess.run(["umount", machine.root / "models"], check=True)
    assert found.wrong == {Code.hard_links}
    assert "models in" in found.of(Code.hard_links)["what"]


def test_what_somebody_else_put_into_a_view_is_a_warning(machine: Machine) -> None:
    for name in ("models", "ready", "status"):
        (machine.root / name).mkdir()
    (machine.root / "models/qwen").symlink_to(".trees/1")
    (machine.root / "models/.trees").mkdir()
    (machine.root / "ready/qwen.json").touch()
    assert machine.examined().state(Code.foreign_files) == "ok"
    (machine.root / "models/junk").touch()
    found = machine.examined().of(Code.foreign_files)
    assert found["state"] == "warning"
    assert "1 entry that cachd did not make: models/junk" in found["what"]


def test_a_disk_without_space_or_inodes_is_found(machine: Machine, small_disk: Callable[..., Path]) -> None:
    disk = small_disk(8 * MIB, inodes=100)
    assert machine.examined(root=str(disk)).state(Code.space) == "ok"
    low = machine.examined(root=str(disk), reserve_free="16MB", reserve_inodes=200)
    assert (low.state(Code.space), low.state(Code.inodes)) == ("warning", "warning")
    assert low.status == 0
    (disk / "full").write_bytes(bytes(8 * MIB - (64 << 10)))
    assert machine.examined(root=str(disk), reserve_free=0).state(Code.space) == "warning"
    for number in range(200):
        try:
            (disk / f"{number}").touch()
        except OSError:
            break
    assert machine.examined(root=str(disk), reserve_free=0).state(Code.inodes) == "wrong"


def test_a_reserve_below_the_kubelets_threshold_is_a_warning(machine: Machine, tmp_path: Path) -> None:
    kubelet = tmp_path / "kubelet.yaml"
    kubelet.write_text("evictionHard: {nodefs.available: 99%}\n")
    found = machine.examined(kubelet_config=str(kubelet), reserve_free="1GB", reserve_inodes=0)
    if not is_used_by_node(machine.root):
        assert found.state(Code.kubelet) == "ok", "the kubelet does not care"
        return
    assert (found.state(Code.kubelet), "99%" in found.of(Code.kubelet)["what"]) == ("warning", True)
    auto = machine.examined(kubelet_config=str(kubelet), reserve_free="auto")
    assert auto.state(Code.kubelet) == "ok"
    kubelet.write_text("evictionHard: [\n")
    broken = machine.examined(kubelet_config=str(kubelet), reserve_free="auto")
    assert "warning" in {each["state"] for each in broken.findings if each["code"] == Code.kubelet}


# --- limits of the kernel ---


def test_a_limit_of_open_files_that_is_too_low_is_wrong(machine: Machine) -> None:
    found = machine.examined(before=("prlimit", "--nofile=80"))
    assert found.wrong == {Code.open_files}
    assert "ulimit -n" in found.of(Code.open_files)["hint"]
    assert machine.examined(before=("prlimit", "--nofile=1000")).state(Code.open_files) == "warning"


@pytest.mark.parametrize(
    ("limit", "most", "setting"),
    [("max_inotify_watches", 3, "max_user_watches"), ("max_inotify_instances", 0, "max_user_instances")],
)
def test_too_few_watches_are_a_warning(machine: Machine, limit: str, most: int, setting: str) -> None:
    for number in range(8):
        (machine.root / f"models/.trees/{number}").mkdir(parents=True, mode=0o755)
    wrapped = ("unshare", "-Ur", "sh", "-c", f'echo {most} > /proc/sys/user/{limit}; exec "$@"', "sh")
    found = machine.examined(before=wrapped)
    assert found.state(Code.inotify) == "warning"
    assert f"fs.inotify.{setting}" in found.of(Code.inotify)["hint"]
    assert machine.examined().state(Code.inotify) == "ok"


@needs("root")
def test_too_few_threads_are_wrong(public: Machine) -> None:
    """Root's threads are unlimited, so another user's are limited."""
    os.chown(public.root, OTHER_USER, OTHER_USER)
    user = ("setpriv", f"--reuid={OTHER_USER}", "--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    found = public.examined(before=(*user, "prlimit", "--nproc=70"))
    assert found.of(Code.threads)["error"] == "no_threads"
    assert "ulimit -u" in found.of(Code.threads)["hint"]


# --- certificates ---


def test_authorities_that_cannot_be_used_or_have_expired_are_wrong(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("no PEM at all")
    unusable = machine.examined(ca_file=str(file))
    assert unusable.of(Code.ca_file)["error"] == "bad_ca_file"
    for days, state in ((-1, "wrong"), (10, "warning"), (365, "ok")):
        certify(file, Tls(from_days=-30, to_days=days))
        assert machine.examined(ca_file=str(file)).state(Code.ca_file) == state, days
    valid = file.read_text()
    certify(file, Tls(from_days=-30, to_days=-1))
    file.write_text(valid + file.read_text())
    assert "1 of 2" in machine.examined(ca_file=str(file)).of(Code.ca_file)["what"]


def test_the_certificate_of_the_api_has_a_lifetime(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "tls.pem"
    for days, state in ((-1, "wrong"), (7, "warning"), (90, "ok")):
        certify(file, Tls(from_days=-30, to_days=days))
        found = machine.examined(tls_cert_file=str(file))
        assert found.state(Code.certificate) == state, days
    file.write_text("nothing")
    assert machine.examined(tls_cert_file=str(file)).wrong == {Code.certificate, Code.configuration}


# --- the network ---


def test_an_endpoint_that_does_not_answer_is_wrong_if_it_was_named(machine: Machine) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    named = machine.examined(hf_endpoint=url)
    assert (named.of(Code.endpoint)["error"], named.status) == ("connection_failed", 1)
    assert "may connect to 127.0.0.1" in named.of(Code.endpoint)["hint"]
    entry = {"prefix": "s3://bucket/", "endpoint": url, "anonymous": True}
    of_entry = machine.examined(sources=[entry])
    assert of_entry.state(Code.endpoint, url) == "wrong"
    assert of_entry.state(Code.endpoint, machine.hub.url) == "ok"
    model = {"ref": f"{url}/it.bin", "name": "it"}
    assert machine.examined(models=[model], allow=[url]).state(Code.endpoint, url) == "wrong"


def test_a_server_of_a_model_that_the_address_policy_refuses_is_wrong(machine: Machine) -> None:
    with Origin(tls=True) as private:
        model = {"ref": f"{private.url}/it.bin", "name": "it"}
        found = machine.examined(models=[model])
        assert found.of(Code.endpoint, private.url)["error"] == "private_address"
        assert "allow" in found.of(Code.endpoint, private.url)["hint"]


def test_an_endpoint_that_is_silent_costs_its_deadline_and_no_more(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as other:
        urls = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in (silent, other)]
        began = time.monotonic()
        found = machine.examined("--timeout", "2", hf_endpoint=urls[0], ms_endpoint=urls[1])
        took = time.monotonic() - began
    assert [found.of(Code.endpoint, url)["error"] in ("no_answer", "stalled") for url in urls] == [True, True]
    assert took < PATIENCE_SECONDS / 2


def test_an_endpoint_that_fails_is_a_warning_and_one_that_is_not_trusted_is_wrong(machine: Machine) -> None:
    machine.hub.fault("*", Status(503), methods=("HEAD", "GET"))
    failing = machine.examined()
    assert (failing.state(Code.endpoint), "503" in failing.of(Code.endpoint)["what"]) == ("warning", True)
    with Origin(tls=True) as untrusted:
        found = machine.examined(hf_endpoint=untrusted.url)
    assert found.of(Code.endpoint)["error"] == "tls_untrusted"
    assert "ca_file" in found.of(Code.endpoint)["hint"]


def test_a_name_without_an_address_is_wrong_if_it_was_named(machine: Machine) -> None:
    found = machine.examined(hf_endpoint="https://nowhere.invalid")
    assert (found.of(Code.dns)["error"], found.state(Code.dns)) == ("dns_failed", "wrong")
    assert "resolv.conf" in found.of(Code.dns)["hint"]
    assert machine.examined().state(Code.dns) == "ok"


def test_a_proxy_that_cannot_be_connected_to_is_wrong(machine: Machine) -> None:
    with Proxy() as proxy:
        assert machine.examined(proxy=proxy.url).state(Code.proxy) == "ok"
    gone = machine.examined(proxy=proxy.url)
    assert (gone.of(Code.proxy)["error"], gone.status) == ("proxy_unreachable", 1)
    unused = machine.examined(HTTPS_PROXY=proxy.url)
    assert (unused.state(Code.proxy), "proxy: env" in unused.of(Code.proxy)["hint"]) == ("warning", True)


def test_a_clock_that_is_wrong_is_found_by_the_dates_of_endpoints(machine: Machine, tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    try:
        for told, state in (("+0", "ok"), ("-120", "warning"), ("+1d", "wrong"), ("-1d", "wrong")):
            clock.set(told)
            found = machine.examined(**clock.env_at_start)
            assert found.state(Code.clock) == state, found.of(Code.clock)
        assert re.search(r"86[0-9]{3} s behind", found.of(Code.clock)["what"])
    finally:
        clock.close()


def test_a_clock_that_no_endpoint_can_be_asked_about_is_a_warning(machine: Machine) -> None:
    def answer(connection: socket.socket, _: int) -> None:
        if heard(connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with Scripted(answer) as undated:
        found = machine.examined(hf_endpoint=undated.url)
    assert (found.state(Code.endpoint), found.state(Code.clock), found.status) == ("ok", "warning", 0)


# --- credentials ---


def test_a_token_is_accepted_or_refused_and_never_shown(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "token"
    assert "no token is set" in machine.examined().of(Code.hub_token)["what"]
    file.write_text(machine.hub.token)
    right = machine.examined(hf_token_file=str(file))
    assert right.state(Code.hub_token) == "ok"
    assert f"{file}: it is ground's" in right.of(Code.hub_token)["what"]
    file.write_text("hf_canary")
    wrong = machine.examined(hf_token_file=str(file))
    assert (wrong.of(Code.hub_token)["error"], wrong.wrong) == ("source_unauthorized", {Code.hub_token})
    assert str(file) in wrong.of(Code.hub_token)["hint"]
    of_variable = machine.examined(HF_TOKEN="hf_canary")
    assert "HF_TOKEN" in of_variable.of(Code.hub_token)["hint"]
    absent = machine.examined(hf_token_file=str(tmp_path / "absent"))
    assert absent.of(Code.hub_token)["error"] == "bad_secret"
    assert "canary" not in wrong.stdout + of_variable.stdout
    assert machine.hub.token not in right.stdout


def test_the_token_of_an_entry_is_asked_about_at_its_own_endpoint(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("hf_canary")
    with Hub() as mirror:
        entry = {"prefix": "hf://org/", "endpoint": mirror.url, "credentials": str(tmp_path / "own")}
        found = machine.examined(sources=[entry], HF_TOKEN=machine.hub.token)
        assert found.state(Code.hub_token, "ground's") == "ok"
        assert found.state(Code.hub_token, mirror.url) == "wrong"
        assert {seen.headers.get("authorization") for seen in mirror.requests} <= {None, "Bearer hf_canary"}


def test_a_hub_without_whoami_is_a_warning(machine: Machine) -> None:
    machine.hub.fault("/api/whoami-v2", Status(404))
    found = machine.examined(HF_TOKEN="hf_anything")
    assert (found.state(Code.hub_token), found.status) == ("warning", 0)


def test_secret_files_that_cannot_be_used_are_wrong(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "proxy").write_text("no colon")
    (tmp_path / "headers").write_text("no header")
    entry = {"prefix": "https://host/", "headers_file": str(tmp_path / "headers")}
    found = machine.examined(
        proxy_credentials_file=str(tmp_path / "proxy"),
        ms_token_file=str(tmp_path / "absent"),
        ms_endpoint=machine.hub.url,
        sources=[entry],
    )
    states = {each["subject"]: each["state"] for each in found.findings if each["code"] == Code.secret_file}
    assert set(states.values()) == {"wrong"}
    assert len(states) == 3
    (tmp_path / "proxy").write_text("user:canary")
    right = machine.examined(proxy_credentials_file=str(tmp_path / "proxy"))
    assert (right.state(Code.secret_file), "canary" in right.stdout) == ("ok", False)


def test_tokens_of_the_api_that_cannot_be_read_are_wrong(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    assert machine.examined(token_file=str(file)).state(Code.api_tokens) == "wrong"
    file.write_text("tokens:\n  - {name: a, role: king, token: canary}\n")
    found = machine.examined(token_file=str(file))
    assert (found.wrong, "canary" in found.stdout) == ({Code.api_tokens}, False)
    file.write_text("canary")
    assert machine.examined(token_file=str(file)).state(Code.api_tokens) == "ok"


def test_credentials_for_s3_come_from_somewhere_and_are_accepted_or_not(
    machine: Machine, s3: S3Server, tmp_path: Path
) -> None:
    s3.put("models", "it/a.bin", b"x" * 100)
    options = {"s3_endpoint_url": s3.url, "s3_region": s3.region}
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    right = machine.examined(**options, **keys)
    assert right.state(Code.s3_credentials) == "ok"
    assert "AWS_ACCESS_KEY_ID" in right.of(Code.s3_credentials)["what"]
    wrong = machine.examined(**options, **{**keys, "AWS_SECRET_ACCESS_KEY": "canary"})
    assert wrong.of(Code.s3_credentials)["error"] == "source_unauthorized"
    assert "canary" not in wrong.stdout
    unsigned = machine.examined(**options, sources=[{"prefix": "s3://models/", "anonymous": True}])
    assert unsigned.of(Code.s3_credentials, "s3://models")["error"] == "source_forbidden"
    none = machine.examined(**options)
    assert (none.state(Code.s3_credentials), none.status) == ("warning", 0)
    profile = tmp_path / "aws"
    profile.write_text(
        f"[reader]\naws_access_key_id = {s3.reader_key}\naws_secret_access_key = {s3.reader_secret}\n"
    )
    entry = {"prefix": "s3://models/", "credentials": str(profile), "profile": "reader"}
    of_file = machine.examined(**options, sources=[entry])
    assert "a credentials file, accepted" in of_file.of(Code.s3_credentials, "s3://models")["what"]
    model = {"ref": "s3://absent/it/", "name": "it"}
    absent = machine.examined(**options, **keys, models=[model])
    assert absent.state(Code.s3_credentials, "s3://absent") == "wrong"


# --- models ---


def test_a_model_that_failed_says_why_with_a_daemon_and_without(
    origin: Origin, hub: Hub, node: Nodes
) -> None:
    running = node(hf_endpoint=hub.url)
    running.pull(f"{origin.url}/absent.bin", name="absent")
    running.wait_for("pull ended", name="absent", state="failed")
    sick = Examined(running.cli("doctor", *PATIENT))
    assert sick.wrong == {Code.model}
    assert (sick.of(Code.model)["subject"], sick.of(Code.model)["error"]) == ("absent", "file_not_found")
    assert "check the name" in sick.of(Code.model)["hint"]
    running.stop()
    words = ("doctor", "--config", str(running.config), "--root", str(running.root), *PATIENT)
    stopped = Examined(run([*CACHD, *words], env={**os.environ}, timeout=PATIENCE_SECONDS))
    assert stopped.wrong == {Code.model}
    assert stopped.of(Code.model)["error"] == "file_not_found"


def test_a_right_that_the_service_account_lacks_is_wrong(machine: Machine, tmp_path: Path) -> None:
    on = {"node_labels": True, "node_condition": True, "node_events": True}
    with KubeApi(tmp_path) as api:
        well = machine.examined(**on, **api.options)
        assert well.state(Code.kubernetes) == "ok", well.stdout
        assert "gpu-7" in well.of(Code.kubernetes)["what"]
        api.forbidden = {"nodes/status"}
        sick = machine.examined(**on, **api.options)
        assert sick.wrong == {Code.kubernetes}
        found = sick.of(Code.kubernetes, "node_condition")
        assert found["what"] == "the service account may not patch nodes/status"
        api.tokens = set()
        assert machine.examined(**on, **api.options).of(Code.kubernetes)["error"] == "no_kubernetes"
    assert machine.examined().status == 0, "nobody is asked while the options are off"


def test_a_required_model_that_is_not_ready_is_wrong(origin: Origin, hub: Hub, node: Nodes) -> None:
    required = {"ref": f"{origin.url}/later.bin", "name": "later", "required": True}
    running = node(hf_endpoint=hub.url, models=[required])
    running.wait_for("pull ended", name="later", state="failed")
    sick = Examined(running.cli("doctor", *PATIENT))
    assert (sick.status, sick.state(Code.required_models)) == (1, "wrong")
    assert "later" in sick.of(Code.required_models)["what"]
    origin.add("/later.bin", noise(1000))
    running.wait_for("published", name="later")
    well = Examined(running.cli("doctor", *PATIENT))
    assert (well.status, well.state(Code.model), well.state(Code.required_models)) == (0, "ok", "ok")


def test_a_failed_successor_of_a_ready_model_is_a_warning(origin: Origin, hub: Hub, node: Nodes) -> None:
    running = node(hf_endpoint=hub.url)
    running.pull(origin.add("/it.bin", noise(1000)), name="it")
    assert running.ready("it").status == 200
    running.pull(f"{origin.url}/absent.bin", name="it", replace=True)
    running.wait_for("pull ended", name="it", state="failed")
    found = Examined(running.cli("doctor", *PATIENT))
    assert (found.status, found.state(Code.model)) == (0, "warning")
