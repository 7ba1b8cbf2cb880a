"""An inference pod's view of the cache: read-only, as another user, in its own mount namespace, offline.

    host                            pod
    root[/subpath]  -rbind, ro->    $CACHE                 what kubelet makes of a read-only hostPath
                     tmpfs          $TMPDIR, $HF_HOME      the only place of its own to write to
                                    HOME=/nonexistent, HF_HUB_CACHE=$CACHE/hub, HF_HUB_OFFLINE=1

Nothing of it is left on the host: the mounts go with the script's process.

How faithful it is depends on what the machine permits; a trial chooses the first of these that works:

    OTHER_USER       root: another uid, no capability. An interpreter below a directory that other users
                     cannot enter (/root) is made reachable with an overlay inside the namespace.
    SAME_USER        root, when that uid cannot read the interpreter's files: uid 0 without capabilities.
                     Modes of root's files are not proved then, everything else is.
    USER_NAMESPACE   not root, or root without CAP_SYS_ADMIN: the test's own user, without capabilities.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import os
import shlex
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

OTHER_UID = 10001
NO_CAPABILITIES = "setpriv --no-new-privs --inh-caps=-all --bounding-set=-all"
KEPT_FLAGS = {  # a remount in a user namespace may not drop what the mount already forbids
    os.ST_NOSUID: "nosuid",
    os.ST_NODEV: "nodev",
    os.ST_NOEXEC: "noexec",
    os.ST_NOATIME: "noatime",
    os.ST_NODIRATIME: "nodiratime",
    os.ST_RELATIME: "relatime",
}
TRIAL = "import numpy, os, safetensors, tokenizers; os.listdir(os.environ['CACHE'])"


class PodRefused(RuntimeError):
    """This machine permits no mount namespace. The message says what was tried, and why it failed."""


class Way(enum.Enum):
    """How a pod is kept apart from the host; see the head of this module."""

    OTHER_USER = enum.auto()
    SAME_USER = enum.auto()
    USER_NAMESPACE = enum.auto()


@contextlib.contextmanager
def pod(
    root: Path,
    script: str,
    *,
    env: Mapping[str, str] | None = None,
    subpath: str | None = None,
    uid: int = OTHER_UID,
    python: str = sys.executable,
    network: bool = True,
) -> Iterator[subprocess.Popen[str]]:
    """A Python `script` running in a pod that mounts `root`, or `root/subpath`, read-only.

    `env` is added to the pod's own few variables; "$CACHE" in a value becomes the mount point, "$SCRATCH" the
    directory to write to. `python`: its interpreter, of a virtual environment that was made by this one.
    Without `network` it has only a loopback.
    Standard input, output and error are pipes. The pod is killed and reaped at the end. Raises PodRefused.
    """
    with _started(
        way(uid), root / (subpath or ""), (python, script), env or {}, uid, network=network
    ) as process:
        yield process


def run_in_pod(
    root: Path,
    script: str,
    *,
    env: Mapping[str, str] | None = None,
    subpath: str | None = None,
    uid: int = OTHER_UID,
    python: str = sys.executable,
    network: bool = True,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run `script` in a `pod` to its end, whatever its status.

    Raises PodRefused, subprocess.TimeoutExpired; `timeout` is in seconds.
    """
    with pod(root, script, env=env, subpath=subpath, uid=uid, python=python, network=network) as process:
        return _finished(process, timeout)


def available() -> bool:
    """Whether pods can be run here; if not, `way` raises the reason."""
    try:
        way()
    except PodRefused:
        return False
    return True


@functools.cache
def way(uid: int = OTHER_UID) -> Way:
    """The most faithful way that works on this machine, tried with a real pod. Raises PodRefused."""
    ways = [Way.OTHER_USER, Way.SAME_USER, Way.USER_NAMESPACE] if os.geteuid() == 0 else [Way.USER_NAMESPACE]
    refusals = []
    for tried in ways:
        try:
            ended = _tried(tried, uid)
        except FileNotFoundError as error:  # no unshare
            refusals.append(f"{tried.name}: {error}")
            continue
        if ended.returncode == 0:
            return tried
        refusals.append(f"{tried.name}: status {ended.returncode}, {ended.stderr.strip()}")
    raise PodRefused("no mount namespace is permitted here, so no pod can be run:\n" + "\n".join(refusals))


def _tried(chosen: Way, uid: int) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as empty:
        Path(empty).chmod(0o755)
        with _started(chosen, Path(empty), (sys.executable, TRIAL), {}, uid) as process:
            return _finished(process, timeout=60)


