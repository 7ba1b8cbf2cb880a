"""What a pod tries that has the mount, read-only, and any uid: here the daemon's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.attacks.by_node import refusal
from tests.attacks.target import TOKEN, Target, attack
from tests.attacks.test_leases import PROMPT_SECONDS, TRY_ALL, files_below, leased
from tests.ground import pod
from tests.ground.node import PATIENCE_SECONDS

HOLDER = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
opened = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
for descriptor in opened:
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print(flush=True)
sys.stdin.read()
"""


@attack("leases")
def write_leases_on_every_served_file(target: Target) -> None:
    """Another pull ends meanwhile, and nothing waits for the kernel to break a lease."""
    files = [path for path in (target.node.root / "models/org--model").iterdir() if path.is_file()]
    command = [sys.executable, "-c", HOLDER, *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holding:
        assert holding.stdout
        holding.stdout.readline()
        target.pull("hf://org/model", "attack-again")
        assert target.ended("attack-again").status == 200
        target.ask("POST", "/v1/models/org--model/verify", token="the-operator's-own-token")
        assert target.delete("attack-again").status in (200, 204, 409)
        holding.kill()


@attack("private-leases")
def write_leases_on_private_files(target: Target) -> None:
    """The lease on a manifest holds up its own model alone; a start waits for leases and loses nothing."""
    target.pull(target.origin.add("/held", b"held"), "attack-held")
    assert target.ended("attack-held").status == 200
    with leased("write", (target.node.root / ".cachd/manifests").iterdir()):
        began = time.monotonic()
        refused = target.ask("DELETE", "/v1/models/attack-held", token=TOKEN)
        assert refused.status in (409, 503), refused
        target.pull(target.origin.add("/other", b"other"), "attack-other")
        answer = target.ended("attack-other")
        assert answer.status == 200, answer
        assert target.ask("GET", "/v1/models").status == 200
        assert time.monotonic() - began < PROMPT_SECONDS
    assert target.ended("attack-held").status == 200
    with target.another("leased-root") as node:
        node.pull(target.origin.add("/small", b"small"))
        assert node.ready("small").status == 200
        node.kill()
        with leased("write", files_below(node.root, "")) as holder:
            starting = threading.Thread(target=node.start)
            starting.start()
            assert holder.stdout
            assert holder.stdout.readline() == "wanted\n"
            holder.kill()
            starting.join(PATIENCE_SECONDS)
        assert node.ready("small").status == 200


ENTER = """
import os
try:
    print(os.listdir(os.environ["CACHE"] + "/.cachd"))
except PermissionError:
    print("refused")
"""


@attack("private-part")
def another_uid_that_enters_and_holds_leases(target: Target) -> None:
    if pod.way() is not pod.Way.OTHER_USER:
        print("private-part: only root can run a pod as another uid, so this was not tried")
        return
    entered = pod.run_in_pod(target.node.root, ENTER)
    assert entered.stdout == "refused\n", entered
    tried = pod.run_in_pod(target.node.root, TRY_ALL)
    taken, _, found = tried.stdout.split()
    assert (taken, int(found) > 8) == ("0", True), tried.stderr


@attack("daemon-uid")
def pods_that_are_or_become_the_daemons_uid(target: Target) -> None:
    """Decided by the policy's own expressions; whether a cluster has the policy, none can say from here."""
    from tests.test_admission import ADMITTED, REFUSED, changed, refusals

    for name, change in REFUSED.items():
        assert refusals(changed(change)), name
    for name, change in ADMITTED.items():
        assert not refusals(changed(change)), name


def put_there(path: Path, kind: str) -> None:
    """Put something else than a socket there."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_text("precious")


@attack("socket-file")
def other_files_where_the_socket_belongs(target: Target) -> None:
    path = target.node.root.parent / "attacked.sock"
    precious = path.with_name("precious")
    precious.write_text("precious")
    listen = ["127.0.0.1:0", f"unix:{path}"]
    second = target.another("socket-second", listen=listen)
    second.root.mkdir(mode=0o755)
    for kind in ("file", "link", "pipe", "directory"):
        put_there(path, kind)
        before = path.lstat()
        refusal(second, "cannot_listen")
        assert path.lstat() == before
        path.rmdir() if kind == "directory" else path.unlink()
    assert precious.read_text() == "precious"
    with target.another("socket-first", listen=listen) as first:
        refusal(second, "cannot_listen")
        assert first.cli("ls", "--url", f"unix:{path}").returncode == 0
        first.kill()
        assert path.is_socket()
        first.start()
        assert first.cli("ls", "--url", f"unix:{path}").returncode == 0
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
            first.stop()
            assert path.is_socket(), "it is not the one that the daemon made"
