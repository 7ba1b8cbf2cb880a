"""The ready names are found by name, by manifest, by Hub folder and in their order."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from cachd.model import ModelSpec, Ref, Snapshot
from cachd.store.ready_names import ReadyNames

NAMES = ("b", "a", "d", "c")
REPOS = ("org/one", "org/two")
MANIFESTS = ("1" * 32, "2" * 32)


def snapshot(name: str, repo: str, manifest: str) -> Snapshot:
    spec = ModelSpec(Ref.parse(f"hf://{repo}"), name)
    return Snapshot(
        spec=spec,
        manifest=manifest,
        revision="a" * 40,
        size=1,
        files=1,
        verified=True,
        published_at=1.0,
        repo=repo,
        commit="a" * 40,
    )


def assert_holds(found: ReadyNames, expected: dict[str, Snapshot]) -> None:
    """Every question is answered as a plain dictionary answers it."""
    in_order = [expected[name] for name in sorted(expected)]
    assert found.all() == in_order
    for name in NAMES:
        assert found.get(name) == expected.get(name)
    for manifest in MANIFESTS:
        assert found.of(manifest) == [s for s in in_order if s.manifest == manifest]
    for repo in REPOS:
        folder = "models--" + repo.replace("/", "--")
        assert found.in_hub_folder(folder) == [s for s in in_order if s.hub_folder == folder]
    for name, count in product(("", *NAMES, "z"), (0, 1, 9)):
        assert found.after(name, count) == [each for each in sorted(expected) if each > name][:count]
    groups = {key for s in in_order for key in (s.manifest, f"hub/{s.hub_folder}")}
    assert set(found._groups) == groups, "nothing is kept of what is gone"
    for key, names in found._groups.items():
        members = [s.name for s in in_order if key in (s.manifest, f"hub/{s.hub_folder}")]
        assert list(names) == members


@pytest.mark.parametrize("seed", range(5))
def test_names_that_come_change_and_go_are_found_as_they_are(seed: int) -> None:
    chance, found, expected = Random(seed), ReadyNames(), dict[str, Snapshot]()
    for _ in range(40):
        name = chance.choice(NAMES)
        if chance.random() < 0.3:
            found.remove(name)
            expected.pop(name, None)
        else:
            expected[name] = snapshot(name, chance.choice(REPOS), chance.choice(MANIFESTS))
            found.put(expected[name])
        assert_holds(found, expected)
        assert_holds(ReadyNames(expected.values()), expected)
    for name in NAMES:
        found.remove(name)
    assert_holds(found, {})
