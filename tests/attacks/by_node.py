"""What another user of the node tries, or of the volume that holds the root."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.attacks.target import TOKEN, Target, attack
from tests.attacks.test_root import GIVEN, OPENED, REPLACED, STRANGER, as_the_kubelet_does, listing
from tests.ground.node import Node
from tests.ground.program import run
from tests.ground.site import until

REFUSED_SECONDS = 30.0

LISTENS = """
import os, socket, sys
user = int(sys.argv[1])
if user != os.getuid():
    os.setgid(user); os.setuid(user)
listening = socket.socket()
listening.bind(("127.0.0.1", 0)); listening.listen()
print(listening.getsockname()[1], flush=True)
print(listening.accept()[0].recv(65536).decode("latin-1"), flush=True)
"""


def refusal(node: Node, code: str) -> str:
    """What a daemon says that does not start."""
    node.configure(**node.options)
    command = [*node.program, "serve", "--root", str(node.root), "--config", str(node.config)]
    ended = run(command, timeout=REFUSED_SECONDS)
    assert f"code: {code}" in ended.stderr, ended.stderr[-2000:]
    assert ended.returncode != 0
    return " ".join(ended.stderr.split())


def untouched(node: Node) -> str:
    """What a daemon says of its unsafe root, in which it changes nothing."""
    before = listing(node.root)
    said = refusal(node, "unsafe_root")
    assert listing(node.root) == before
    return said


@contextmanager
def running(node: Node) -> Iterator[Node]:
    """The daemon over its root, whose mode stays as it is."""
    node.configure(**node.options)
    try:
        node.start()
        yield node
    finally:
        node.__exit__()


def furnished(target: Target, name: str) -> Node:
    """A daemon that pulled a model into its root, and ended."""
    node = target.another(name)
    with node:
        node.pull(target.origin.add_model("small", {"x": b"small"}))
        assert node.ready("small").status == 200
    return node


def assert_serves(node: Node) -> None:
    with running(node):
        assert node.ready("small").status == 200


@attack("unsafe-root")
def rights_of_others_in_the_root_below_it_and_above(target: Target) -> None:
    node = furnished(target, "open-root")
    for place, mode in [*OPENED.values()][: target.many(40)]:
        path = node.root / place
        path.chmod(mode)
        said = untouched(node)
        assert f"{path} is a " in said
        assert f"of mode {mode:04o} and belongs to {os.getuid()}:" in said
        hint = re.search(r"chmod \d{4} [^\s;,]+", said)
        assert hint, said
        subprocess.run(shlex.split(hint[0]), check=True)
    for place in GIVEN[: target.many(20)] if os.getuid() == 0 else ():
        os.chown(node.root / place, STRANGER, STRANGER)
        assert f"belongs to {STRANGER}:{STRANGER}" in untouched(node)
        os.chown(node.root / place, os.getuid(), os.getgid())
    assert_serves(node)
    above = target.another("above/root")
    above.root.mkdir(parents=True)
    above.root.parent.chmod(0o777)
    assert f"chmod o-w {above.root.parent}" in refusal(above, "unsafe_root")


@attack("replaced-in-root")
def pipes_and_links_where_a_start_reads(target: Target) -> None:
    node = furnished(target, "replaced-root")
    for place, put in [*REPLACED.values()][:: 3 if target.short else 1]:
        path = node.root / place
        kept, real = path.with_name("kept"), path.with_name(f"{path.name}.real")
        if path.is_file():
            os.link(path, kept)
        put(path)
        assert f"{path} is a " in untouched(node)
        path.unlink()
        (real if real.exists() else kept).rename(path)
        kept.unlink(missing_ok=True)
    assert_serves(node)


@attack("open-volume")
def a_group_that_may_write_and_a_directory_that_was_there_first(target: Target) -> None:
    for mode in (0o777, 0o2775):
        node = furnished_in_a_volume(target, mode)
        as_the_kubelet_does(node.root)
        own = node.root / "cachd"
        with running(node):
            assert node.ready("small").status == 200
            until(lambda own=own: not open_to_the_group(own))
        assert not (own / ".cachd").stat().st_mode & 0o077
        assert not (own / ".cachd/format").stat().st_mode & 0o022
        own.rename(node.root / "moved")
        own.symlink_to("moved")
        before = listing(node.root / "moved")
        refusal(node, "bad_root")
        assert listing(node.root / "moved") == before
        own.unlink()
        own.mkdir()
        own.chmod(0o777)
        refusal(node, "unsafe_root")
        if os.getuid() == 0:
            own.chmod(0o755)
            os.chown(own, STRANGER, STRANGER)
            assert f"belongs to {STRANGER}:" in refusal(node, "unsafe_root")


def open_to_the_group(own: Path) -> list[Path]:
    """What the group may still write of what pods load."""
    parts = [own, *(path for name in ("models", "hub", "ready") for path in (own / name).rglob("*"))]
    names = (".holds", "CACHEDIR.TAG")  # empty, and read by nobody who loads a model
    loaded = [path for path in parts if not {path.name, path.parent.name} & {*names}]
    return [path for path in loaded if path.stat().st_mode & 0o022]


def furnished_in_a_volume(target: Target, mode: int) -> Node:
    """A daemon that pulled a model into a directory of its own in a volume of this mode, and ended."""
    root = target.another(f"volume-{mode:o}").root
    root.mkdir()
    root.chmod(mode)
    assert "own_directory" in refusal(target.another(root.name), "unsafe_root")
    node = target.another(root.name, own_directory=True)
    with running(node):
        node.pull(target.origin.add_model("small", {"x": b"small"}))
        assert node.ready("small").status == 200
    assert [path.name for path in root.iterdir()] == ["cachd"]
    return node


def planted(kept: Path) -> dict[str, Callable[[], Any]]:
    """What another user may have put in the place of the last good configuration, by name."""
    document, elsewhere = json.loads(kept.read_text()), kept.parents[2] / "elsewhere.json"
    other = {**document, "keys": {**document["keys"], "own_directory": "true"}}
    cases: dict[str, Callable[[], Any]] = {
        "writable for others": lambda: kept.chmod(0o666),
        "writable for the group": lambda: kept.chmod(0o660),
        "no document": lambda: kept.write_text('{"keys": []'),
        "of another root": lambda: kept.write_text(json.dumps(other)),
        "a link": lambda: (kept.rename(elsewhere), kept.symlink_to(elsewhere)),
        "a pipe": lambda: (kept.unlink(), os.mkfifo(kept, 0o600)),
    }
    if os.getuid() == 0:
        cases["of another user"] = lambda: os.chown(kept, STRANGER, STRANGER)
    return cases


@attack("planted-configuration")
def what_others_wrote_where_a_start_with_a_wrong_file_looks(target: Target) -> None:
    node = furnished(target, "planted-root")
    kept = node.root / ".cachd/last_good.json"
    good = kept.read_bytes()
    node.config.write_text("streams: many")
    command = [*node.program, "serve", "--root", str(node.root), "--config", str(node.config)]
    for case, plant in planted(kept).items():
        plant()
        ended = run(command, timeout=REFUSED_SECONDS)
        said = " ".join(ended.stderr.split())
        assert ended.returncode != 0, case
        assert "last good configuration not used" in said, (case, said)
        kept.unlink()
        kept.write_bytes(good)
        kept.chmod(0o600)
    try:
        node.start()
        assert node.ready("small").status == 200, "what the daemon itself kept is used"
    finally:
        node.__exit__()


def heard_from_an_operator(target: Target, user: int) -> str:
    """What a process of this user hears at the daemon's port from `cachd ls` on the node."""
    place = target.node.root.parent
    with subprocess.Popen(
        [sys.executable, "-c", LISTENS, str(user)], stdout=subprocess.PIPE, text=True
    ) as it:
        try:
            assert it.stdout is not None
            options = {"root": str(place / "absent"), "listen": f"127.0.0.1:{int(it.stdout.readline())}"}
            (place / "token").write_text(TOKEN)
            (place / "taken.yaml").write_text(json.dumps({**options, "token_file": str(place / "token")}))
            ours = {name: value for name, value in os.environ.items() if not name.startswith("CACHD_")}
            env = {**ours, "CACHD_CONFIG": str(place / "taken.yaml")}
            run([*target.node.program, "ls"], env=env, timeout=REFUSED_SECONDS)
            return it.stdout.read()
        finally:
            it.kill()


@attack("taken-port")
def another_user_at_the_port_of_a_daemon_that_is_down(target: Target) -> None:
    assert TOKEN in heard_from_an_operator(target, os.getuid()), "the port of one's own gets it"
    for _ in range(target.many(20) if os.getuid() == 0 else 0):
        heard = heard_from_an_operator(target, STRANGER)
        assert heard.startswith("GET /v1/models")
        assert TOKEN not in heard
