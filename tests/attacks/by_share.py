"""What a writer on an allowed share tries."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.attacks.target import Target, attack

SECRET = b"a secret beside the share"
SWAP = """
import os, sys
at, link, kept = sys.argv[1:]
print(flush=True)
while True:
    os.rename(at, kept); os.rename(link, at); os.rename(at, link); os.rename(kept, at)
"""


@contextmanager
def swapped(at: Path, link: Path, kept: Path) -> Iterator[None]:
    """A file and a link take turns at a path meanwhile, by another process."""
    with subprocess.Popen([sys.executable, "-c", SWAP, at, link, kept], stdout=subprocess.PIPE) as swapping:
        assert swapping.stdout
        swapping.stdout.readline()
        try:
            yield
        finally:
            swapping.kill()


@attack("swapped-file")
def a_file_swapped_for_a_link_out_of_the_share(target: Target) -> None:
    model, secret = target.share / "attack-swap", target.share.parent / "secret"
    model.mkdir(exist_ok=True)
    secret.write_bytes(SECRET)
    (model / "x").write_bytes(b"p" * len(SECRET))
    (target.share / "link").symlink_to(secret)
    published = set()
    with swapped(model / "x", target.share / "link", target.share / "kept"):
        for _ in range(target.many(100)):
            target.pull(f"file://{model}/", "attack-swap")
            if target.ended("attack-swap").status == 200:
                published.add((target.node.root / "models/attack-swap/x").read_bytes())
            target.delete("attack-swap")
    assert SECRET not in published


@attack("odd-file")
def a_pipe_and_checksums_of_3_gib(target: Target) -> None:
    model = target.share / "attack-odd"
    model.mkdir(exist_ok=True)
    (model / "x").write_bytes(b"x")
    with (model / "SHA256SUMS").open("wb") as opened:
        os.truncate(opened.fileno(), 3 << 30)
    target.pull(f"file://{model}/", "attack-odd")
    assert target.ended("attack-odd").status == 400
    (model / "SHA256SUMS").unlink()
    os.mkfifo(model / "pipe")
    target.pull(f"file://{model}/", "attack-odd")
    assert target.ended("attack-odd").status in (400, 404, 200)
