"""A root of an earlier version is opened with all that it holds, and one of a later version is refused.

tests/roots has roots that earlier versions left behind, one for each day on which the files of a root changed
most. Each has a model of the Hub that is pinned (`org--model`), a file without a digest (`loose`), and a pull
that was under way (`late`).
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cachd import __version__
from cachd.errors import Invalid
from cachd.store.disk_store import DiskStore
from cachd.store.layout import EARLIER_NAMES
from tests.ground.node import PATIENCE_SECONDS, Node
from tests.ground.program import CACHD, run
from tests.ground.stored import SMALL, A, assert_whole, publish

PROJECT = Path(__file__).parent.parent
ROOTS = sorted((PROJECT / "tests/roots").glob("*.tar.xz"))
AS_IT_IS: Any = {"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
CONFIG, COMMIT = b'{"a": 1}', "362cedc7c581f446c8d6e9a2df60619f6bafd598"
WEIGHTS_SHA256 = "0ff3b7458f733a358332c1f79d2eef1ab43c822112d7defa02340062edd34031"


@pytest.fixture(params=ROOTS, ids=lambda path: path.name.partition(".")[0])
def old(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A root as an earlier version left it."""
    with tarfile.open(request.param) as packed:
        packed.extractall(tmp_path, **AS_IT_IS)
    root = tmp_path / "root"
    root.chmod(0o755)
    assert (root / ".cachd/format").read_text() == "cachd 1\n"
    return root


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_root_of_an_earlier_version_is_opened_with_its_models_pins_and_pulls(old: Path) -> None:
    loose = sha256(old / "models/loose/loose.bin")
    with Node(old, {"retries": 0}) as node:
        shown = node.ask("GET", "/v1/models/org--model").document
        assert (shown["state"], shown["verified"], shown["pinned"]) == ("ready", True, True)
        assert node.ask("GET", "/v1/models/loose").document["state"] == "ready"
        late = node.ask("GET", "/v1/models/late").document  # its origin is gone, but not the wish for it
        assert late["ref"].endswith("/sub/late.bin")
        verified = node.cli("verify", "org--model")
        assert verified.returncode == 0, verified.stderr
        assert not [line for line in node.log if "unreadable" in str(line) or line.get("level") == "error"]
    for view in (old / "models/org--model", old / f"hub/models--org--model/snapshots/{COMMIT}"):
        assert (view / "config.json").read_bytes() == CONFIG
        assert sha256(view / "model.safetensors") == WEIGHTS_SHA256
    assert sha256(old / "models/loose/loose.bin") == loose


def test_the_models_of_an_earlier_version_get_what_pods_of_this_one_use(old: Path) -> None:
    with DiskStore(old) as store:
        snapshot = store.names.get("org--model")
        assert snapshot is not None
        assert (old / "models" / snapshot.address / "config.json").read_bytes() == CONFIG
        assert (old / "models/.holds" / snapshot.manifest).is_file()


def test_a_model_of_an_earlier_version_is_removed_to_its_last_blob(old: Path) -> None:
    with DiskStore(old) as store:
        for name in ("org--model", "loose"):
            store.withdraw(name, force=True)
        store.sweep_snapshots()
    files = [path for path in (old / ".cachd").rglob("*") if path.is_file()]
    assert [path for path in files if path.stat().st_size > 1000] == [], "partial downloads among them"


def test_entries_with_earlier_names_are_taken_over_once_and_replace_nothing_newer(root: Path) -> None:
    DiskStore(root).close()
    private = root / ".cachd"
    for before, now in (each.split(" -> ") for each in EARLIER_NAMES):
        if now.endswith(".json"):
            (private / before).write_text("{}")
        else:
            (private / before).mkdir()
            (private / before / "both.began").write_text("7")
            (private / now / "both.began").write_text("1")
            (private / before / "one.began").write_text("2")
    DiskStore(root).close()
    assert (private / "pending/both.began").read_text() == "1"
    assert (private / "pending/one.began").read_text() == "2"
    for before, now in (each.split(" -> ") for each in EARLIER_NAMES):
        assert not (private / before).exists()
        assert (private / now).exists()


def test_a_root_of_a_newer_version_is_refused_before_anything_of_it_changes(root: Path) -> None:
    with DiskStore(root) as store:
        publish(store, SMALL)
    (root / ".cachd/format").write_text("cachd 2\n")
    (root / ".cachd/pending").rmdir()  # as if that version had no such directory
    before = inventory(root)
    with pytest.raises(Invalid) as refusal:
        DiskStore(root)
    assert inventory(root) == before
    assert refusal.value.code == "bad_format"
    assert "format 2, of a newer cachd" in refusal.value.detail
    assert f"cachd {__version__} supports format 1" in refusal.value.detail
    assert "newer version" in refusal.value.hint
    assert_whole(root, "org--model", SMALL, commit=A)


def test_a_daemon_that_meets_a_newer_root_says_so_and_ends(root: Path) -> None:
    DiskStore(root).close()
    (root / ".cachd/format").write_text("cachd 2\n")
    words = [*CACHD, "serve", "--root", str(root), "--listen", "127.0.0.1:0"]
    ended = run(words, env={**os.environ, "CACHD_RESERVE_FREE": "0"}, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 2
    assert "of a newer cachd" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("content", ["", "cachd\n", "cachd 1", "cachd 01\n", "cachd 0\n", "x" * 5000])
def test_what_is_no_format_is_refused_with_the_command_that_restores_it(root: Path, content: str) -> None:
    DiskStore(root).close()
    (root / ".cachd/format").write_text(content)
    with pytest.raises(Invalid, match="no format of cachd") as refusal:
        DiskStore(root)
    command = re.search(r"echo (.+) > (\S+)", refusal.value.hint)
    assert command
    Path(command[2]).write_text(f"{command[1]}\n")
    DiskStore(root).close()


def inventory(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.lstat().st_mode, path.lstat().st_ino) for path in root.rglob("*")
    }
