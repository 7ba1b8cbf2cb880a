"""What a pull reserves beside the bytes of its files, and when it gives that back."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachd.model import Digest
from cachd.store.overhead import ENTRIES_BYTES, MODEL_BYTES, beside_file
from cachd.store.space import Space
from tests.conftest import spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import until
from tests.ground.small import MIB, PATIENCE_SECONDS, Engines, Small

KIB = 1 << 10


def test_what_files_take_beside_their_bytes_is_reserved_until_each_is_here(tmp_path: Path) -> None:
    space = Space(tmp_path)

    def reserved() -> int:
        return space.capacity().reserved

    files = {Digest("sha256", f"{n:064}"): 20 * KIB for n in range(10)}
    begun, other = list(files)[:2]
    with space.reserve(MIB, total=MIB, files=files) as reservation:
        all_of_it = MIB + MODEL_BYTES + 10 * ENTRIES_BYTES + 10 * 20 * KIB
        assert reserved() == all_of_it
        reservation.expect(begun, 40 * KIB)
        assert reserved() == all_of_it + 20 * KIB, "it began an ingest"
        for _ in range(2):
            reservation.committed(begun)
            assert reserved() == all_of_it - 20 * KIB, "once, however often it is told"
        reservation.committed(Digest("sha256", "f" * 64))
        assert reserved() == all_of_it - 20 * KIB, "nothing was reserved for this blob"
        reservation.owed = 30 * KIB
        reservation.committed(other)
        assert reservation.owed == 10 * KIB, "what is not needed need not be freed"


@pytest.mark.parametrize("size", [3000, 4096, 300 * KIB])
def test_a_pull_that_has_all_files_but_one_reserves_what_this_one_needs(
    engine: Engines, origin: Origin, size: int
) -> None:
    running, files = engine(), {f"{number:02}": noise(size, number) for number in range(12)}
    hold = origin.hold("/many/11", after=size // 2)
    pulling = running.pulls.start(spec_of(origin.add_model("many", files)))
    assert pulling is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    until(lambda: pulling.progress.now.files_done == len(files) - 1)
    assert pulling.progress.manifest is not None
    last = beside_file(pulling.progress.manifest.files[-1], by_ingest=True)
    needed = size + last + MODEL_BYTES + len(files) * ENTRIES_BYTES
    until(lambda: running.store.space.capacity().reserved <= needed)
    hold.release()
    pulling.done.result(PATIENCE_SECONDS)
    assert running.store.space.capacity().reserved == 0


def test_a_model_of_many_small_files_that_fits_beside_another_evicts_nothing(
    engine: Engines, origin: Origin
) -> None:
    files = {f"{number:02}": noise(4 * KIB, number) for number in range(64)}
    need = 64 * (4 * KIB + ENTRIES_BYTES) + MODEL_BYTES
    both = Small(engine(), origin)
    both.pull("kept", MIB)
    space = both.engine.store.space
    space.change(reserve_free=0, limit=space.capacity().usage.total + need, reserve_inodes=0)
    both.engine.pull(origin.add_model("many", files))
    assert (both.names, both.engine.reclaim.evicted()) == (["kept", "many"], [])
