"""Checks the kernel's limits for a process: open files and threads."""

from __future__ import annotations

import re
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

from cachd.config import Config
from cachd.doctor.codes import Code
from cachd.doctor.finding import Finding, State, ok
from cachd.errors import CachdError
from cachd.kernel import threads

_PLENTY_OF_FILES = 4096
_FILES_BESIDE_STREAMS = 64
_THREADS_BESIDE_STREAMS = 64  # of pulls, hashing, the API and upkeep


def check_open_files(config: Config, pid: int | None) -> Iterator[Finding]:
    """The limit of open files of the daemon's process, if `pid` is known; else that of this one."""
    limit, whose = _open_files(pid)
    needed = 3 * config.streams + _FILES_BESIDE_STREAMS
    hint = f"ulimit -n {_PLENTY_OF_FILES}; LimitNOFILE={_PLENTY_OF_FILES} in the unit of systemd"
    if limit < needed:
        what = f"{whose} may open {limit} files, and streams: {config.streams} needs {needed}"
        yield Finding(Code.open_files, State.wrong, what, hint)
    elif limit < _PLENTY_OF_FILES:
        what = f"{whose} may open {limit} files: many clients at once may be refused"
        yield Finding(Code.open_files, State.warning, what, hint)
    else:
        yield ok(Code.open_files, f"{whose} may open {limit} files")


def check_threads(config: Config) -> Iterator[Finding]:
    """Whether as many threads can be started as a daemon starts. For when none runs: it starts them."""
    wanted = config.streams + config.pulls + _THREADS_BESIDE_STREAMS
    release = threading.Event()
    started = [threading.Thread(target=release.wait, name="check", daemon=True) for _ in range(wanted)]
    try:
        threads.start(started)
    except CachdError as error:
        running = sum(each.ident is not None for each in started)
        what = f"the system lets this user start {running} threads, and a daemon needs about {wanted}"
        yield Finding(Code.threads, State.wrong, what, error.hint, error=error.code)
        return
    finally:
        release.set()
        for each in started:
            if each.ident is not None:
                each.join()
    yield ok(Code.threads, f"{wanted} threads can be started")


def _open_files(pid: int | None) -> tuple[int, str]:
    """The highest limit that the process can set itself, and which process that is."""
    if pid is not None:
        try:
            text = Path(f"/proc/{pid}/limits").read_text()
        except OSError:
            text = ""
        if found := re.search(r"^Max open files +\S+ +(\d+)", text, re.MULTILINE):
            return int(found[1]), "the daemon"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return (1 << 30 if hard == resource.RLIM_INFINITY else hard), "a process started here"
