"""What a ref resolves to, without a pull: files, digests, what would be fetched and what evicted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from cachd.report.files import MAX_FILES_ON_A_PAGE
from tests.ground.models import noise
from tests.ground.node import Answer
from tests.ground.site import MIB, PATIENCE_SECONDS, Ground, assert_problem, names, send, until

Alone = Callable[..., Ground]


def test_a_resolve_shows_every_file_and_what_is_here_already_and_pulls_nothing(ground: Ground) -> None:
    shared, other = noise(MIB, 1), noise(2 * MIB, 2)
    ground.hub.add("org/first", {"model.safetensors": shared, "config.json": b"{}"})
    ground.hub.add(
        "org/second",
        {"a.safetensors": shared, "b.safetensors": other, "README.md": b"x"},
    )
    ground.node.pull("hf://org/first")
    assert ground.node.ready("org--first").status == 200
    before = names(ground)
    asked = {"ref": "org/second", "exclude": ["*.md"]}
    found = ground.node.ask("POST", "/v1/resolve", asked).document
    assert (found["ref"], found["name"][:11]) == ("hf://org/second", "org--second")
    assert (found["bytes"], found["here_bytes"], found["fetch_bytes"]) == (3 * MIB, MIB, 2 * MIB)
    files = {file["path"]: (file["bytes"], file["sha256"], file["here"]) for file in found["files"]}
    assert files == {
        "a.safetensors": (MIB, hashlib.sha256(shared).hexdigest(), True),
        "b.safetensors": (2 * MIB, hashlib.sha256(other).hexdigest(), False),
    }
    assert found["files"][0]["digest"] == f"sha256:{hashlib.sha256(shared).hexdigest()}"
    assert found["left_out"]["files"] == 1
    assert found["space"]["evictions"] == []
    assert names(ground) == before
    assert not (ground.node.root / "models/org--second").exists()


def test_a_resolve_says_what_a_pull_would_evict(alone: Alone) -> None:
    ground = alone(limit_bytes="20MiB")
    ground.have("old", 12 * MIB)
    found = ground.node.ask("POST", "/v1/resolve", {"ref": ground.add("new", 10 * MIB)}).document
    assert [each["names"] for each in found["space"]["evictions"]] == [["old"]]
    assert (found["space"]["enough"], found["evicts"]) == (True, True)
    assert names(ground) == ["old"]


def test_a_resolve_is_refused_as_the_pull_would_be(ground: Ground) -> None:
    def resolve(ref: str, **asked: object) -> Answer:
        return ground.node.ask("POST", "/v1/resolve", {"ref": ref, **asked})

    assert_problem(resolve("https://10.0.0.1/it"), 403, "private_address")
    assert_problem(resolve("hf://org/absent"), 403, "source_unauthorized")
    assert_problem(resolve("gopher://it"), 400, "unknown_scheme")
    gap = {f"model-0000{n}-of-00003.safetensors": noise(1000, n) for n in (1, 3)}
    ground.hub.add("org/gap", gap)
    assert_problem(resolve("hf://org/gap"), 400, "incomplete_model")
    assert_problem(resolve("hf://org/gap", seconds=0), 422, "invalid_request")


def test_a_resolve_ends_in_the_time_that_was_given(ground: Ground) -> None:
    ground.hub.add("org/silent", {"config.json": b"{}"})
    hold = ground.hub.hold("/api/models/org/silent", after=0)
    try:
        asked = {"ref": "hf://org/silent", "seconds": "500ms"}
        assert_problem(ground.node.ask("POST", "/v1/resolve", asked), 503, "resolve_too_slow")
    finally:
        hold.release()


def test_a_resolve_ends_when_its_client_hangs_up(alone: Alone) -> None:
    """Four may run at once. So four that nobody waits for any more must leave their places to others."""
    ground = alone()
    ground.hub.add("org/silent", {"config.json": b"{}"})
    hold = ground.hub.hold("/api/models/org/silent", after=0)
    quick = ground.add("quick")
    try:
        for _ in range(4):
            hold.reached.clear()
            body = b'{"ref": "hf://org/silent", "seconds": 600}'
            with send(ground.node, "POST", "/v1/resolve", body):
                assert hold.reached.wait(PATIENCE_SECONDS)
        assert ground.node.ask("POST", "/v1/resolve", {"ref": quick}).status == 200
    finally:
        hold.release()


def test_the_files_of_a_model_are_listed_page_by_page(ground: Ground) -> None:
    files = {f"part-{number}.bin": noise(1000, number) for number in range(5)}
    ground.hub.add("org/paged", files)
    ground.node.pull("hf://org/paged", exclude=["part-4.bin"])
    assert ground.node.ready("org--paged").status == 200
    found, after = [], ""
    while after is not None:
        page = ground.node.ask("GET", f"/v1/models/org--paged/files?limit=3&after={after}").document
        assert page["total"] == 4
        found += [file["path"] for file in page["files"]]
        after = page.get("next")
    assert found == sorted(files)[:4]
    whole = ground.node.ask("GET", "/v1/models/org--paged/files").document
    assert all(file["here"] and file["sha256"] for file in whole["files"])
    assert whole["revision"] == ground.show("org--paged")["ready"]["revision"]
    beyond = f"/v1/models/org--paged/files?limit={MAX_FILES_ON_A_PAGE + 1}"
    assert_problem(ground.node.ask("GET", beyond), 422, "invalid_request")


def test_the_files_of_a_model_that_is_not_resolved_are_not_known_yet(ground: Ground) -> None:
    ground.hub.add("org/unresolved", {"config.json": b"{}"})
    hold = ground.hub.hold("/api/models/org/unresolved", after=0)
    try:
        ground.node.pull("hf://org/unresolved")
        assert_problem(ground.node.ask("GET", "/v1/models/org--unresolved/files"), 503, "not_resolved")
    finally:
        hold.release()
    until(lambda: ground.node.ask("GET", "/v1/models/org--unresolved/files").status == 200)
    assert_problem(ground.node.ask("GET", "/v1/models/nobody/files"), 404, "no_such_model")
