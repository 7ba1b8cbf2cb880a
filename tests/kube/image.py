"""The images that the node runs, built by buildah: cachd's own from the Dockerfile, an engine's, and pause.

Without a registry of images there is no base: debootstrap makes one of the machine's own distribution, which
the Dockerfile takes as BASE.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from cachd import __version__
from tests.kube.programs import CACHE, PROJECT, distribution, mirror

CACHD = f"docker.io/library/cachd:{__version__}"
ENGINE = "docker.io/library/cachd-test-engine:1"
PAUSE = "localhost/pause:1"
BASE = "localhost/cachd-test-base:1"
BASE_PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
# Of the machine: how pip reaches its packages. Each is mounted into the build where it is there.
PIP_FILES = ("/etc/ssl/certs", "/usr/local/share/ca-certificates", "/etc/pip.conf", "/etc/xdg/pip")
PAUSE_SOURCE = """
#include <signal.h>
#include <unistd.h>
static void end(int signal) { _exit(0); }
int main(void) { signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{place}/store"
runroot = "{place}/run"
"""
# The default limits are above what a container may have that is root of one.
CONTAINERS = """
[containers]
default_ulimits = ["nofile={nofile}:{nofile}", "nproc=30000:30000"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def archives(tell: Callable[[str], None]) -> list[Path]:
    """The archives of all images, in the cache directory; those whose content changed are built anew."""
    place = CACHE / "images"
    place.mkdir(parents=True, exist_ok=True)
    return [
        _built(place, CACHD, PROJECT, _sources(), tell),
        _built(place, ENGINE, PROJECT / "tests/kube/engine", [PROJECT / "tests/kube/engine"], tell),
        _built(place, PAUSE, None, [PAUSE_SOURCE], tell),
    ]


def _sources() -> list[Path]:
    return [PROJECT / name for name in ("Dockerfile", "lock", "pyproject.toml", "README.md", "cachd")]


def _built(
    place: Path,
    name: str,
    context: Path | None,
    of: Iterable[Path | str],
    tell: Callable[[str], None],
) -> Path:
    stem = name.rpartition("/")[2].partition(":")[0]
    archive = place / f"{stem}-{digest(of)[:16]}.tar"
    if archive.exists():
        return archive
    for old in place.glob(f"{stem}-*.tar"):
        old.unlink()
    tell(f"building the image {name}")
    if context is None:
        _pause(place)
    else:
        _base(place, tell)
        mounts = [word for path in _pip_files() for word in ("--volume", f"{path}:{path}:ro")]
        base = ("--isolation", "chroot", "--build-arg", f"BASE={BASE}")
        _buildah(place, "bud", "--layers", *base, *mounts, "--tag", name, str(context))
    half = archive.with_suffix(".half")
    half.unlink(missing_ok=True)
    _buildah(place, "push", "--quiet", name, f"docker-archive:{half}:{name}")
    return half.rename(archive)


def digest(of: Iterable[Path | str]) -> str:
    """SHA-256 in hex over texts and over names and contents of files; bytecode does not count."""
    hashed = hashlib.sha256()
    for each in of:
        if isinstance(each, str):
            hashed.update(each.encode())
            continue
        for file in sorted(each.rglob("*")) if each.is_dir() else [each]:
            if file.is_file() and "__pycache__" not in file.parts:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                hashed.update(f"{file.relative_to(PROJECT)} {content}\n".encode())
    return hashed.hexdigest()


def _base(place: Path, tell: Callable[[str], None]) -> None:
    """An image of the machine's distribution with Python, from debootstrap."""
    if _buildah(place, "images", "--quiet", "--filter", f"reference={BASE}"):
        return
    tell("making the base image with debootstrap: about a minute, once")
    tree = place / "base"
    shutil.rmtree(tree, ignore_errors=True)
    words = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", distribution(), str(tree)]
    subprocess.run([*words, mirror()], check=True, stdout=subprocess.DEVNULL)
    _from_tree(place, tree, BASE, "--cmd", "/bin/sh")
    shutil.rmtree(tree)


def _pause(place: Path) -> None:
    """The image whose process keeps a pod's namespaces."""
    tree = place / "pause"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    compiler = ["gcc", "-static", "-O2", "-x", "c", "-o", str(tree / "pause"), "-"]
    subprocess.run(compiler, check=True, input=PAUSE_SOURCE, text=True)
    _from_tree(place, tree, PAUSE, "--entrypoint", '["/pause"]', "--user", "65535:65535")
    shutil.rmtree(tree)


def _from_tree(place: Path, tree: Path, name: str, *config: str) -> None:
    container = _buildah(place, "from", "scratch")
    _buildah(place, "copy", "--quiet", container, str(tree), "/")
    _buildah(place, "config", *config, container)
    _buildah(place, "commit", "--quiet", "--rm", container, name)


def _buildah(place: Path, *words: str) -> str:
    """What buildah prints. Raises RuntimeError with what it said if it failed."""
    nofile = min(os.sysconf("SC_OPEN_MAX"), 20_000)
    (place / "storage.conf").write_text(STORAGE.format(place=place))
    (place / "containers.conf").write_text(CONTAINERS.format(nofile=nofile))
    here = {
        "CONTAINERS_STORAGE_CONF": str(place / "storage.conf"),
        "CONTAINERS_CONF": str(place / "containers.conf"),
    }
    own_mounts = ("unshare", "--mount")  # its storage leaves one
    command = [*own_mounts, "buildah", *words]
    ended = subprocess.run(command, env={**os.environ, **here}, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"buildah {words[0]} failed: {ended.stderr[-2000:]}{ended.stdout[-2000:]}")
    return ended.stdout.strip()


def _pip_files() -> list[str]:
    """The machine's configuration of pip, the user's too, and the directories of packages that it names."""
    told = subprocess.run(["pip", "config", "list"], capture_output=True, text=True).stdout
    named = [word.removeprefix("file://") for word in told.replace("'", " ").replace("\\n", " ").split()]
    directories = {str(Path(word).parent) if word.endswith("/simple") else word for word in named}
    listed = [*PIP_FILES, str(Path("~/.config/pip").expanduser()), *sorted(directories)]
    found = [path for path in listed if path.startswith("/") and Path(path).exists()]
    return [path for path in dict.fromkeys(found) if Path(path).is_dir() or path not in directories]
