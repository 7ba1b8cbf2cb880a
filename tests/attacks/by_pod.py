"""What a pod tries that has the mount, read-only, and any uid: here the daemon's own."""

from __future__ import annotations

import subprocess
import sys

from tests.attacks.target import Target, attack

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