def _finished(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess("pod", process.returncode, output, errors)


@contextlib.contextmanager
def _started(
    chosen: Way,
    source: Path,
    command: tuple[str, str],
    env: Mapping[str, str],
    uid: int,
    *,
    network: bool = True,
) -> Iterator[subprocess.Popen[str]]:
    """`command`: the interpreter and the script."""
    with tempfile.TemporaryDirectory(prefix="pod-", dir=_enterable_directory()) as place:
        cache, scratch = f"{place}/cache", f"{place}/scratch"
        flags = ["-m", *(["-n"] if not network else []), *(["-Ur"] if chosen is Way.USER_NAMESPACE else [])]
        entry = _entry(chosen, source.resolve(), Path(place), uid)
        if not network:
            entry = f"if command -v ip >/dev/null; then ip link set lo up; fi\n{entry}"
        process = subprocess.Popen(
            ["unshare", *flags, "sh", "-euc", entry, *command],
            cwd="/",
            env=_environment(cache, scratch)
            | {name: env[name].replace("$CACHE", cache).replace("$SCRATCH", scratch) for name in env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:  # closes the pipes, waits
            try:
                yield process
            finally:
                process.kill()


def _entry(chosen: Way, source: Path, place: Path, uid: int) -> str:
    """The shell script that mounts, then becomes the pod's Python: $0 is the interpreter, $1 the script."""
    become = NO_CAPABILITIES
    if chosen is Way.OTHER_USER:
        become = f"setpriv --no-new-privs --reuid={uid} --regid={uid} --clear-groups"
    flags = os.statvfs(source).f_flag
    options = ",".join(["remount", "bind", "ro", *(KEPT_FLAGS[flag] for flag in KEPT_FLAGS if flags & flag)])
    quoted = shlex.quote(str(source))
    return f"""
        cd {shlex.quote(str(place))}
        mount -t tmpfs -o mode=755 pod "$PWD"
        cd "$PWD"
        mkdir cache scratch
        chmod 1777 scratch
        mount --rbind {quoted} cache
        mount -o {options} "$PWD/cache"
        {_opened_doors() if chosen is Way.OTHER_USER else ""}
        cd /
        exec {become} "$0" -c "$1"
    """


def _opened_doors() -> str:
    """Shell lines that let other users through to the interpreter, in this namespace only."""
    closed = _closed_doors()
    outermost = [door for door in closed if not closed & set(door.parents)]
    lines = []
    for number, door in enumerate(sorted(outermost)):
        lines.append(f"mkdir -p .doors/{number}/upper .doors/{number}/work")
        layers = f'"lowerdir={door},upperdir=$PWD/.doors/{number}/upper,workdir=$PWD/.doors/{number}/work"'
        lines.append(f"mount -t overlay -o {layers} door {shlex.quote(str(door))}")
    lines += [f"chmod o+x {shlex.quote(str(door))}" for door in sorted(closed)]
    return "\n".join(lines)


def _closed_doors() -> set[Path]:
    """Directories on the way to the interpreter and its packages that other users cannot enter."""
    needed = [sys.executable, sys.prefix, sys.base_prefix, *site.getsitepackages()]
    paths = {form for path in map(Path, needed) for form in (path, path.resolve())}
    return {door.resolve() for path in paths for door in (path, *path.parents) if _is_closed(door)}


def _is_closed(directory: Path) -> bool:
    return directory.is_dir() and not directory.stat().st_mode & 0o001


def _enterable_directory() -> str:
    """A directory for temporary files which other users can reach."""
    for directory in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if not any(map(_is_closed, (Path(directory), *Path(directory).resolve().parents))):
            return directory
    raise PodRefused("other users can enter none of the directories for temporary files")


def _environment(cache: str, scratch: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {
        "CACHE": cache,
        "HF_HOME": f"{scratch}/huggingface",
        "HF_HUB_CACHE": f"{cache}/hub",
        "HF_HUB_OFFLINE": "1",
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "PYTHONNOUSERSITE": "1",
        "TMPDIR": scratch,
    }


# Scripts. The two functions below run in the pod, from their source; a test may call the first to
# learn what the pod has to find.


def read_model(directory: str) -> dict[str, object]:
    """Load a model as an inference server does, and say what it holds.

    `files` and `tensors` count those of *.safetensors, `bytes` are the tensors' own, `digest` is the SHA-256
    over names and bytes of all of them, `tokens` what the tokenizer makes of a sentence.
    """
    import hashlib
    import json
    from pathlib import Path

    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    model = Path(directory)
    config = json.loads((model / "config.json").read_text())
    tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode("what every pod reads").ids
    shards = sorted(model.glob("*.safetensors"))
    names: set[str] = set()
    size = 0
    digest = hashlib.sha256()
    for shard in shards:
        for name, tensor in sorted(load_file(shard).items()):
            names.add(name)
            size += tensor.nbytes
            digest.update(name.encode())
            digest.update(tensor.tobytes())
    index = model / "model.safetensors.index.json"
    if index.exists():
        assert set(json.loads(index.read_text())["weight_map"]) == names, "the index names other tensors"
    return {
        "model_type": config["model_type"],
        "files": len(shards),
        "tensors": len(names),
        "bytes": size,
        "digest": digest.hexdigest(),
        "tokens": tokens,
    }


def assert_read_only(directory: str) -> None:
    """Try to write below `directory`. Raises AssertionError unless the kernel refuses with EROFS."""
    import errno
    from pathlib import Path

    try:
        Path(directory, "written-by-a-pod").write_bytes(b"x")
    except OSError as error:
        if error.errno == errno.EROFS:
            return
        raise AssertionError(f"{directory} refuses a write, but with {error!r}") from error
    raise AssertionError(f"{directory} can be written to")


_FUNCTIONS = "import json, os\n" + inspect.getsource(read_model) + inspect.getsource(assert_read_only)

# MODEL_DIR, relative to the mount point: prints what `read_model` finds there, as one line of JSON.
LOAD_DIRECTORY = f"""{_FUNCTIONS}
directory = os.path.join(os.environ["CACHE"], os.environ["MODEL_DIR"])
found = read_model(directory)
assert_read_only(directory)
print(json.dumps(found))
"""

# REPO and, if given, REVISION: the same for what huggingface_hub finds offline, and `snapshot`, its path
# relative to the mount point.
LOAD_HUB = f"""{_FUNCTIONS}
from huggingface_hub import snapshot_download
directory = snapshot_download(os.environ["REPO"], revision=os.environ.get("REVISION"))
found = read_model(directory)
assert_read_only(directory)
print(json.dumps(found | {{"snapshot": os.path.relpath(directory, os.environ["CACHE"])}}))
"""
