"""What a writer on an allowed share tries."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachd.model import MAX_FILES
from tests.attacks.target import Target, attack, outcome
from tests.attacks.test_leases import PROMPT_SECONDS, leased
from tests.attacks.test_share import swapped

SECRET = b"a secret beside the share"


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


@contextmanager
def nested(top: Path, depth: int) -> Iterator[None]:
    """Directories below `top`, one in the other, deeper than Python calls."""
    at = os.open(top, os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=at)
        above, at = at, os.open("d", os.O_DIRECTORY, dir_fd=at)
        os.close(above)
    os.close(at)
    try:
        yield
    finally:
        subprocess.run(["rm", "-rf", top / "d"], check=True)  # shutil.rmtree calls itself


@attack("endless-share")
def directories_without_end_and_links_that_lead_round(target: Target) -> None:
    for name in ("deep", "round", "many"):
        (target.share / f"attack-{name}").mkdir()
    (target.share / "attack-deep/x").write_bytes(b"x")
    for name, to in {"a": "b", "b": "a"}.items():
        (target.share / "attack-round" / name).symlink_to(to)
    try:
        with nested(target.share / "attack-deep", 1500):
            target.pull(f"file://{target.share}/attack-deep/", "attack-deep")
            assert outcome(target, "attack-deep") == "ready"
        for path in ("attack-round/", "attack-round/a"):
            target.pull(f"file://{target.share}/{path}", "attack-round")
            found = outcome(target, "attack-round")
            assert found in ("waiting", "unsafe_path"), (path, found)
            target.delete("attack-round")
        for number in range(target.many(MAX_FILES + 10)):
            (target.share / f"attack-many/{number}").mkdir()
        target.pull(f"file://{target.share}/attack-many/", "attack-many")
        found = outcome(target, "attack-many")
        assert found == "too_many_files" or target.short, found
    finally:
        subprocess.run(["rm", "-rf", *target.share.glob("attack-*")], check=True)


@attack("leases-of-a-share")
def a_lease_on_a_file_that_is_to_be_pulled(target: Target) -> None:
    """Its pull asks again until the lease is over; another pull of the share ends meanwhile."""
    for name in ("attack-leased", "attack-free"):
        (target.share / name).write_bytes(name.encode())
    began = time.monotonic()
    with leased("write", [target.share / "attack-leased"]):
        target.pull(f"file://{target.share}/attack-leased", "attack-leased")
        assert outcome(target, "attack-leased") == "waiting"
        target.pull(f"file://{target.share}/attack-free", "attack-free")
        assert outcome(target, "attack-free") == "ready"
        assert time.monotonic() - began < PROMPT_SECONDS
    assert target.ended("attack-leased").status == 200


@attack("told-link")
def links_that_lead_out_to_what_is_there_and_what_is_not(target: Target) -> None:
    outside, model = target.share.parent / "outside", target.share / "attack-link"
    outside.mkdir()
    model.mkdir()
    (outside / "here").write_bytes(b"x")
    for name, asked in {"x": "x", "y": "", "SHA256SUMS": ""}.items():
        told = set()
        for to in ("here", "absent", "here/below", "absent/below", "."):
            (model / name).symlink_to(outside / to)
            target.pull(f"file://{model}/{asked}", "attack-link")
            answer = target.ended("attack-link")
            assert (answer.status, answer.document["code"]) == (403, "path_refused"), (to, answer)
            told.add(str(target.ask("GET", "/v1/models/attack-link").document["pull"]["error"]))
            assert "outside" not in f"{told}{answer}{target.node.cli('show', 'attack-link').stdout}"
            target.delete("attack-link")
            (model / name).unlink()
        assert len(told) == 1, told
