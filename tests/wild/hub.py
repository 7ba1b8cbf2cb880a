"""Hubs and repositories with odd contents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.modelscope import ModelScope
from tests.ground.origin import Status
from tests.ground.weights import index
from tests.wild.field import Odd, World, wild

CONFIG = {"config.json": b'{"model_type": "bert"}'}
WEIGHTS = {"model.safetensors": noise(3000)}
MODEL = {**CONFIG, **WEIGHTS}


def numbered(stem: str, suffix: str, of: int, *numbers: int) -> dict[str, bytes]:
    """The files of a numbered set that are there."""
    return {f"{stem}-{n:05}-of-{of:05}.{suffix}": noise(900, n) for n in numbers}


@contextmanager
def served(
    world: World, files: Mapping[str, bytes], kind: str = "", **repo: Any
) -> Iterator[tuple[Hub, str]]:
    """A Hub with one repository; the Hub, and the ref of the repository."""
    name = f"{kind}wild-{world.row}/model"
    with Hub() as hub:
        hub.add(name, files, **repo)
        yield hub, f"hf://{name}"


def entry(ref: str, hub: Hub, **columns: str) -> tuple[Mapping[str, Any], ...]:
    """The entry of `sources` that leads to the Hub."""
    prefix = ref.partition("@")[0].rpartition("/")[0]
    return ({"prefix": f"{prefix}/", "endpoint": hub.url, **columns},)


def token(world: World, text: str) -> str:
    """A file with a token."""
    file = Path(world.keys()).with_name(f"token-{world.row}")
    file.write_text(text)
    return str(file)


def odd(world: World, files: Mapping[str, bytes], wanted: Mapping[str, bytes], **asked: Any) -> Iterator[Odd]:
    """A repository with these files, of which these are wanted."""
    with served(world, files) as (hub, ref):
        yield Odd(ref, wanted, entries=entry(ref, hub), asked=asked)


@wild("plain-repository")
def plain_repository(world: World) -> Iterator[Odd]:
    yield from odd(world, MODEL, MODEL)


# --- what people upload ---


@wild("stale-index")
def stale_index(world: World) -> Iterator[Odd]:
    shards = numbered("model", "safetensors", 13, *range(1, 14))
    files = {**CONFIG, "gptq.safetensors": noise(500), "model.safetensors.index.json": index(*shards)}
    yield from odd(world, files, files)


@wild("partial-index")
def partial_index(world: World) -> Iterator[Odd]:
    shards = ("model-a.safetensors", "model-b.safetensors")
    files = {**CONFIG, shards[0]: noise(500), "model.safetensors.index.json": index(*shards)}
    yield from odd(world, files, {})


@wild("index-of-bin")
def index_of_bin(world: World) -> Iterator[Odd]:
    yield from odd(world, {**CONFIG, "pytorch_model.bin.index.json": index("pytorch_model-a.bin")}, {})


@wild("half-of-a-gguf")
def half_of_a_gguf(world: World) -> Iterator[Odd]:
    yield from odd(world, numbered("m-Q4_K_M", "gguf", 2, 1), {})


@wild("gap-without-index")
def gap_without_index(world: World) -> Iterator[Odd]:
    yield from odd(world, {**CONFIG, **numbered("model", "safetensors", 3, 1, 3)}, {})


@wild("gap-left-out")
def gap_left_out(world: World) -> Iterator[Odd]:
    files = {**numbered("a", "gguf", 2, 2), **numbered("b", "gguf", 2, 1, 2)}
    yield from odd(world, files, numbered("b", "gguf", 2, 1, 2), include=["b-*"])


@wild("raw-parts")
def raw_parts(world: World) -> Iterator[Odd]:
    yield from odd(world, {"m.Q6_K.gguf.part2of2": noise(100)}, {})


@wild("every-form")
def every_form(world: World) -> Iterator[Odd]:
    others = ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "original/consolidated.00.pth")
    files = {**MODEL, **{path: noise(700, n) for n, path in enumerate(others)}}
    yield from odd(world, files, MODEL, weights="safetensors")


@wild("components")
def components(world: World) -> Iterator[Odd]:
    wanted = {
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        "unet/d.safetensors": noise(400),
        "checker/config.json": b"{}",
        "checker/pytorch_model.bin": noise(300),
    }
    files = {**wanted, "unet/d.fp16.safetensors": noise(200), "unet/d.bin": noise(401)}
    yield from odd(world, files, wanted, weights="safetensors")


@wild("quantisations")
def quantisations(world: World) -> Iterator[Odd]:
    wanted = {**CONFIG, **numbered("Q8_0/m-Q8_0", "gguf", 2, 1, 2), "mmproj-F16.gguf": noise(70)}
    files = {**wanted, "m-Q4_K_M.gguf": noise(400), "mmproj-F32.gguf": noise(140)}
    with served(world, files) as (hub, ref):
        yield Odd(f"{ref}:Q8_0", wanted, entries=entry(ref, hub))


@wild("no-such-quantisation")
def no_such_quantisation(world: World) -> Iterator[Odd]:
    with served(world, {"m-Q8_0.gguf": noise(400)}) as (hub, ref):
        yield Odd(f"{ref}:Q4_K_M", {}, entries=entry(ref, hub))


# --- the Hub ---


@wild("renamed")
def renamed(world: World) -> Iterator[Odd]:
    with served(world, MODEL) as (hub, ref):
        hub.rename(ref.removeprefix("hf://"), "wild-moved/other")
        yield Odd(ref, MODEL, entries=entry(ref, hub))


@wild("pull-request")
def pull_request(world: World) -> Iterator[Odd]:
    with served(world, MODEL, revision="refs/pr/7") as (hub, ref):
        yield Odd(f"{ref}@refs/pr/7", MODEL, entries=entry(ref, hub))


@wild("nested-branch")
def nested_branch(world: World) -> Iterator[Odd]:
    with served(world, MODEL, revision="feature/new/it") as (hub, ref):
        yield Odd(f"{ref}@feature%2Fnew%2Fit", MODEL, entries=entry(ref, hub))


@wild("links-expire")
def links_expire(world: World) -> Iterator[Odd]:
    files = {**CONFIG, "model.safetensors": noise(9 << 20)}
    with served(world, files) as (hub, ref):
        hub.link_lifetime_requests = 1
        yield Odd(ref, files, entries=entry(ref, hub))


@wild("shortened-commit")
def shortened_commit(world: World) -> Iterator[Odd]:
    with served(world, MODEL) as (hub, ref):
        name = ref.removeprefix("hf://")
        commit = hub.add(name, {**MODEL, "extra.txt": b"x"})
        hub.add(name, CONFIG)
        yield Odd(f"{ref}@{commit[:7]}", {**MODEL, "extra.txt": b"x"}, entries=entry(ref, hub))


@wild("mirror-without-shortened-commits")
def mirror_without_shortened_commits(world: World) -> Iterator[Odd]:
    with served(world, MODEL) as (hub, ref):
        commit = hub.add(ref.removeprefix("hf://"), CONFIG)
        hub.lacks = {"shortened"}
        yield Odd(f"{ref}@{commit[:7]}", {}, entries=entry(ref, hub))


@wild("mirror-without-revisions")
def mirror_without_revisions(world: World) -> Iterator[Odd]:
    with served(world, MODEL) as (hub, ref):
        commit = hub.add(ref.removeprefix("hf://"), CONFIG)
        hub.add(ref.removeprefix("hf://"), MODEL)
        hub.always_main = True
        yield Odd(f"{ref}@{commit[:7]}", {}, entries=entry(ref, hub))


@wild("dataset")
def dataset(world: World) -> Iterator[Odd]:
    files = {"README.md": b"# data", "data/train-00000-of-00001.parquet": noise(500)}
    with served(world, files, kind="datasets/") as (hub, ref):
        yield Odd(ref, files, entries=entry(ref, hub))


@wild("kernel")
def kernel(world: World) -> Iterator[Odd]:
    files = {"build/torch/__init__.py": b"", "build/torch/_k.abi3.so": noise(500)}
    with served(world, files, kind="kernels/") as (hub, ref):
        yield Odd(ref, files, entries=entry(ref, hub))


@wild("gated-without-token")
def gated_without_token(world: World) -> Iterator[Odd]:
    with served(world, MODEL, gated=True) as (hub, ref):
        yield Odd(ref, {}, entries=entry(ref, hub))


@wild("gated-wrong-token")
def gated_wrong_token(world: World) -> Iterator[Odd]:
    with served(world, MODEL, gated=True) as (hub, ref):
        yield Odd(ref, {}, entries=entry(ref, hub, credentials=token(world, "hf_of_nobody")))


@wild("gated-not-accepted")
def gated_not_accepted(world: World) -> Iterator[Odd]:
    with served(world, MODEL, gated=True) as (hub, ref):
        hub.revoke(ref.removeprefix("hf://"))
        yield Odd(ref, {}, entries=entry(ref, hub, credentials=token(world, hub.token)))


# --- mirrors ---


def mirror(world: World, *lacks: str) -> Iterator[Odd]:
    """A mirror that leaves something out of its answers."""
    files = {**MODEL, "sub/vocab.txt": noise(100)}
    with served(world, files) as (hub, ref):
        hub.lacks, hub.page_size = {*lacks}, 2
        yield Odd(ref, files, entries=entry(ref, hub))


@wild("mirror-without-sizes")
def mirror_without_sizes(world: World) -> Iterator[Odd]:
    yield from mirror(world, "blobs")


@wild("mirror-without-lfs")
def mirror_without_lfs(world: World) -> Iterator[Odd]:
    yield from mirror(world, "lfs")


@wild("mirror-without-tree")
def mirror_without_tree(world: World) -> Iterator[Odd]:
    yield from mirror(world, "blobs", "tree")


@wild("mirror-without-digests")
def mirror_without_digests(world: World) -> Iterator[Odd]:
    yield from mirror(world, "lfs", "tree", "linked")


@wild("mirror-redirects")
def mirror_redirects(world: World) -> Iterator[Odd]:
    with served(world, MODEL, gated=True) as (hub, _), served(world, MODEL) as (redirecting, ref):
        redirecting.redirects_to = hub.url
        columns = {"credentials": token(world, redirecting.token)}
        yield Odd(ref, {}, entries=entry(ref, redirecting, **columns))


@wild("login-page-as-listing")
def login_page_as_listing(world: World) -> Iterator[Odd]:
    with served(world, MODEL) as (hub, ref):
        hub.fault("*", Status(200, body=b"<html>sign in</html>"))
        yield Odd(ref, {}, entries=entry(ref, hub))


# --- ModelScope, scripted ---


@wild("modelscope")
def modelscope(world: World) -> Iterator[Odd]:
    with ModelScope() as scripted:
        scripted.add("wild-scope/model", {**MODEL, "a dir/b+c.txt": b"odd"})
        scope = {"prefix": "ms://wild-scope/", "endpoint": scripted.url}
        yield Odd("ms://wild-scope/model", {**MODEL, "a dir/b+c.txt": b"odd"}, entries=(scope,))


@wild("modelscope-private")
def modelscope_private(world: World) -> Iterator[Odd]:
    with ModelScope() as scripted:
        scripted.add("wild-private/model", MODEL, private=True)
        scope = {"prefix": "ms://wild-private/", "endpoint": scripted.url}
        yield Odd("ms://wild-private/model", {}, entries=(scope,))
