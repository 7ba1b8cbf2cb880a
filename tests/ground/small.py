"""A small disk and a few models on it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin

if TYPE_CHECKING:
    from tests.conftest import Engine

MIB = 1 << 20
PATIENCE_SECONDS = 120
Engines = Callable[..., "Engine"]
Nodes = Callable[..., Node]
Disks = Callable[..., Path]


class Small:
    """Files that an origin holds, and an engine that pulls them under short names."""

    def __init__(self, engine: Engine, origin: Origin) -> None:
        self.engine, self.origin = engine, origin

    def add(self, name: str, size: int = 8 * MIB) -> str:
        return self.origin.add(f"/{name}", noise(size, seed=sum(name.encode())))

    def pull(self, name: str, size: int = 8 * MIB) -> None:
        self.engine.pull(self.add(name, size))

    def age(self, name: str, seconds: float) -> None:
        """Let the last use of a model be so long ago."""
        uses = self.engine.store.usage_log
        uses._by_name.pop(name, None)
        uses.used(name, time.time() - seconds)

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.engine.store.names.all()]


def on_disk(*directories: Path) -> int:
    """Bytes allocated in the files below, each inode once, as du counts them."""
    found = subprocess.run(
        ["find", *directories, "-type", "f", "-printf", "%i %b\n"], capture_output=True, text=True, check=True
    )
    return sum(int(line.split()[1]) * 512 for line in set(found.stdout.splitlines()))


def ready_names(running: Node) -> list[str]:
    return sorted(path.stem for path in (running.root / "ready").glob("*.json"))
