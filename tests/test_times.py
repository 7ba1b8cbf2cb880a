"""The modification times of published files and directories follow from their content alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.kernel.content_time import content_time
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import Ground
from tests.test_scrub import flip, verify

Engines = Callable[..., Engine]
LARGE = noise((5 << 20) + 7)
FILES = {"config.json": b"{}", "model.safetensors": LARGE, "sub/empty.txt": b"", "sub/vocab.txt": noise(5000)}


def times(top: Path) -> dict[str, float]:
    """The time of a model's directory, and of all below it."""
    top = top.resolve()
    return {str(p.relative_to(top)): p.stat().st_mtime for p in (top, *top.rglob("*"))}


def test_every_node_and_every_pull_has_the_same_times(
    hub: Hub, origin: Origin, root: Path, engine: Engines, tmp_path: Path
) -> None:
    commit = hub.add("org/m", FILES)
    web = origin.add_model("m", FILES)
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    first = engine(hf_endpoint=hub.url)
    first.pull("hf://org/m", name="m")
    first.pull("hf://org/m", name="part", include=("*.txt",))
    second = engine(root=other, hf_endpoint=hub.url, streams=1)
    second.pull(web, name="web")
    second.pull("hf://org/m", name="m")
    there = times(root / "models/m")
    assert times(other / "models/m") == there
    for path in FILES:
        assert (other / "models/web" / path).stat().st_mtime == there[path]
    snapshot = f"hub/models--org--m/snapshots/{commit}"
    assert times(root / snapshot) == times(other / snapshot)
    assert len({there[path] for path in FILES}) == len(FILES)
    assert all(time.gmtime(each).tm_year in range(1980, 2015) for each in there.values())


def test_a_repaired_model_has_its_times_again(ground: Ground) -> None:
    ground.hub.add("org/m", FILES)
    ground.node.pull("hf://org/m", name="m")
    ground.node.ready("m")
    before = times(ground.node.root / "models/m")
    flip(ground.node.root / "models/m/model.safetensors", at=1000)
    assert verify(ground, "m")["damaged"]
    assert ground.node.ready("m").status == 200
    assert times(ground.node.root / "models/m") == before


@pytest.mark.parametrize("at", [0, 1, len(LARGE) // 2, len(LARGE) - 1])
def test_another_content_of_the_same_size_has_another_time(at: int) -> None:
    """Of a large file only samples count: these bytes are among them, as in weights that were trained on."""
    other = bytearray(LARGE)
    other[at : at + 100_000] = os.urandom(len(other[at : at + 100_000]))
    found = {
        content_time(len(LARGE), lambda start, count, of=of: of[start : start + count])
        for of in (LARGE, bytes(other))
    }
    assert len(found) == 2
