"""The programs of the node: found on PATH or in a cache directory, else built from Debian's source package.

Debian ships etcd, containerd and runc, but neither an API server nor a kubelet. Its source package
`kubernetes` of bookworm has the whole of Kubernetes 1.20 with all that it imports, so that its Go compiles it
without a network.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.ground.helm import INSTALL as INSTALL_HELM
from tests.ground.helm import helm_binary

PROJECT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("CACHD_KUBE") or "/opt/cachd-test-kube")
VERSION, COMMIT = "v1.20.2", "faecb196815e248d3ecfb03c680a4507229c2a56"
BUILT = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
CNI = Path("/usr/lib/cni")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SOURCES = Path("/etc/apt/sources.list.d"), Path("/etc/apt/sources.list")
# Program or file, and the Debian package that brings it.
TO_RUN = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "runc": "runc",
    str(CNI / "bridge"): "containernetworking-plugins",
    "conntrack": "conntrack",
    "iptables": "iptables",
    "openssl": "openssl",
    "kubectl": "kubernetes-client",
    "mkfs.ext4": "e2fsprogs",
    "unshare": "util-linux",
    "ip": "iproute2",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "gcc": "gcc",
}
TO_BUILD = {
    "go": "golang-go",
    "dpkg-source": "dpkg-dev",
    "rsync": "rsync",
    "make": "make",
    "/usr/share/gocode/src/github.com/modern-go/reflect2": "golang-github-modern-go-reflect2-dev",
    str(KEYRING): "debian-archive-keyring",
}
APT = """
Dir::Etc::sourcelist "{place}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State "{place}/state";
Dir::State::lists "{place}/lists";
Dir::State::status "{place}/state/status";
Dir::Cache "{place}/cache";
APT::Sandbox::User "root";
"""


def found(name: str) -> str | None:
    """The path of a program of Kubernetes: on PATH, else in the cache directory."""
    beside = CACHE / name
    return shutil.which(name) or (str(beside) if os.access(beside, os.X_OK) else None)


def are_built() -> bool:
    return all(map(found, BUILT))


def unbuilt() -> str:
    """Which programs are still to be built; nothing if all are here."""
    absent = [name for name in BUILT if not found(name)]
    return f"not in {CACHE}: {', '.join(absent)}; make test-kube builds them" if absent else ""


def lacking() -> str:
    """One line with what this machine lacks to run the cases, and how to get it; nothing if it has all."""
    if os.geteuid():
        return "it needs root: it mounts disks and starts a kubelet"
    if not shutil.which("apt-get"):
        return "it needs Debian: the programs of the node are its packages"
    absent = _absent(TO_RUN) | (set() if are_built() else _absent(TO_BUILD))
    if absent:
        return f"packages are absent: apt-get install --no-install-recommends {' '.join(sorted(absent))}"
    return "" if helm_binary() else f"helm is absent: {INSTALL_HELM}"


def _absent(wanted: dict[str, str]) -> set[str]:
    return {
        package
        for name, package in wanted.items()
        if not (Path(name).exists() if name.startswith("/") else shutil.which(name))
    }


def build(tell: Callable[[str], None]) -> None:
    """Put the programs of `BUILT` into the cache directory, unless they are there. About 15 minutes, 4 GB."""
    if are_built():
        return
    place = CACHE / "build"
    place.mkdir(parents=True, exist_ok=True)
    tree = _source(place, tell)
    environment = _go(place, tree)
    absent = [each for each in BUILT if not found(each)]
    tell(f"compiling {', '.join(absent)}")
    with (place / "make.log").open("w") as log:
        words = ["make", f"WHAT={' '.join(f'cmd/{name}' for name in absent)}"]
        subprocess.run(words, cwd=tree, env=environment, check=True, stdout=log, stderr=log)
    for name in absent:
        half = CACHE / f".{name}"
        shutil.copy(tree / "_output/local/bin/linux/amd64" / name, half)
        half.rename(CACHE / name)
    subprocess.run(["chmod", "-R", "u+w", str(place)], check=True)
    shutil.rmtree(place)


def _source(place: Path, tell: Callable[[str], None]) -> Path:
    """The source tree, unpacked, by a state of apt beside the machine's own, which stays as it is."""
    tree = place / "src"
    if (place / "unpacked").exists():
        return tree
    tell("fetching Kubernetes' source package")
    apt = place / "apt"
    for directory in ("lists/partial", "cache/archives/partial", "state"):
        (apt / directory).mkdir(parents=True, exist_ok=True)
    (apt / "state/status").touch()
    (apt / "sources.list").write_text(f"deb-src [signed-by={KEYRING}] {mirror()} bookworm main\n")
    (apt / "apt.conf").write_text(APT.format(place=apt))
    environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
    get = ["apt-get", "-qq"]
    subprocess.run([*get, "update"], env=environment, check=True)
    subprocess.run([*get, "source", "--download-only", "kubernetes"], cwd=place, env=environment, check=True)
    tell("unpacking it")
    shutil.rmtree(tree, ignore_errors=True)
    (described,) = place.glob("kubernetes_*.dsc")
    unpack = ["dpkg-source", "--no-check", "-x", described.name, "src"]
    subprocess.run(unpack, cwd=place, check=True, stdout=subprocess.DEVNULL)
    _replace_reflect2(tree)
    (place / "unpacked").touch()
    return tree


