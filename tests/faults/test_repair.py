"""Bytes that are wrong, or that the disk lost, are fetched again, and not one more (C7, E2)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import Corrupt
from cachd.model import Digest, File
from cachd.store.layout import Layout
from tests.conftest import Engine, spec_of
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.origin import Fault, Flip, IgnoreRange, Origin, Swap, Zeroed
from tests.ground.site import until
from tests.ground.strace import injected, needs_strace

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 120.0
Engines = Callable[..., Engine]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def held(origin: Origin, content: bytes) -> str:
    """Let the origin hold `/it`; a ref with its digest."""
    return f"{origin.add('/it', content)}#sha256={sha256(content)}"


def published(root: Path) -> bytes:
    return (root / "models/it/it").read_bytes()


def counted(running: Engine, reason: str) -> int:
    """Bytes that were fetched again for this reason."""
    for line in running.metrics.text().decode().splitlines():
        if line.startswith(f'cachd_refetched_bytes_total{{reason="{reason}"}}'):
            return int(float(line.rpartition(" ")[2]))
    return 0


# --- the source was wrong once ---

DAMAGE: dict[str, Fault] = {
    "a bit": Flip(5 * MIB),
    "a block of zeros": Zeroed(5 * MIB),
    "blocks that changed places": Swap(4 * MIB, 5 * MIB, 4 * KIB),
}


@pytest.mark.parametrize("fault", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_file_that_came_wrong_once_is_fetched_once_more_by_other_connections(
    origin: Origin, root: Path, engine: Engines, fault: Fault
) -> None:
    content = noise(12 * MIB)
    running = engine(streams=2)
    origin.fault(
        "/it", fault, times=1, when=lambda seen: seen.extent is not None and seen.extent[0] == 4 * MIB
    )
    running.pull(held(origin, content))
    assert published(root) == content
    assert origin.bytes_sent() == 2 * 12 * MIB
    assert counted(running, "source") == 12 * MIB
    gets = [seen for seen in origin.requests if seen.method == "GET"]
    assert len(gets) == 6
    assert not {seen.peer for seen in gets[:3]} & {seen.peer for seen in gets[3:]}


def test_a_small_file_that_came_wrong_once_is_fetched_once_more(
    origin: Origin, root: Path, engine: Engines
) -> None:
    running = engine()
    origin.fault("/it", Flip(5), times=1)
    running.pull(held(origin, noise(100 * KIB)))
    assert published(root) == noise(100 * KIB)
    assert origin.bytes_sent() == 200 * KIB
    assert counted(running, "source") == 100 * KIB


def test_a_file_from_an_origin_without_ranges_is_fetched_once_more_too(
    origin: Origin, root: Path, engine: Engines
) -> None:
    class Wrong(IgnoreRange):
        stored = Flip(5 * MIB).stored

    content = noise(12 * MIB)
    origin.fault("/it", IgnoreRange(), times=1)  # the part that finds it out
    origin.fault("/it", Wrong(), times=1)
    origin.fault("/it", IgnoreRange())
    engine(streams=1).pull(held(origin, content))
    assert published(root) == content


def test_a_signed_link_is_not_used_again_for_a_file_that_came_wrong(
    hub: Hub, root: Path, engine: Engines
) -> None:
    content = noise(6 * MIB)
    hub.add("org/it", {"it.bin": content})
    hub.cdn.fault("*", Flip(MIB), times=1)
    engine(hf_endpoint=hub.url, streams=1).pull("hf://org/it", name="it")
    assert (root / "models/it/it.bin").read_bytes() == content
    links = [seen.query for seen in hub.cdn.requests]
    assert len(set(links)) == 2


def test_a_source_that_is_wrong_twice_is_believed_to_be_wrong(
    origin: Origin, root: Path, engine: Engines
) -> None:
    running = engine(streams=2)
    origin.fault("/it", Flip(5 * MIB))
    ref = held(origin, noise(12 * MIB))
    with pytest.raises(Corrupt) as refusal:
        running.pull(ref)
    assert origin.bytes_sent() == 2 * 12 * MIB, "one repair, and no more"
    assert "twice" in refusal.value.hint
    assert not list((root / ".cachd/ingest").iterdir())
    assert b'cachd_verify_failures_total{stage="pull"} 1.0' in running.metrics.text()


def test_a_source_that_is_wrong_in_two_ways_is_not_said_to_repeat_itself(
    origin: Origin, engine: Engines
) -> None:
    running = engine(streams=1)
    for at in (1, 2):
        origin.fault("/it", Flip(at), times=1)
    with pytest.raises(Corrupt) as refusal:
        running.pull(held(origin, noise(100 * KIB)))
    assert "twice" not in refusal.value.hint


def test_an_empty_file_with_the_digest_of_another_is_corrupt(origin: Origin, engine: Engines) -> None:
    with pytest.raises(Corrupt):
        engine().pull(f"{origin.add('/it', b'')}#sha256={sha256(b'x')}")


# --- the disk was wrong ---


def test_only_the_parts_that_the_disk_changed_are_fetched_again(
    origin: Origin, root: Path, engine: Engines
) -> None:
    content = noise(6 * MIB)
    hold = origin.hold("/it", after=3 * MIB)  # in the first part of 4 MiB: the second has 2
    running = engine(streams=2)
    pulled = running.pulls.start(spec_of(held(origin, content)))
    assert pulled is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    (ingest,) = (root / ".cachd/ingest").iterdir()
    until(lambda: (ingest / "journal").exists() and str(6 * MIB) in (ingest / "journal").read_text())
    with (ingest / "data").open("r+b") as data:
        data.seek(5 * MIB)
        data.write(noise(4 * KIB, seed=7))
    hold.release()
    pulled.done.result(PATIENCE_SECONDS)
    assert published(root) == content
    assert origin.bytes_sent() == 8 * MIB, "the second part, and nothing else, came again"
    assert counted(running, "disk") == 2 * MIB
    assert counted(running, "source") == 0
    assert (pulled.progress.done, pulled.progress.fetched) == (6 * MIB, 8 * MIB)


# --- the disk refused ---


@pytest.fixture
def pulled_with(origin: Origin, root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Pulls 24 MiB in parts, by one stream or so many, while a system call on its data fails."""
    content = noise(24 * MIB)
    ref = held(origin, content)
    file = File("it", len(content), ref.partition("#")[0], Digest("sha256", sha256(content)))
    data = Layout(root).ingest(file.blob, file.size) / "data"

    def pull(fault: str, streams: int = 1) -> subprocess.CompletedProcess[str]:
        told = {"CACHD_ALLOW": "127.0.0.0/8", "CACHD_STREAMS": str(streams), "CACHD_RESERVE_FREE": "0"}
        env = {**os.environ, **told}
        command = [sys.executable, "-m", "cachd", "pull", ref, "--name", "it", "--direct"]
        command += ["--root", str(root)]
        return subprocess.run(
            injected(command, fault, on=data), env=env, capture_output=True, text=True, timeout=120
        )

    return pull


