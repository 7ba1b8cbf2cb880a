"""What a Kubernetes node does to the daemon, as far as it shows without a cluster."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachd.errors import CachdError
from tests.conftest import Engine
from tests.ground.models import noise
from tests.ground.needs import refuse, require
from tests.ground.origin import Origin
from tests.ground.site import MIB, Ground

Engines = Callable[..., Engine]
Alone = Callable[..., Ground]


@contextmanager
def denied(directory: Path) -> Iterator[None]:
    """The kernel denies every change of a directory to everybody, as a security module would."""
    require("root", "chattr")
    tried = subprocess.run(["chattr", "+i", directory], capture_output=True, text=True)
    if tried.returncode:
        refuse("sealing", tried.stderr)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", directory], check=True)


@pytest.mark.parametrize("place", ["ready", "models/.trees", ".cachd/blobs", ".cachd/manifests"])
def test_what_the_kernel_denies_is_named_and_the_next_pull_succeeds(
    origin: Origin, root: Path, engine: Engines, place: str
) -> None:
    ref = origin.add("/a.bin", noise(1000))
    opened = engine()
    with denied(root / place), pytest.raises(CachdError) as failure:
        opened.pull(ref)
    assert failure.value.code in ("disk_failed", "forbidden"), failure.value
    assert str(root / place) in failure.value.detail
    assert "not permitted" in failure.value.detail
    assert not (root / "ready/a.bin.json").exists()
    assert opened.pull(ref).files == 1


def series(ground: Ground) -> set[str]:
    text = ground.node.ask("GET", "/metrics").document.decode()
    return {re.split(r" [^ ]+$", line)[0] for line in text.splitlines() if not line.startswith("#")}


def test_a_model_has_one_series_while_it_is_ready_and_a_scrape_ends_while_pulls_run(alone: Alone) -> None:
    ground = alone(pulls=8)
    ground.have("first.bin", 1000)
    ground.node.ask("GET", "/v1/models/first.bin")
    before = series(ground)
    for number in range(30):
        ground.origin.add(f"/{number}.bin", noise(MIB, number))
    hold = ground.origin.hold("/0.bin", after=1000)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: ground.node.pull(f"{ground.origin.url}/{n}.bin"), range(30)))
            scraped = list(pool.map(lambda _: series(ground), range(40)))
        assert ground.show("0.bin")["state"] != "ready"
    finally:
        hold.release()
    for number in range(30):
        assert ground.node.ready(f"{number}.bin").status == 200
    named = {line for seen in (*scraped, series(ground)) for line in seen if re.search(r"[0-9]\.bin", line)}
    of_models = ("cachd_model_resident_bytes", "cachd_model_size_bytes")
    of_pulls = ("cachd_pull_done_ratio", "cachd_pull_eta_seconds")
    expected = {(name, f"{number}.bin") for name in of_models for number in range(30)}
    found = {tuple(re.findall(r'^(\w+){model="([^"]+)"}', line)[0]) for line in named}
    assert found >= expected
    assert {name for name, _ in found - expected} <= set(of_pulls), "while a pull runs"
    new = series(ground) - before - named
    assert len(new) < 30, new
    assert ground.node.ask("DELETE", "/v1/models/7.bin").status == 200
    assert not any('"7.bin"' in line for line in series(ground))
