"""The leases of clients: how long they keep a name, and that they survive a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachd.errors import Leased, NotFound
from cachd.kernel.leases import reports_open_files
from cachd.store.layout import Layout
from cachd.store.leases import Lease, Leases
from cachd.store.root import make_directories
from tests.attacks.test_leases import leased


@pytest.fixture
def layout(root: Path) -> Layout:
    make_directories(root)
    return Layout(root)


def made(layout: Layout) -> Leases:
    """Leases with the ids 0, 1, 2, …"""
    ids = iter(map(str, range(100)))
    return Leases(layout, new_id=lambda: next(ids))


def test_a_lease_keeps_its_name_until_it_expires_also_after_a_restart(layout: Layout) -> None:
    leases = made(layout)
    late = leases.take("m", "late", until=20.0)
    soon = leases.take("m", "soon", until=10.0)
    other = leases.take("other", "", until=15.0)
    assert late == Lease("0", "m", "late", 20.0)
    for each in (leases, Leases(layout)):
        assert each.of("m", 9.9) == [soon, late]
        assert each.of("m", 10.0) == [late]
        assert each.of("m", 20.0) == each.of("absent", 0.0) == []
        assert each.by_name(9.9) == {"m": [soon, late], "other": [other]}
        assert each.by_name(15.0) == {"m": [late]}
        assert [each.count(now) for now in (0.0, 10.0, 15.0, 20.0)] == [3, 2, 1, 0]


@pytest.mark.parametrize("time", ["NaN", "Infinity", "1e300"])
def test_a_lease_that_expires_at_no_date_is_not_read(layout: Layout, time: str) -> None:
    layout.lease("odd").write_text(f'{{"name": "m", "holder": "", "expires_at": {time}}}')
    assert made(layout).of("m", 0.0) == []
    assert not layout.lease("odd").exists()


def test_only_a_lease_that_lasts_is_renewed_and_only_under_its_name(layout: Layout) -> None:
    leases = made(layout)
    lease = leases.take("m", "pod", until=10.0)
    for name, id_, now in (("m", "absent", 1.0), ("other", lease.id, 1.0), ("m", lease.id, 10.0)):
        with pytest.raises(NotFound) as refusal:
            leases.renew(name, id_, until=99.0, now=now)
        assert refusal.value.code == "no_such_lease"
    renewed = leases.renew("m", lease.id, until=30.0, now=9.9)
    assert renewed == Lease(lease.id, "m", "pod", 30.0)
    for each in (leases, Leases(layout)):
        assert each.of("m", 20.0) == [renewed]


def test_a_lease_that_is_released_is_gone_and_the_others_stay(layout: Layout) -> None:
    leases = made(layout)
    first, second, other = (leases.take(name, "", until=10.0) for name in ("m", "m", "other"))
    leases.release("other", first.id)
    leases.release("m", "absent")
    assert leases.of("m", 0.0) == [first, second]
    for _ in range(2):
        leases.release("m", first.id)
        assert leases.of("m", 0.0) == [second]
    leases.release_all("m")
    for each in (leases, Leases(layout)):
        assert each.by_name(0.0) == {"other": [other]}
    assert [path.name for path in layout.leases.iterdir()] == [f"{other.id}.json"]


def test_expired_leases_are_removed_and_returned(layout: Layout) -> None:
    leases = made(layout)
    soon, late = leases.take("m", "", until=10.0), leases.take("m", "", until=20.0)
    assert leases.expire(9.9) == []
    assert leases.expire(10.0) == [soon]
    assert leases.expire(10.0) == []
    assert Leases(layout).of("m", 0.0) == [late]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"name": "../m", "holder": "", "expires_at": 1}', '{"name": "m", "holder": ""}'],
)
def test_a_lease_that_cannot_be_read_is_deleted_and_no_other(layout: Layout, content: str) -> None:
    kept = made(layout).take("m", "pod", until=10.0)
    layout.lease("broken").write_text(content)
    (layout.leases / ".hidden.json").write_text("mine")
    assert Leases(layout).by_name(0.0) == {"m": [kept]}
    assert {path.name for path in layout.leases.iterdir()} == {f"{kept.id}.json", ".hidden.json"}


def test_a_lease_whose_file_cannot_be_opened_for_now_is_kept(layout: Layout) -> None:
    """Another process holds a kernel lease on it, so the start is tried again."""
    if not reports_open_files(layout.staging / "probe"):
        pytest.skip("this file system has no leases")
    kept = made(layout).take("m", "pod", until=10.0)
    with leased("write", [layout.lease(kept.id)]), pytest.raises(Leased):
        Leases(layout)
    assert Leases(layout).of("m", 0.0) == [kept]


def test_ids_of_leases_cannot_be_guessed(layout: Layout) -> None:
    taken = [Leases(layout).take("m", "", until=10.0).id for _ in range(3)]
    assert len({*taken}) == 3
    assert all(len(each) == 16 for each in taken)
    assert json.loads(layout.lease(taken[0]).read_text())["id"] == taken[0]
