"""Examines the files of weights: their headers, their shards, and which of them are pickles."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from posixpath import basename, dirname

from cachd.errors import Invalid
from cachd.model.finding import Level
from cachd.model.units import count_text
from cachd.model.weights import format_of
from cachd.policy import gguf, numbered, placeholders, shards, weight_lengths
from cachd.preflight import headers
from cachd.preflight.codes import Code
from cachd.preflight.contents import Examined, UnreadError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_BEGINS = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")
_SMALL_READ = 8 << 10
_ITEMS_OF_A_TOKEN = 2  # an item of a GGUF costs half as much as a token of JSON
_LONGEST_END = 66 << 10  # of a ZIP archive
_MAX_NAMED = 5
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf", re.A)
_COPY = "copy or upload the file again; a SHA256SUMS that is written last shows that it is complete"


@dataclass(slots=True)
class Weights:
    """What is known of the weights of a model.

    `by_type`: bytes of each type of tensor in each safetensors file whose header is right. `gguf`: bytes of
    the tensors of each GGUF. `architectures`: those that GGUF headers name. `pickles`: the files that are
    Python pickles, except what a training left behind. `safetensors`: all of these files, read or not.
    """

    by_type: dict[str, Counter[str]] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    gguf: dict[str, int] = field(default_factory=dict)
    architectures: set[str] = field(default_factory=set)
    pickles: list[str] = field(default_factory=list)
    safetensors: list[str] = field(default_factory=list)


def weights_of(model: Examined) -> Weights:
    """Examine all files of weights."""
    found = Weights()
    for path in model.paths:
        lower = path.lower()
        if lower.endswith(".safetensors"):
            found.safetensors.append(path)
            _examine_safetensors(model, path, found)
        elif lower.endswith(".gguf"):
            _examine_gguf(model, path, found)
        elif lower.endswith(_PICKLES):
            _examine_pickle(model, path, found)
    _say_headers(model, Code.safetensors, found.safetensors, found.by_type)
    _say_headers(model, Code.gguf, [p for p in model.paths if p.lower().endswith(".gguf")], found.gguf)
    _check_pickles(model, found)
    _check_shards(model)
    _check_numbers(model)
    return found


# --- one file ---


def check_contents(model: Examined) -> None:
    """Find files whose content is a pointer, a web page or the frames of an upload."""
    for path in model.paths:
        _check_content(model, path)


def _check_content(model: Examined, path: str) -> None:
    size = model.contents.sizes[path]
    if not (placeholders.is_binary(path) or placeholders.may_be_pointer(path, size)):
        return
    try:
        with model.opened(path, reads=_SMALL_READ) as opened:
            found = placeholders.found(path, size, opened)
    except UnreadError:
        return
    if found:
        model.found(
            Code.content, Level.refused, f"it is {found.what}, of {size} bytes", path, found.hint, bytes=size
        )


def _examine_safetensors(model: Examined, path: str, found: Weights) -> None:
    size = model.contents.sizes[path]
    try:
        with model.opened(path, reads=8) as opened:
            length = headers.length_of(opened, size)
        with model.opened(path, reads=length) as opened:
            opened.seek(8)
            tensors = headers.read(opened, size, length, model.tokens)
    except headers.BadHeaderError as error:
        model.found(Code.safetensors, Level.refused, str(error), path, _COPY, bytes=size)
    except Invalid:
        model.tokens = 0
        model.unread(path)
    except UnreadError:
        pass
    else:
        model.tokens -= tensors.tokens
        found.by_type[path], found.tensors[path] = Counter(tensors.by_type), tensors.count


def _examine_gguf(model: Examined, path: str, found: Weights) -> None:
    size, refuse = model.contents.sizes[path], partial(model.found, Code.gguf, Level.refused)
    try:
        with model.opened(path, reads=_SMALL_READ) as opened:
            header = gguf.header(opened, _ITEMS_OF_A_TOKEN * model.tokens)
    except ValueError as error:
        refuse(str(error), path, _COPY, bytes=size)
        return
    except OverflowError:
        model.unread(path)
        return
    except UnreadError:
        return
    model.tokens -= header.items // _ITEMS_OF_A_TOKEN
    if header.least_size > size:
        least = f"its header describes {header.least_size} bytes or more, and the file has {size}"
        refuse(least, path, _COPY, bytes=size)
        return
    name = _SPLIT.search(path)
    if name and header.split and header.split != (int(name[1]) - 1, int(name[2])):
        number, of = header.split
        said = f"its header says that it is split {number + 1} of {of}"
        refuse(said, path, "give the file the name that it had", split=number + 1, of=of)
        return
    found.gguf[path] = size - header.data_begin
    if header.architecture:
        found.architectures.add(header.architecture)


def _examine_pickle(model: Examined, path: str, found: Weights) -> None:
    size = model.contents.sizes[path]
    try:
        with model.opened(path, reads=_LONGEST_END) as opened:
            is_pickle = _PICKLE_BEGINS.match(opened.read(4)) is not None
            opened.seek(0)
            missing = weight_lengths.shortage(path, size, opened)
    except UnreadError:
        return
    if missing:
        model.found(Code.content, Level.refused, f"it has {size} bytes, but {missing}", path, _COPY)
    if is_pickle and format_of(path) in ("bin", "original"):
        found.pickles.append(path)


# --- all files ---


def _say_headers(model: Examined, code: Code, paths: list[str], read: Iterable[str]) -> None:
    right = len(set(read))
    if paths and right == len(paths):
        model.found(code, Level.ok, f"{count_text(right, 'header')} read and right", headers=right)


def _check_pickles(model: Examined, found: Weights) -> None:
    safe = {dirname(path) for path in found.safetensors}
    has_safe_weights = "" in safe or bool(found.gguf)
    alone = [
        path
        for path in found.pickles
        if dirname(path) not in safe and not (has_safe_weights and format_of(path) == "original")
    ]
    if alone:
        model.found(
            Code.pickle,
            Level.warning,
            f"weights in {count_text(len(alone), 'file')} are Python pickles, without safetensors beside:"
            f" {named(alone)}",
            hint="look for the model as safetensors",
            files=len(alone),
        )


def _check_shards(model: Examined) -> None:
    for index in filter(shards.is_index, model.paths):
        try:
            with model.opened(index, reads=model.contents.sizes[index]) as opened:
                found = shards.named(index, iter(partial(opened.read, 64 << 10), b""), model.present)
        except UnreadError:
            continue
        except Invalid:
            model.unread(index)
            continue
        if not found.absent:
            if found.present:
                here = f"all {count_text(found.present, 'shard')} of the index are here"
                model.found(Code.shards, Level.ok, here, index, shards=found.present)
            continue
        more = "" if len(found.absent) < shards.MAX_SHOWN else " or more"
        missing = f"it names {len(found.absent)}{more} shards that are not here: {named(found.absent)}"
        if not found.present and shards.others(index, model.present):
            hint = "no engine that reads the index finds the weights; exclude it"
            model.found(Code.shards, Level.warning, missing, index, hint, missing=len(found.absent))
            continue
        hint = "pull them, too; or exclude the index if no engine needs it"
        model.found(Code.shards, Level.refused, missing, index, hint, missing=len(found.absent))


def _check_numbers(model: Examined) -> None:
    for gap in numbered.gaps(model.paths, most=_MAX_NAMED):
        model.found(
            Code.shards,
            Level.refused,
            f"{gap.missing} of the {gap.of} files of its set are not here: {named(gap.absent, gap.missing)}",
            gap.present[0],
            "pull the complete set, or exclude its files",
            missing=gap.missing,
            of=gap.of,
        )


def named(paths: Iterable[str], count: int | None = None) -> str:
    """The first of these paths, for a finding."""
    listed = list(paths)
    shown = ", ".join(f"{basename(path) if len(path) > 80 else path!r:.80}" for path in listed[:_MAX_NAMED])
    count = len(listed) if count is None else count
    return shown + (f" and {count - _MAX_NAMED} more" if count > _MAX_NAMED else "")
