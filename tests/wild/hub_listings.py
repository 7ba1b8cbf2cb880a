"""Mirrors of the Hub that list a repository otherwise than the Hub does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.ground.hub import EVERY_METHOD
from tests.ground.models import noise
from tests.ground.origin import Fault, Redirect, Reply, Saying, Seen, Status
from tests.wild.field import Odd, World, wild
from tests.wild.hub import CONFIG, MODEL, entry, served

FLAT = {**MODEL, "vocab.txt": noise(100)}
DEEP = {**MODEL, "onnx/model.onnx": noise(300), "onnx/q4/model.onnx": noise(200), "onnx/q4/a.json": b"{}"}


@dataclass(frozen=True)
class Listing(Fault):
    """The correct document, after `change` was made to it. `link`: where it says that it goes on."""

    change: Callable[[Any], object]
    link: str = ""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        document = json.loads(reply.content.read(0, reply.content.size))
        self.change(document)
        link = {"Link": self.link} if self.link else {}
        return Reply.of(200, {"Content-Type": "application/json", **link}, json.dumps(document).encode())


def is_tree(seen: Seen) -> bool:
    return "/tree/" in seen.path


def is_recursive(seen: Seen) -> bool:
    return is_tree(seen) and "recursive" in seen.query


def is_description(seen: Seen) -> bool:
    return seen.path.startswith("/api/") and not is_tree(seen)


def describing(row: str, change: Callable[[Any], object]) -> None:
    """A row: a mirror that changes its description of the repository so."""

    @wild(row)
    def of_mirror(world: World) -> Iterator[Odd]:
        with served(world, FLAT) as (hub, ref):
            hub.lacks = {"tree"}
            hub.fault("*", Listing(change), when=is_description)
            yield Odd(ref, FLAT, entries=entry(ref, hub))


def of_lfs(change: Callable[[str], str]) -> Callable[[Any], None]:
    """Change the digest of each large file so."""

    def changed(document: Any) -> None:
        for each in document["siblings"]:
            if "lfs" in each:
                each["lfs"]["sha256"] = change(each["lfs"]["sha256"])

    return changed


def sizes_as_texts(document: Any) -> None:
    for each in document["siblings"]:
        each["size"] = str(each["size"])


def folders_too(document: Any) -> None:
    document["siblings"].insert(0, {"rfilename": "onnx/", "size": 0, "blobId": ""})


describing("mirror-names-the-algorithm", of_lfs(lambda digest: f"sha256:{digest}"))
describing("mirror-writes-capitals", of_lfs(str.upper))
describing("mirror-states-sizes-as-texts", sizes_as_texts)
describing("mirror-lists-folders", folders_too)
describing("mirror-has-no-commit", lambda document: document.update(sha="main"))


@wild("mirror-tree-is-flat")
def mirror_tree_is_flat(world: World) -> Iterator[Odd]:
    def flatten(entries: Any) -> None:
        entries[:] = [each for each in entries if "/" not in each["path"]]

    with served(world, DEEP, kind="kernels/") as (hub, ref):
        hub.fault("*", Listing(flatten), when=lambda seen: is_recursive(seen) and seen.path.count("/") == 6)
        yield Odd(ref, DEEP, entries=entry(ref, hub))


@wild("mirror-lists-no-files")
def mirror_lists_no_files(world: World) -> Iterator[Odd]:
    with served(world, DEEP) as (hub, ref):
        hub.fault("*", Listing(lambda document: document.update(siblings=None)), when=is_description)
        yield Odd(ref, DEEP, entries=entry(ref, hub))


@wild("mirror-tree-breaks-off")
def mirror_tree_breaks_off(world: World) -> Iterator[Odd]:
    with served(world, DEEP, kind="kernels/") as (hub, ref):
        hub.page_size = 2
        hub.fault("*", Status(404), when=lambda seen: "cursor=" in seen.query)
        yield Odd(ref, {}, entries=entry(ref, hub))


@wild("mirror-tree-never-ends")
def mirror_tree_never_ends(world: World) -> Iterator[Odd]:
    with served(world, DEEP, kind="kernels/") as (hub, ref):
        again = f'<{hub.url}/api/{ref.removeprefix("hf://")}/tree/main?recursive=true>; rel="next"'
        hub.fault("*", Listing(lambda _: None, link=again), when=is_tree)
        yield Odd(ref, {}, entries=entry(ref, hub))


@wild("mirror-knows-no-blobs")
def mirror_knows_no_blobs(world: World) -> Iterator[Odd]:
    with served(world, DEEP) as (hub, ref):
        hub.fault("*", Status(404, {"Content-Type": "text/plain"}), when=lambda seen: "blobs=" in seen.query)
        yield Odd(ref, DEEP, entries=entry(ref, hub))


@wild("mirror-head-refused")
def mirror_head_refused(world: World) -> Iterator[Odd]:
    with served(world, DEEP) as (hub, ref):
        hub.lacks = {"blobs", "tree"}
        hub.fault("*", Status(405, {"Allow": "GET"}), methods=["HEAD"])
        hub.cdn.fault("*", Status(405, {"Allow": "GET"}), methods=["HEAD"])
        yield Odd(ref, DEEP, entries=entry(ref, hub))


@wild("mirror-head-without-length")
def mirror_head_without_length(world: World) -> Iterator[Odd]:
    with served(world, DEEP) as (hub, ref):
        hub.lacks = {"blobs", "tree", "linked"}
        for server in (hub, hub.cdn):
            server.fault("*", Unstated(), methods=["HEAD"])
        yield Odd(ref, DEEP, entries=entry(ref, hub))


class Unstated(Fault):
    """Without Content-Length."""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return Reply(reply.status, reply.headers, reply.content, reply.start, reply.stop, None)


@wild("mirror-redirects-everything")
def mirror_redirects_everything(world: World) -> Iterator[Odd]:
    with served(world, DEEP) as (hub, ref), served(world, MODEL) as (mirror, _):

        class ToTheHub(Fault):
            def reply(self, seen: Seen, reply: Reply) -> Reply:
                query = f"?{seen.query}" if seen.query else ""
                return Redirect(f"{hub.url}{seen.target}{query}", 308).reply(seen, reply)

        mirror.fault("*", ToTheHub(), methods=EVERY_METHOD)
        yield Odd(ref, DEEP, entries=entry(ref, mirror))


@wild("cdn-has-a-longer-file")
def cdn_has_a_longer_file(world: World) -> Iterator[Odd]:
    with served(world, MODEL) as (hub, ref):
        name = ref.removeprefix("hf://")
        path = hub.cdn_path(name, "model.safetensors")
        hub.cdn.add(path, noise(3010))
        yield Odd(ref, {}, entries=entry(ref, hub))


@wild("cdn-refuses-every-link")
def cdn_refuses_every_link(world: World) -> Iterator[Odd]:
    with served(world, MODEL) as (hub, ref):
        hub.link_lifetime_requests = 0
        yield Odd(ref, {}, entries=entry(ref, hub))


@wild("hub-limits-without-a-word")
def hub_limits_without_a_word(world: World) -> Iterator[Odd]:
    with served(world, MODEL) as (hub, ref):
        hub.status(429, times=2)
        yield Odd(ref, MODEL, entries=entry(ref, hub))


@wild("hub-without-a-commit-header")
def hub_without_a_commit_header(world: World) -> Iterator[Odd]:
    with served(world, {**CONFIG, **DEEP}) as (hub, ref):
        hub.fault("*", Saying({"X-Repo-Commit": None}), methods=EVERY_METHOD)
        yield Odd(ref, DEEP, entries=entry(ref, hub))
