"""A new source (shelf.py) is one module and one value: it keeps the contract and is pulled."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cachd
from cachd.model import Ref
from tests import shelf
from tests.contract_source import FILES, LARGE, OTHER_BYTES, Served, SourceContract
from tests.ground.models import digests


def put(place: Path) -> Path:
    """A directory with the files of the contract."""
    for path, content in FILES.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)
    return place


class TestShelf(SourceContract):
    @pytest.fixture
    def served(self, tmp_path: Path) -> Served:
        llama = put(tmp_path / "llama")
        return Served(
            shelf.ShelfSource(),
            Ref("shelf", str(llama)),
            Ref("shelf", str(tmp_path / "absent")),
            change=lambda: (llama / LARGE).write_bytes(OTHER_BYTES),
        )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of cachd with the new module, and with the new value in the table of schemes."""
    package = tmp_path / "copy/cachd"
    shutil.copytree(Path(cachd.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(shelf.__file__, package / "sources/shelf.py")
    table = package / "model/scheme.py"
    before, start, rest = table.read_text().partition("_ALL = (\n")
    table.write_text(f"{before}{start}    {shelf.SCHEME}\n{rest}")
    return package.parent


def test_one_module_and_one_value_are_a_new_source(copy: Path, tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "cachd", "pull", "--direct", f"shelf://{put(tmp_path / 'llama')}"]
    env = {**os.environ, "PYTHONPATH": str(copy), "CACHD_ROOT": str(root), "CACHD_RESERVE_FREE": "0"}
    subprocess.run([*command, "--name", "llama"], cwd=copy, env=env, check=True, timeout=60)
    assert digests(root / "models/llama") == {p: hashlib.sha256(c).hexdigest() for p, c in FILES.items()}


def test_the_new_scheme_is_in_hints_limits_and_entries(copy: Path) -> None:
    code = """
from cachd.config import Config
from cachd.model import Limits, Typed
from cachd.sources.table import Table
Limits.of(None, [("shelf", 1)])
entries = Config(sources=[{"prefix": "shelf:///a/", "refuse": True}]).sources
try:
    Table(entries).check("shelf:///a/b")
except Exception as error:
    print(error.code)
try:
    Typed.parse("shelf:/a")
except Exception as error:
    print(error.hint)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["source_refused", "did you mean 'shelf:///a'?"]
