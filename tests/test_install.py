"""The commands that install cachd on a bare machine do what the README says, and the service file runs it."""

from __future__ import annotations

import configparser
import grp
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from cachd.config import Config
from cachd.kernel.threads import STOP_SECONDS
from tests.ground.models import noise
from tests.ground.needs import needs
from tests.ground.node import Node
from tests.test_notices import Listener

PROJECT = Path(__file__).parent.parent
UNIT = PROJECT / "systemd/cachd.service"
CONFIG = PROJECT / "systemd/config.yaml"
README = (PROJECT / "README.md").read_text()
CACHD = Path(sys.executable).parent / "cachd"
# Calls that systemd may not know yet, and so refuses, each with the one that the daemon makes then.
INSTEAD = {"cachestat": "mincore", "syscall_0x1c3": "mincore"}  # an older strace knows it by its number alone


def unit() -> dict[str, str]:
    """The section [Service]; of a key that is repeated, the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # as in the manual
    parser.read_string(UNIT.read_text())
    return dict(parser["Service"])


def steps(first: str) -> list[list[str]]:
    """The commands of the README's block that begins so, in words."""
    (block,) = (text for text in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if text.startswith(first))
    return [shlex.split(line) for line in block.splitlines()]


def test_the_commands_put_the_files_where_the_service_expects_them(tmp_path: Path) -> None:
    installs = [words for words in steps("python3 -m venv") if words[0] == "install"]
    for *words, target in installs:
        subprocess.run([*words, f"{tmp_path}{target}"], cwd=PROJECT, check=True)
    assert (tmp_path / "etc/systemd/system/cachd.service").read_text() == UNIT.read_text()
    started = shlex.split(unit()["ExecStart"])
    assert (tmp_path / started[started.index("--config") + 1].lstrip("/")).read_text() == CONFIG.read_text()
    venv, pip = steps("python3 -m venv")[:2]
    assert started[0] == f"{venv[-1]}/bin/cachd"
    assert pip[0] == f"{venv[-1]}/bin/python"


@needs("root")
def test_the_commands_make_the_user_of_the_service_and_enable_it(tmp_path: Path) -> None:
    """In another root, by the same programs; they are left out where the machine has none."""
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    for name in ("passwd", "group", "shadow", "gshadow", "login.defs"):
        (tmp_path / "etc" / name).touch()
    shutil.copy(UNIT, tmp_path / "etc/systemd/system")
    useradd, systemctl = (
        next(w for w in steps("python3 -m venv") if w[0] == name) for name in ("useradd", "systemctl")
    )
    if shutil.which("useradd"):
        subprocess.run([useradd[0], "--prefix", tmp_path, *useradd[1:]], check=True, capture_output=True)
        assert (tmp_path / "etc/passwd").read_text().startswith(f"{unit()['User']}:")
    if shutil.which("systemctl"):
        enable = [word for word in systemctl[1:] if word != "--now"]
        subprocess.run([systemctl[0], "--root", tmp_path, *enable], check=True, capture_output=True)
        assert (tmp_path / "etc/systemd/system/multi-user.target.wants/cachd.service").is_symlink()


@pytest.fixture
def verifiable(tmp_path: Path) -> Path:
    """The service with a program that every machine has."""
    assert unit()["ExecStart"].split()[0] == "/opt/cachd/bin/cachd"
    here = tmp_path / "cachd.service"
    here.write_text(UNIT.read_text().replace("/opt/cachd/bin/cachd", "/bin/true"))
    return here


@needs("systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_service(verifiable: Path) -> None:
    verified = subprocess.run(["systemd-analyze", "verify", verifiable], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")


@needs("systemd-analyze")
def test_systemd_rates_the_service_as_hardened(verifiable: Path) -> None:
    """Its scale goes from 0 to 10, which is exposed to everything; a service without settings has 9.6."""
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(verifiable)]
    rated = subprocess.run(words, capture_output=True, text=True)
    assert rated.returncode == 0, rated.stdout.splitlines()[-1]


def test_the_service_keeps_what_the_daemon_works_with() -> None:
    """Hard links, leases and inotify of its own files, /proc, and a directory that pods can mount."""
    settings = unit()
    assert "DynamicUser" not in settings
    assert settings.get("ProcSubset", "all") == "all"
    assert not {"PrivateUsers", "IPAddressDeny", "PrivateNetwork", "NoExecPaths"} & settings.keys()
    assert (settings["StateDirectory"], settings["StateDirectoryMode"]) == ("cachd", "0755")
    assert not {"ReadWritePaths", "BindPaths", "TemporaryFileSystem"} & settings.keys()
    assert int(settings["UMask"], 8) == 0o022


def filters() -> list[str]:
    """The values of SystemCallFilter, in order."""
    return re.findall(r"^SystemCallFilter=(.+)", UNIT.read_text(), re.MULTILINE)


def allowed_calls() -> set[str]:
    """The system calls that the service may make, as systemd reads its filters."""
    said = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True)
    sets: dict[str, set[str]] = {}
    for line in said.stdout.splitlines():
        if line.startswith("@"):
            calls = sets.setdefault(line.strip(), set())
        elif line.startswith(" ") and not line.strip().startswith("#"):
            calls.add(line.strip())

    def expanded(name: str) -> set[str]:
        return set().union(*map(expanded, sets[name])) if name in sets else {name}

    allowed: set[str] = set()
    for value in filters():
        named = set().union(*map(expanded, value.removeprefix("~").split()))
        allowed = allowed - named if value.startswith("~") else allowed | named
    return allowed


