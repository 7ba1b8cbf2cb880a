"""Namespaces of the ground's own: mounts, networks and processes of the cases end with them.

What no namespace keeps apart is put back and compared afterwards: the kubelet's cgroups, and the settings of
the kernel that it changes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.kube.processes import run, until
from tests.kube.programs import CACHE, PROJECT
from tests.kube.worker import CGROUPS

INSIDE = "--inside"
# What the kubelet sets for the whole machine.
SETTINGS = (
    *("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"),
    *("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"),
)
CGROUP_ROOT = Path("/sys/fs/cgroup")
MOUNTED = (str(CACHE), "/run", "/sys", "/var")  # where the node mounts; elsewhere, other processes may


@dataclass(frozen=True)
class Machine:
    """What the cases could leave behind on the machine."""

    mounts: frozenset[str]
    interfaces: frozenset[str]
    disks: frozenset[str]
    cgroups: frozenset[str]
    settings: dict[str, str]

    def left_since(self, before: Machine, place: Path) -> list[str]:
        """What is there now that was not there before, and processes of `place`."""
        left = [
            f"{kind} {name}"
            for kind in ("mounts", "interfaces", "disks", "cgroups")
            for name in sorted(getattr(self, kind) - getattr(before, kind))
        ]
        left += [f"setting {name}" for name in SETTINGS if self.settings[name] != before.settings[name]]
        return left + [f"process {name}" for name in _processes(place)]


def machine() -> Machine:
    mountinfo = Path("/proc/self/mountinfo").read_text().splitlines()
    loops = run("losetup", "--list", "--noheadings", "--output", "BACK-FILE").split("\n")
    return Machine(
        frozenset(at for line in mountinfo if (at := line.split()[4]).startswith(MOUNTED)),
        frozenset(path.name for path in Path("/sys/class/net").iterdir()),
        frozenset(filter(None, map(str.strip, loops))),
        frozenset(map(str, cgroups())),
        {name: Path("/proc/sys", name).read_text().strip() for name in SETTINGS},
    )


def cgroups() -> list[Path]:
    """The kubelet's, of every controller: there are none unless a kubelet runs, or ran."""
    places = (CGROUP_ROOT, *CGROUP_ROOT.iterdir()) if CGROUP_ROOT.is_dir() else ()
    return [path for place in places if (path := place / CGROUPS).is_dir()]


def run_inside(arguments: list[str]) -> int:
    """Run `python -m tests.kube --inside PLACE ARGUMENTS` in namespaces of its own, and tidy up.

    Gives its exit status, or 1 with a line for each thing that it left behind.
    """
    if found := cgroups():
        raise RuntimeError(f"a kubelet runs on this machine, or one has left {found[0]}")
    before = machine()
    place = Path(tempfile.mkdtemp(prefix="ground-", dir=CACHE))
    unshare = ("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
    init = ("sh", "-c", '"$@"; exit $?', "init")  # a shell reaps what the node's programs leave to it
    program = (*init, sys.executable, "-m", "tests.kube", INSIDE, str(place))
    try:
        status = subprocess.run([*unshare, *program, *arguments], cwd=PROJECT).returncode
    finally:
        _keep_logs(place)
        _tidy(before)
        with suppress(TimeoutError):  # the kernel takes a moment to free the disk
            until(lambda: not machine().left_since(before, place), "nothing is left", seconds=30)
        left = machine().left_since(before, place)
        shutil.rmtree(place, ignore_errors=True)
    for each in left:
        print(f"left behind: {each}")
    return status or (1 if left else 0)


def own_mounts() -> None:
    """Inside: mounts that reach pods, not the machine; /run, /var/lib and /var/log stay as they are."""
    run("mount", "--make-rslave", "/")
    run("mount", "--make-rshared", "/")
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    for directory in ("/var/lib", "/var/log"):
        layers = Path("/run/layers", Path(directory).name)
        for layer in ("upper", "work"):
            (layers / layer).mkdir(parents=True)
        own = f"lowerdir={directory},upperdir={layers}/upper,workdir={layers}/work"
        run("mount", "-t", "overlay", "overlay", "-o", own, directory)


def _keep_logs(place: Path) -> None:
    """Beside the log of the cases: those of the node's programs."""
    (CACHE / "logs").mkdir(exist_ok=True)
    for log in place.glob("*.log"):
        shutil.copy(log, CACHE / "logs")


def _tidy(before: Machine) -> None:
    for top in cgroups():
        for directory in sorted((path for path in [top, *top.rglob("*")] if path.is_dir()), reverse=True):
            with suppress(OSError):
                directory.rmdir()
    for name, value in before.settings.items():
        if (setting := Path("/proc/sys", name)).read_text().strip() != value:
            setting.write_text(value)


def _processes(place: Path) -> list[str]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(place) in words or f"/{CGROUPS}/" in (directory / "cgroup").read_text():
                found.append(f"{directory.name} {words}")
    return found