def _replace_reflect2(tree: Path) -> None:
    """Its reflect2 1.0.1 crashes the API server if Go 1.18 or later compiled it; Debian's 1.0.2 does not."""
    vendored = tree / "vendor/github.com/modern-go/reflect2"
    debians = Path("/usr/share/gocode/src/github.com/modern-go/reflect2")
    for directory in (vendored, debians):
        for file in [*directory.glob("*.go"), *directory.glob("*.s")]:
            file.unlink() if directory == vendored else shutil.copy(file, vendored)


def _go(place: Path, tree: Path) -> dict[str, str]:
    """The environment in which Kubernetes' make compiles without a network, and states its version."""
    inside = tree / ".go/src/k8s.io"
    inside.mkdir(parents=True, exist_ok=True)
    if not (inside / "kubernetes").is_symlink():
        (inside / "kubernetes").symlink_to("../../..")
    (place / "home").mkdir(exist_ok=True)
    _, minor, _ = VERSION.split(".")
    return {
        **os.environ,
        "GOPATH": str(tree / ".go"),
        "CGO_ENABLED": "0",
        "GOFLAGS": "-tags=providerless,dockerless",  # without clouds and Docker, a tenth less to compile
        "GOTOOLCHAIN": "local",
        "GOPROXY": "off",
        "GOCACHE": str(place / "gocache"),
        "HOME": str(place / "home"),
        "KUBE_GIT_VERSION": VERSION,
        "KUBE_GIT_MAJOR": "1",
        "KUBE_GIT_MINOR": minor,
        "KUBE_GIT_TREE_STATE": "clean",
        "KUBE_GIT_COMMIT": COMMIT,
    }


@functools.cache
def mirror() -> str:
    """The Debian mirror that this machine uses. Raises LookupError if apt names none."""
    return first_mirror(_texts(SOURCES))


def first_mirror(sources: Iterable[str]) -> str:
    """The first address of a repository in sources of apt, of either form. Raises LookupError."""
    for text in sources:
        if named := re.search(r"^(?:URIs:|deb(?: \[.*?\])?) *(\S+://\S+)", text, re.MULTILINE):
            return named[1]
    raise LookupError("no mirror is named in /etc/apt")


def _texts(places: Iterable[Path]) -> Iterable[str]:
    for place in places:
        for file in (
            sorted(place.glob("*.sources")) + sorted(place.glob("*.list")) if place.is_dir() else [place]
        ):
            if file.is_file():
                yield file.read_text()


def distribution() -> str:
    """The code name of the machine's Debian, such as bookworm."""
    told = Path("/etc/os-release").read_text()
    named = re.search(r"^VERSION_CODENAME=(\w+)", told, re.MULTILINE)
    return named[1] if named else "bookworm"
