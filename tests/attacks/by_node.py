"""What another user of the node tries, or of the volume that holds the root."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.attacks.target import Target, attack
from tests.attacks.test_root import GIVEN, OPENED, REPLACED, STRANGER, as_the_kubelet_does, listing
from tests.ground.node import Node
from tests.ground.program import run
from tests.ground.site import until

REFUSED_SECONDS = 30.0


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
