"""Has imported cachd, and forks a process of it for each request: `python -m tests.ground.fork_server FD`.

tests/ground/program.py has the client and says why. A request is one message on the socket FD: JSON of the
arguments, the environment and the directory, with the descriptors that the process gets as 0, 1 and 2. The
answer is its process id. The process is a child of the client, which waits for it as for any other child: the
parent of the fork ends at once, while the client adopts orphans (man 2 PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
import time
from typing import Any

import cachd

MAX_REQUEST_BYTES = 1 << 18
STANDARD = 3  # descriptors: input, output, errors


def imported() -> None:
    """Import what a daemon and a command import, so that no process does."""
    for module in pkgutil.walk_packages(cachd.__path__, "cachd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("uvicorn.loops.uvloop", "uvicorn.protocols.http.httptools_impl", "uvicorn.lifespan.on"):
        importlib.import_module(name)
    alive = os.listdir("/proc/self/task")
    assert len(alive) == 1, f"a fork would lose {len(alive) - 1} threads"


def serve(connection: socket.socket) -> dict[str, Any]:
    """Fork for each request until the client is gone. Returns in each new process: what it must become."""
    while True:
        said, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, STANDARD)
        if not said:
            sys.exit()
        parent = os.fork()
        if not parent:
            child = os.fork()
            if not child:
                for number, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, number)
                connection.detach()
                os.closerange(STANDARD, os.sysconf("SC_OPEN_MAX"))
                return dict(json.loads(said))
            connection.send(str(child).encode())
            os._exit(0)
        os.waitpid(parent, 0)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(b"adopted")


def become(asked: dict[str, Any]) -> None:
    """Run `python -m cachd` as the process that was asked for."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["env"])
    time.tzset()
    os.chdir(asked["cwd"])
    sys.argv = ["cachd", *asked["arguments"]]
    runpy.run_module("cachd", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client's
    imported()
    gc.freeze()  # else each collection in a process would copy pages
    client = socket.socket(fileno=int(sys.argv[1]))
    client.send(b"imported")
    become(serve(client))