REFUSALS = {
    "the first sync": ("fdatasync:error=EIO:when=1", 6),
    "a later sync": ("fdatasync:error=EIO:when=3", 6),
    "a write": ("pwrite64:error=EIO:when=9", 6),
}


@needs_strace
@pytest.mark.parametrize(("fault", "again"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_a_failed_call_covered_is_fetched_again_and_what_is_durable_is_not(
    origin: Origin,
    root: Path,
    pulled_with: Callable[[str], subprocess.CompletedProcess[str]],
    fault: str,
    again: int,
) -> None:
    ended = pulled_with(fault)
    assert ended.returncode == 0, ended.stderr
    assert published(root) == noise(24 * MIB)
    assert "disk error" in ended.stderr
    assert 24 * MIB <= origin.bytes_sent() <= (24 + again) * MIB + MIB


@needs_strace
@pytest.mark.parametrize(("call", "streams"), [("fsync", 1), ("/^preadv", 2)], ids=["fsync", "preadv"])
def test_a_disk_that_refuses_for_good_ends_the_pull_and_the_next_goes_on(
    origin: Origin,
    root: Path,
    pulled_with: Callable[..., subprocess.CompletedProcess[str]],
    call: str,
    streams: int,
) -> None:
    """Two streams share the file: its digest follows them, and reads back what they wrote."""
    ended = pulled_with(f"{call}:error=EIO", streams)
    assert (ended.returncode, "disk_failed" in ended.stderr) == (1, True), ended.stderr
    assert not list((root / "ready").iterdir())
    refused = origin.bytes_sent()
    ended = pulled_with(f"{call}:delay_enter=1", streams)
    assert ended.returncode == 0, ended.stderr
    assert published(root) == noise(24 * MIB)
    if call == "fsync":
        assert origin.bytes_sent() == refused == 24 * MIB, "every part was durable but for its last sync"


TWO_PARTS = """
import sys
from pathlib import Path
from cachd.errors import DiskFailed
from cachd.model import Extent, File
from cachd.store.ingest import Ingest

ingest = Ingest(Path(sys.argv[1]), File("it", 200, "http://host/it"))
for part in (Extent(0, 100), Extent(100, 200)):
    hashed, content = ingest.part_hash(), memoryview(bytes(range(1, 101)))
    hashed.update(content)
    ingest.write(part.start, content)
    try:
        ingest.keep(part, hashed)
        ingest.finish(part)
    except DiskFailed:
        print("refused")
"""


@needs_strace
def test_after_a_failed_sync_no_later_one_is_believed(tmp_path: Path) -> None:
    """The kernel tells a failed write once: the next sync succeeds without its bytes (man 2 fsync)."""
    command = [sys.executable, "-c", TWO_PARTS, str(tmp_path / "ingest")]
    failing = injected(command, "fdatasync:error=EIO:when=1", on=tmp_path / "ingest/data")
    ended = subprocess.run(failing, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "refused\nrefused\n", ended.stderr
    assert not (tmp_path / "ingest/journal").exists()
