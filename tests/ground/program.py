"""Runs cachd in a process of its own: `Program` is a `subprocess.Popen`, `run` is a `subprocess.run`.

To import cachd takes a process most of the second in which it starts, and the tests start a thousand. So one
process imports it (tests/ground/fork_server.py) and is forked for each `python -m cachd`. Only imports are
shared: the arguments, the environment, the directory and the standard streams are a process's own, and so are
its status and its signals. Any other command is executed as always, and so is one that imports would see
differently, or that runs on a terminal.
"""

from __future__ import annotations

import atexit
import ctypes
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CACHD = (sys.executable, "-m", "cachd")
PROJECT = Path(__file__).parent.parent.parent
PR_SET_CHILD_SUBREAPER = 36
# Variables that Python, libraries or the dynamic linker read before a request could set them.
READ_AT_IMPORT = (
    *("PYTHON", "LD_", "MALLOC_", "GLIBC_", "FAKETIME", "HF_", "HUGGING"),
    *("LC_", "LANG", "TERM", "COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_"),
)


def inherited() -> object:
    """What a process gets from who starts it: user, groups, limits, mask of modes, namespaces."""
    kept = ("Uid", "Gid", "Groups", "Umask", "Cap", "NoNewPrivs")
    status = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kept)]
    namespaces = sorted(str(path.readlink()) for path in Path("/proc/self/ns").iterdir())
    limits = Path("/proc/self/limits").read_text().splitlines()
    return [limit for limit in limits if "core file" not in limit], status, namespaces  # cachd dumps none


def read_at_import(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(READ_AT_IMPORT)}


class ForkServer:
    """One process that has imported cachd. A client of it is one process; threads take turns."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket, self._turn = ours, threading.Lock()
        self._inherited, self._env, self._owner = inherited(), read_at_import(os.environ), os.getpid()
        command = [sys.executable, "-m", "tests.ground.fork_server", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], cwd=PROJECT, stdin=subprocess.DEVNULL
            )
        assert ours.recv(64) == b"imported"

    def can_start(self, env: Mapping[str, str]) -> bool:
        """Whether its forks are what a process would be that is executed here."""
        return (self._inherited, self._env) == (inherited(), read_at_import(env))

    def started(self, asked: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """The process id of a new child of ours that runs cachd."""
        with self._turn:
            adopt(True)
            try:
                socket.send_fds(self._socket, [json.dumps(asked).encode()], descriptors)
                pid = int(self._socket.recv(64))
                assert self._socket.recv(64) == b"adopted"
            finally:
                adopt(False)
        return pid

    def close(self) -> None:
        """End it, if it is ours: a process that a test forked has the parent's."""
        if os.getpid() == self._owner:
            self._socket.close()
            self._process.wait()


def adopt(whether: bool) -> None:
    """Whether orphans among our descendants become our children."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(whether), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


_servers: list[ForkServer] = []


def server() -> ForkServer:
    """The fork server of this process, started when the first process of cachd is."""
    if not _servers:
        _servers.append(ForkServer())
        atexit.register(_servers[0].close)
    return _servers[0]


class Program(subprocess.Popen[str]):
    """A command with text streams; `python -m cachd` is forked where that makes no difference."""

    def __init__(self, command: Sequence[object], **how: Any) -> None:
        super().__init__([str(word) for word in command], text=True, **how)

    def _execute_child(self, *words: Any) -> None:
        """Start the process: `Popen` calls this when its pipes are made."""
        execute = super()._execute_child
        how = inspect.signature(execute).bind(*words).arguments
        env = {**os.environ} if how["env"] is None else {**how["env"]}
        pipes = [how[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        theirs = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes[:1] + pipes[3::2])]
        is_plain = not (how["preexec_fn"] or how["pass_fds"] or any(map(os.isatty, theirs)))
        if tuple(how["args"][: len(CACHD)]) != CACHD or not is_plain or not server().can_start(env):
            execute(*words)
            return
        asked = {"arguments": how["args"][len(CACHD) :], "env": env, "cwd": str(how["cwd"] or Path.cwd())}
        try:
            self.pid = server().started(asked, theirs)
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]  # as `Popen` does it


def run(command: Sequence[object], *, timeout: float, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, its output captured. Raises subprocess.TimeoutExpired."""
    with Program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
