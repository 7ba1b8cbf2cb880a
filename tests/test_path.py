"""The path of a model: its file where it is one file, its directory where it is several."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ground.models import noise
from tests.ground.program import CACHD
from tests.ground.site import Ground, until
from tests.test_cli import assert_failed

SPLIT = {f"q4/model-{number:05}-of-00003.gguf": noise(1000, number) for number in (1, 2, 3)}
SEVERAL = {"config.json": b"{}", "model.safetensors": noise(1000, 9)}


@pytest.fixture
def models(ground: Ground) -> Ground:
    """A node with `one`, `split` and `several`."""
    ground.hub.add("org/gguf", {"README.md": b"read me", "m[q4].gguf": noise(1000, 4), **SPLIT})
    ground.hub.add("org/several", SEVERAL)
    for name, ref in {
        "one": "org/gguf/m[q4].gguf",
        "split": "org/gguf/q4/",
        "several": "org/several",
    }.items():
        ground.node.pull(ref, name=name)
        assert ground.node.ready(name).status == 200
    return ground


FILES = {"one": "models/one/m[q4].gguf", "split": f"models/split/{min(SPLIT)}", "several": None}


@pytest.mark.parametrize(("name", "file"), FILES.items(), ids=FILES)
def test_documents_tell_the_file_of_a_model_of_one_file(models: Ground, name: str, file: str | None) -> None:
    """Relative to the root where pods read it, absolute on the node as `path` is."""
    root = models.node.root
    shown = models.show(name)
    assert (shown["path"], shown["file"]) == (f"{root}/models/{name}", file and f"{root}/{file}")
    for ready in (shown["ready"], models.node.ready(name).document, ready_file(root, name)):
        assert (ready["path"], ready["file"]) == (f"models/{name}", file)


@pytest.mark.parametrize(("name", "file"), FILES.items(), ids=FILES)
def test_path_prints_the_file_or_else_the_directory_with_and_without_a_daemon(
    models: Ground, name: str, file: str | None
) -> None:
    root = models.node.root
    printed = f"{root / (file or f'models/{name}')}\n"
    alone = ("--cache", str(root), "--server", "http://127.0.0.1:1")
    for words in ((), alone):
        ended = models.node.cli("path", name, *words)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, printed, "")
        assert Path(ended.stdout.strip()).exists()
        ended = models.node.cli("path", name, "--file", *words)
        if file:
            assert (ended.returncode, ended.stdout) == (0, printed)
        else:
            assert_failed(ended, 3, "several_files")
            assert f"{root}/models/{name}" in ended.stderr
        told = json.loads(models.node.cli("path", name, "-o", "json", *words).stdout)
        assert (told["path"], told["file"]) == (f"{root}/models/{name}", file and f"{root}/{file}")


def test_a_pod_gets_the_path_of_its_own_mount(models: Ground, tmp_path: Path) -> None:
    mount = tmp_path / "cache"
    mount.symlink_to(models.node.root)
    ended = models.node.cli("path", "one", "--cache", str(mount))
    assert ended.stdout == f"{mount}/models/one/m[q4].gguf\n"
    assert models.node.cli("path", "one", CACHD_CACHE=str(mount)).stdout == ended.stdout
    assert Path(ended.stdout.strip()).read_bytes() == noise(1000, 4)


def test_show_names_the_file_of_a_model_of_one_file(models: Ground) -> None:
    lines = models.node.cli("show", "one").stdout.splitlines()
    assert f"file {models.node.root}/{FILES['one']}" in [" ".join(line.split()) for line in lines]
    assert not any(
        line.startswith("file ") for line in models.node.cli("show", "several").stdout.splitlines()
    )


def test_an_engine_is_given_what_pull_wait_and_path_print(models: Ground, tmp_path: Path) -> None:
    """`-m $(…)` with the last line of any of them opens the file."""
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/sh\n[ "$1" = -m ] && [ -f "$2" ] && cat "$2"\n')
    engine.chmod(0o755)
    root = tmp_path / "direct"
    root.mkdir(mode=0o755)
    ways = [
        "cachd pull 'org/gguf/m[q4].gguf' --name one --wait | tail -1",
        "cachd wait one | tail -1",
        "cachd path one",
        f"cachd path one --cache {models.node.root}",
        f"cachd pull 'org/gguf/m[q4].gguf' --name one --direct --root {root} --allow 127.0.0.0/8 | tail -1",
    ]
    env = {"CACHD_SERVER": models.node.url, "CACHD_HF_ENDPOINT": models.hub.url, "CACHD_RESERVE_FREE": "0"}
    for way in ways:
        line = f'cachd() {{ {shlex.join(CACHD)} "$@"; }}; {engine} -m "$({way})"'
        ended = subprocess.run(["sh", "-c", line], env={**os.environ, **env}, capture_output=True)
        assert ended.stdout == noise(1000, 4), (way, ended.stderr)


def test_pull_without_wait_prints_the_directory_even_when_the_model_is_ready(models: Ground) -> None:
    """What it prints does not hang on how far the pull is."""
    ended = models.node.cli("pull", "org/gguf/m[q4].gguf", "--name", "one")
    assert ended.stdout == f"{models.node.root}/models/one\n"


def test_the_path_of_a_model_that_is_unknown_is_3_and_of_one_on_its_way_is_4(ground: Ground) -> None:
    root = ground.node.root
    assert_failed(ground.node.cli("path", "nobody"), 3, "no_such_model")
    assert_failed(ground.node.cli("path", "nobody", "--cache", str(root)), 3, "no_such_model")
    with ground.held("underway.bin"):
        assert_failed(ground.node.cli("path", "underway.bin"), 4, "not_ready")
        assert ground.show("underway.bin")["file"] is None
    assert ground.node.ready("underway.bin").status == 200


def test_the_path_of_a_name_or_in_a_cache_that_is_none_is_2(ground: Ground, tmp_path: Path) -> None:
    assert_failed(ground.node.cli("path", "../x", "--cache", str(ground.node.root)), 2, "bad_name")
    assert_failed(ground.node.cli("path", "x", "--cache", str(tmp_path / "nowhere")), 2, "bad_root")


@pytest.mark.parametrize(
    "told",
    [b"", b"{", b"[]", b"{}", {"file": 1}, {"file": "models/one/../../etc/passwd"}, {"file": "/etc/passwd"}],
    ids=str,
)
def test_a_ready_file_that_lies_gives_no_path(models: Ground, tmp_path: Path, told: Any) -> None:
    (tmp_path / "ready").mkdir()
    content = told if isinstance(told, bytes) else json.dumps({**ready_file(models.node.root, "one"), **told})
    (tmp_path / "ready/one.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_failed(models.node.cli("path", "one", "--cache", str(tmp_path)), 1, "ready_file_unreadable")


def test_with_the_mount_alone_a_model_on_its_way_is_4_and_one_that_failed_for_good_says_why(
    ground: Ground,
) -> None:
    root = str(ground.node.root)
    with ground.held("on-its-way.bin"):
        assert_failed(ground.node.cli("path", "on-its-way.bin", "--cache", root), 4, "not_ready")
    ground.node.pull(f"{ground.origin.url}/absent.bin", name="absent.bin")
    assert ground.node.ready("absent.bin").status == 404
    status = ground.node.root / "status/absent.bin.json"
    until(lambda: json.loads(status.read_bytes())["final"])
    assert_failed(ground.node.cli("path", "absent.bin", "--cache", root), 3, "file_not_found")


def ready_file(root: Path, name: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((root / f"ready/{name}.json").read_bytes())
    return told