@needs("systemd-analyze", "strace")
def test_the_service_may_make_every_system_call_that_the_daemon_makes(tmp_path: Path) -> None:
    """In a life with a listener of a group, a pull, a verification, an eviction and a warming."""
    share, log = tmp_path / "share", tmp_path / "calls"
    share.mkdir()
    (share / "model.bin").write_bytes(noise(9 << 20))
    listen = f"unix:{tmp_path}/sock?group={grp.getgrgid(os.getgid()).gr_name}"
    traced = Node(
        tmp_path / "node",
        {"allow": [f"file://{share}/"], "listen": ["127.0.0.1:0", listen]},
        before=("strace", "-f", "-qq", "-o", str(log)),
    )
    with traced as running:
        running.pull(f"file://{share}/", name="m")
        assert running.ready("m").status == 200
        for command in (("warm", "m"), ("verify", "m"), ("capacity",), ("rm", "m"), ("doctor",)):
            ended = running.cli(*command)
            assert ended.returncode == 0, ended.stderr
        (daemon,) = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(daemon), signal.SIGTERM)
        running.wait_for("stopped")
    made = set(re.findall(r"^\d+ +(\w+)\(", log.read_text(errors="replace"), re.MULTILINE))
    assert {"fcntl", "inotify_add_watch", "chown"} <= made
    assert {INSTEAD.get(call, call) for call in made} - allowed_calls() == set()


def test_the_service_starts_reloads_and_stops_by_its_own_commands(tmp_path: Path) -> None:
    root, config = tmp_path / "root", tmp_path / "config.yaml"
    root.mkdir(mode=int(unit()["StateDirectoryMode"], 8))
    shutil.copy(CONFIG, config)
    places = {
        "/opt/cachd/bin/cachd": str(CACHD),
        "/var/lib/cachd": str(root),
        "/etc/cachd/config.yaml": str(config),
    }
    words = [places.get(word, word) for word in shlex.split(unit()["ExecStart"])]
    url = f"unix:{tmp_path}/sock"
    systemd = Listener(str(tmp_path / "notify"))
    env = {**os.environ, "CACHD_LISTEN": url, "CACHD_RESERVE_FREE": "0", "NOTIFY_SOCKET": systemd.address}
    with closing(systemd), subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL) as daemon:
        ls = [str(CACHD), "ls", "--url", url]
        assert unit()["Type"] == "notify"
        systemd.hears("READY")
        assert subprocess.run(ls, capture_output=True).returncode == 0
        assert unit()["ExecReload"].split() == ["kill", "-HUP", "$MAINPID"]
        daemon.send_signal(signal.SIGHUP)
        systemd.hears("RELOADING")
        systemd.hears("READY")
        assert subprocess.run(ls, capture_output=True).returncode == 0
        daemon.terminate()
        assert daemon.wait(int(unit()["TimeoutStopSec"])) == 0


def test_the_configuration_that_is_shipped_names_only_options(tmp_path: Path) -> None:
    text = CONFIG.read_text()
    Config.model_validate(yaml.safe_load(text))
    shown = re.findall(r"^# ([a-z0-9_]+):", text, re.MULTILINE)
    assert shown
    assert set(shown) <= Config.model_fields.keys()
    Config.model_validate(yaml.safe_load(text.replace("models: []", "models:").replace("\n#  ", "\n  ")))


def test_the_container_is_started_as_its_image_expects() -> None:
    image = (PROJECT / "Dockerfile").read_text()
    make, run = steps("install -d -o 65532")
    uid, root = make[make.index("-o") + 1], make[-1]
    assert f"USER {uid}:{make[make.index('-g') + 1]}" in image
    assert f"CACHD_ROOT={root}" in image
    assert run[run.index("-v") + 1] == f"{root}:{root}"
    assert int(run[run.index("--stop-timeout") + 1]) > STOP_SECONDS
    assert run[run.index("--network") + 1] == "host", (
        "or else nobody reaches a loopback address of the container"
    )
    assert [str(each) for each in Config().listeners] == ["127.0.0.1:8470"]
    assert f"docker build -t {run[-1]} ." in README


@pytest.mark.parametrize("name", ["systemd/cachd.service", "systemd/config.yaml"])
def test_the_readme_names_what_is_shipped(name: str) -> None:
    assert name in README
    assert (PROJECT / name).is_file()
