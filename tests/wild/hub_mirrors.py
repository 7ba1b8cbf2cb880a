"""Mirrors and proxies of the Hub, and what reports say of large, empty and damaged repositories."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from tests.ground.hub import EVERY_METHOD
from tests.ground.models import noise
from tests.ground.origin import Fault, Flip, NoContentRange, Reply, Saying, Seen, Status
from tests.ground.weights import index, lfs_pointer, safetensors
from tests.wild.field import Odd, World, wild
from tests.wild.hub import CONFIG, MODEL, WEIGHTS, entry, odd, served

READ = ("GET", "HEAD")


def repository(row: str, files: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> None:
    """A row: a repository with these files, of which these are wanted."""

    @wild(row)
    def of_files(world: World) -> Iterator[Odd]:
        yield from odd(world, files, wanted)


repository("only-gitattributes", {".gitattributes": b"*.bin filter=lfs\n"}, {})
CASES = {**CONFIG, "README.md": b"a", "Readme.md": b"b", "model.bin": noise(9), "Model.bin": noise(8)}
repository("names-in-two-cases", CASES, CASES)
repository("part-a-alone", {**CONFIG, "m.Q8_0.gguf-split-a": noise(100)}, {})
LETTERS = {f"m.Q8_0.gguf-split-{letter}": noise(100, number) for number, letter in enumerate("abc")}
repository("parts-with-letters", LETTERS, LETTERS)
repository("consolidated-with-a-gap", {f"consolidated.{n:02}.pth": noise(90, n) for n in (0, 1, 3)}, {})
ONE = {"params.json": b"{}", "consolidated.00.pth": noise(90)}
repository("consolidated-alone", ONE, ONE)
repository("broken-off-upload", {**CONFIG, "model.safetensors": safetensors(9000)[:4000]}, {})
SHARD = {"./sub/../a-00001-of-00001.safetensors": noise(90)}
INDEXED = {**CONFIG, "a-00001-of-00001.safetensors": noise(90), "a.safetensors.index.json": index(*SHARD)}
repository("index-with-dots", INDEXED, INDEXED)
repository("pointer-in-git", {**CONFIG, "model.onnx": lfs_pointer(noise(3000))}, {})


@wild("siblings-end-early")
def siblings_end_early(world: World) -> Iterator[Odd]:
    wanted = {"a.json": b"{}", "z.safetensors": noise(700)}
    files = {**wanted, **{f"b/{number:04}.txt": b"" for number in range(1100)}}
    with served(world, files) as (hub, ref):
        hub.most_siblings = 1050
        yield Odd(ref, wanted, entries=entry(ref, hub), asked={"include": ["a.json", "*.safetensors"]})


@wild("mirror-of-artifactory")
def mirror_of_artifactory(world: World) -> Iterator[Odd]:
    """It has no tree, leaves out the headers of the Hub, and its ETag is the sha1 of the file."""
    files = {**MODEL, "vocab.txt": noise(200)}
    with served(world, files) as (hub, ref):
        hub.lacks = {"blobs", "tree", "lfs", "linked"}
        commit = hub.add(ref.removeprefix("hf://"), files)
        for path in (*CONFIG, "vocab.txt"):
            tag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            said = Saying({"X-Repo-Commit": None, "ETag": tag})
            hub.fault(f"/{ref.removeprefix('hf://')}/resolve/{commit}/{path}", said, methods=READ)
        yield Odd(ref, files, entries=entry(ref, hub))


@wild("mirror-serves-pointers")
def mirror_serves_pointers(world: World) -> Iterator[Odd]:
    """It was cloned without git-lfs: what it lists and sends are the pointers."""
    pointers = {**CONFIG, "model.safetensors": lfs_pointer(safetensors())}
    with served(world, pointers) as (hub, ref):
        hub.lacks = {"lfs", "tree", "linked"}
        yield Odd(ref, {}, entries=entry(ref, hub))


def storage(
    row: str, fault: Fault, files: Mapping[str, bytes], wanted: Mapping[str, bytes], **when: Any
) -> None:
    """A row: the storage behind the Hub has this fault. `when`: as in `Origin.fault`."""

    @wild(row)
    def of_storage(world: World) -> Iterator[Odd]:
        with served(world, files) as (hub, ref):
            hub.cdn.fault("*", fault, **when)
            yield Odd(ref, wanted, entries=entry(ref, hub))


XML = {"Content-Type": "application/xml"}
LARGE = {**CONFIG, "model.safetensors": noise(5 << 20)}
storage("mirror-without-content-range", NoContentRange(), LARGE, LARGE)
PAGE = Status(200, {"Content-Type": "text/html"}, b"<!doctype html><title>Sign in</title>")
storage("mirror-answers-with-a-page", PAGE, MODEL, {}, methods=READ)
storage("mirror-has-other-bytes", Flip(100), MODEL, {})
GONE = Status(404, XML, b"<Error><Code>NoSuchKey</Code></Error>")
storage("lfs-object-is-gone", GONE, MODEL, {}, methods=READ)
AS_LONG = b"<?xml version='1.0'?><Error><Code>InternalError</Code></Error>".ljust(len(*WEIGHTS.values()))
storage("cdn-error-with-200", Status(200, XML, AS_LONG), MODEL, MODEL, times=1)


@wild("disabled-repository")
def disabled_repository(world: World) -> Iterator[Odd]:
    with served(world, MODEL) as (hub, ref):
        said = {"X-Error-Message": "Access to this resource is disabled."}
        hub.fault("*", Status(403, said), methods=EVERY_METHOD)
        yield Odd(ref, {}, entries=entry(ref, hub))


@wild("branch-moves")
def branch_moves(world: World) -> Iterator[Odd]:
    """It moves after the listing: the files are those of the commit that was listed."""
    with served(world, MODEL) as (hub, ref):
        name = ref.removeprefix("hf://")

        class Moves(Saying):
            def reply(self, seen: Seen, reply: Reply) -> Reply:
                hub.add(name, {**CONFIG, "model.safetensors": noise(4000)})
                return reply

        hub.fault("*", Moves({}), times=1)
        yield Odd(ref, MODEL, entries=entry(ref, hub))
