"""A long document from an origin leaves other threads their turns at the interpreter.

Such a thread answers the probes. If it waits for the interpreter for a second, so does the kubelet.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from cachd import foreign
from cachd.kernel import threads
from cachd.model import ModelSpec
from cachd.policy import weight_lengths
from cachd.store.disk_store import DiskStore
from cachd.transfer.checks import check_shards
from tests.ground.stored import keep, manifest_of
from tests.ground.weights import index

Length = Callable[[], AbstractContextManager[None]]

_TENSOR = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
DOCUMENTS = {
    "of many tensors": json.dumps({str(number): _TENSOR for number in range(60_000)}).encode(),
    "of many empty lists": b'{"a": [' + b"[]," * 1_500_000 + b"0]}",
}


TURNS = {"usual turns": nullcontext, "brief turns": threads.in_brief_turns}


def turns_a_second(work: Callable[[], object], length: Length) -> float:
    """How many turns another thread got while `work` ran."""
    ended, turns = threading.Event(), 0

    def other() -> None:
        nonlocal turns
        while not ended.is_set():
            time.sleep(0.0005)
            turns += 1

    thread = threading.Thread(target=other)
    thread.start()
    begun, before = time.monotonic(), turns
    with length():
        work()
    rate = (turns - before) / (time.monotonic() - begun)
    ended.set()
    thread.join()
    return rate


def plain_work() -> None:
    for _ in range(20_000_000):
        pass


@pytest.mark.parametrize("length", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("content", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_header_of_weights_leaves_other_threads_their_turns(
    content: bytes, length: Length, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)

    def examined() -> None:
        with path.open("rb") as opened:
            assert weight_lengths.shortage(path.name, path.stat().st_size, opened) is None

    assert turns_a_second(examined, length) > turns_a_second(plain_work, length) / 4


@pytest.mark.parametrize("length", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("content", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_document_leaves_other_threads_their_turns(content: bytes, length: Length) -> None:
    def checked() -> None:
        foreign.check_json(content, "it", foreign.Limit(1 << 30, tokens=1 << 30))

    assert turns_a_second(checked, length) > turns_a_second(plain_work, length) / 4


def test_an_index_leaves_other_threads_their_turns(store: DiskStore) -> None:
    files = {"m.safetensors": b"m", "m.safetensors.index.json": index(*["m.safetensors"] * 200_000)}
    keep(store, files)
    manifest = manifest_of(files)

    def checked() -> None:
        assert check_shards(manifest, manifest, ModelSpec.asked("hf://org/model", "m"), store.content) == ()

    assert turns_a_second(checked, nullcontext) > turns_a_second(plain_work, nullcontext) / 4
