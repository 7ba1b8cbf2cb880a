"""Runs the contract of stores (contract_store.py) on every file system that tests can make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract_store import StoreContract
from tests.ground.disks import MIB, loop


class TestHere(StoreContract):
    """The file system of temporary files, whatever it is."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Path:
        return tmp_path


class TestTmpfs(StoreContract):
    @pytest.fixture
    def disk(self, small_disk: Callable[..., Path]) -> Path:
        return small_disk(64 * MIB)


class _Loop(StoreContract):
    kind: str

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        with loop(tmp_path, self.kind) as mounted:
            yield mounted


class TestExt4(_Loop):
    kind = "ext4"


class TestXfs(_Loop):
    kind = "xfs"


class TestBtrfs(_Loop):
    kind = "btrfs"
