"""A write may take fewer bytes than it was given: the disk fills, or a signal interrupts the call. cachd then
writes the rest at the right offset."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachd.kernel import durable
from tests.faults.children import in_child
from tests.faults.injection import Injection, Plan, Tally
from tests.faults.lives import Life, Origins, digests, known_manifests, left_over, opened, states, visible
from tests.ground.models import noise

KIB = 1 << 10
CUT_SHORT = {
    "the bytes of a file": r"pwrite \.cachd/ingest/.*/data",
    "the description of an ingest": r"pwrite \.cachd/ingest/.*/about\.json",
    "the received bytes of a part": r"write \.cachd/ingest/.*/received",
    "the journal": r"write \.cachd/ingest/.*/journal",
    "a small file": r"pwrite \.cachd/staging/",
    "a manifest": r"pwrite \.cachd/manifests/",
    "a model's ready file": r"pwrite \.cachd/staging/\.c\.json\.new",
    "a branch": r"pwrite hub/.*/refs/",
    "a list of files": r"pwrite hub/.*/trees/",
    "a pending spec": r"pwrite \.cachd/pending/",
}


@pytest.fixture(scope="module")
def origins() -> Iterator[Origins]:
    started = Origins()
    yield started
    started.close()


@pytest.mark.parametrize("point", CUT_SHORT.values(), ids=CUT_SHORT)
def test_a_write_that_is_cut_short_goes_on_where_it_stopped(root: Path, origins: Origins, point: str) -> None:
    def life() -> list[str]:
        tally, known = Tally(), dict[str, dict[str, str]]()
        injection = Injection(root, Plan("short write", 0, point=point), tally)
        with opened(root, origins) as parts:
            pulls = Life(parts, origins, pulled=lambda model: known_manifests(root, model, known))
            pulls.pull("a")
            pulls.pull("c")
            injection.over()
            found = [] if states(parts) == {"m": "ready", "c": "ready"} else [f"states {states(parts)}"]
        found += [] if tally.faults() == {"short write": 1} else [f"faults {tally.faults()}"]
        shown = digests((root / "models/c").resolve())
        found += [] if set(shown) == {"config.json", "model.safetensors"} else [f"shown {shown}"]
        return found + visible(root, known) + left_over(root)

    assert in_child(life).told == []


def test_what_a_file_system_takes_of_a_write_stays_and_the_rest_is_refused_at_its_place(
    tmp_path: Path,
) -> None:
    """The kernel's own short write: a process may write a file up to a limit, and not a byte beyond."""
    content, most = noise(100 * KIB), 40 * KIB + 7

    def life() -> list[str]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
        try:
            durable.write_at(fd, memoryview(content), 0)
        except OSError as error:
            refused = errno.errorcode[error.errno or 0]
        else:
            refused = "nothing"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        durable.write_at(fd, memoryview(content)[most:], most)
        return [refused]

    assert in_child(life).told == ["EFBIG"]
    assert (tmp_path / "file").read_bytes() == content
