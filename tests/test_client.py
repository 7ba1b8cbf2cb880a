"""The API from the outside, many at once: what pods and operators do together."""

from __future__ import annotations

import asyncio

import pytest

from cachd.client import Client
from cachd.errors import InUse, Invalid, NotFound, Unavailable, Unreachable
from tests.ground.site import Ground

MIB = 1 << 20


async def test_three_hundred_waiting_pods_are_answered_when_the_model_is_ready(ground: Ground) -> None:
    ref = ground.add("waited.bin")
    hold = ground.origin.hold("/waited.bin", after=MIB)
    async with Client(ground.node.url) as client:
        await client.pull({"ref": ref, "name": "waited.bin"})
        waiting = [asyncio.create_task(client.ready("waited.bin", wait=60)) for _ in range(300)]
        assert await client.get("/livez") == {"status": "alive"}
        hold.release()
        answers = await asyncio.gather(*waiting)
    assert {answer["manifest"] for answer in answers} == {answers[0]["manifest"]}
    assert ground.origin.bytes_sent("/waited.bin") == 6 * MIB


async def test_probes_are_answered_while_pulls_saturate_the_node(ground: Ground) -> None:
    """No probe waits for a pull: each is answered while all the pulls still run."""
    names = [f"busy-{number}.bin" for number in range(4)]
    asked = [{"ref": ground.add(name, 24 * MIB), "name": name} for name in names]
    ground.origin.rate = 4_000_000
    try:
        async with Client(ground.node.url) as client:
            await asyncio.gather(*map(client.pull, asked))
            for _ in range(50):
                assert await client.get("/livez") == {"status": "alive"}
                with pytest.raises(Unavailable):
                    await client.ready("busy-0.bin", wait=0)
            pulls = [(await client.model(name))["pull"]["state"] for name in names]
            assert "ready" not in pulls
            await asyncio.gather(*(client.delete(name, force=True) for name in names))
    finally:
        ground.origin.rate = None


async def test_an_error_comes_back_as_the_class_it_had_in_the_daemon(ground: Ground) -> None:
    ground.have("pinned.bin")
    async with Client(ground.node.url) as client:
        await client.pin("pinned.bin")
        with pytest.raises(InUse) as refusal:
            await client.delete("pinned.bin", force=False)
        assert refusal.value.code == "pinned"
        assert "cachd unpin" in refusal.value.hint
        with pytest.raises(NotFound):
            await client.model("nothing")
        with pytest.raises(Invalid):
            await client.pull({"ref": "gopher://it"})


async def test_no_daemon_is_said_to_be_no_daemon() -> None:
    async with Client("http://127.0.0.1:1") as client:
        with pytest.raises(Unreachable) as refusal:
            await client.models()
    assert "cachd serve" in refusal.value.hint


@pytest.mark.parametrize("lease", ["", "..", "a/b", "%2e%2e"])
async def test_an_id_that_no_lease_has_is_refused_before_the_daemon_is_asked(lease: str) -> None:
    async with Client("http://127.0.0.1:1") as client:
        with pytest.raises(Invalid) as error:
            await client.release_lease("model", lease)
        assert error.value.code == "bad_lease"
