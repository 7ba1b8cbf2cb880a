"""Examines a model: what an engine would find wrong with it, and which engines take it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from posixpath import basename, dirname

from cachd.errors import Invalid
from cachd.model.finding import Finding, Level, worst
from cachd.model.weights import chosen, format_of, gguf_models, gguf_set
from cachd.preflight.codes import Code
from cachd.preflight.contents import Contents, Examined
from cachd.preflight.layout import ADAPTER, CONFIG, MODULES, PIPELINE, Layout, layout_of
from cachd.preflight.weights import Weights, check_contents, weights_of

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a preflight found out about a model.

    `loaders`: the engines and libraries that take its layout. `architectures` and `dtype`: as its
    configuration says. `tensors`, `weights_bytes`, `by_type`: how many tensors an engine loads, their bytes,
    and the bytes of each type; `weights_bytes` is None if it is not known. `base_model`: what an adapter
    needs.
    """

    loaders: tuple[str, ...]
    architectures: tuple[str, ...]
    dtype: str | None
    tensors: int
    weights_bytes: int | None
    by_type: Mapping[str, int]
    base_model: str | None
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """The level of the worst finding."""
        return worst(self.findings)

    @property
    def notable(self) -> tuple[Finding, ...]:
        """The findings that are not ok, the refused ones first."""
        warnings = tuple(each for each in self.findings if each.level is Level.warning)
        return self.refused + warnings

    @property
    def refused(self) -> tuple[Finding, ...]:
        """The findings because of which an engine would refuse the model."""
        return tuple(each for each in self.findings if each.level is Level.refused)


def examine(contents: Contents) -> Preflight:
    """Examine a model. Raises OSError, DiskFailed or Unavailable when its files cannot be read."""
    model = Examined(contents)
    check_contents(model)
    return _examined(model)


def examine_checked(contents: Contents) -> Preflight:
    """As `examine`, for a model whose files are known to be no pointers, pages or frames."""
    return _examined(Examined(contents))


def _examined(model: Examined) -> Preflight:
    weights = weights_of(model)
    layout = layout_of(model, weights)
    loaders = _loaders(model, weights, layout)
    fits = f"its layout fits {', '.join(loaders)}" if loaders else "no known engine takes its layout"
    model.found(Code.loaders, Level.ok, fits)
    by_type, tensors, size = _loaded(model, weights, layout)
    if size:
        gib = f"{size / _GIB:.1f} GiB" if size >= _GIB // 10 else f"{size} bytes"
        model.found(
            Code.memory,
            Level.ok,
            f"the weights take {gib}; a GPU, or all GPUs together, need more than that",
            weights_bytes=size,
        )
    return Preflight(
        loaders,
        layout.architectures or tuple(sorted(weights.architectures)),
        layout.dtype,
        tensors,
        size,
        by_type,
        layout.base_model,
        model.findings(),
    )


def _loaders(model: Examined, weights: Weights, layout: Layout) -> tuple[str, ...]:
    """The engines and libraries that take the layout of a model.

    Whether one of them knows the architecture depends on its version.
    """
    has, found = layout.has, []
    is_torch = [path for path in (*weights.safetensors, *weights.pickles) if not dirname(path)]
    if ADAPTER in has:
        return ("peft",)
    if PIPELINE in has:
        return ("diffusers",)
    is_mistral = "params.json" in has and any(basename(p).startswith("consolidated") for p in is_torch)
    if layout.writes_text and is_torch:
        found += ["vllm", "sglang"]
        found += ["tgi"] if any(not dirname(path) for path in weights.safetensors) else []
    elif is_mistral:
        found.append("vllm")
    if CONFIG in has and is_torch and not all(format_of(path) == "original" for path in is_torch):
        found.append("transformers")
    if MODULES in has:
        found.append("sentence-transformers")
    if gguf_models(model.paths):
        found.append("llama.cpp")
    if any(path.endswith(".onnx") for path in model.paths):
        found.append("onnxruntime")
    return tuple(found)


def _loaded(model: Examined, weights: Weights, layout: Layout) -> tuple[dict[str, int], int, int | None]:
    """Of what an engine loads: the bytes of each type, the number of tensors, and all bytes.

    That is one form of the weights: the plain safetensors, else the smallest GGUF, else the pickles.
    """
    plain = _plain(weights.safetensors)
    if PIPELINE not in layout.has and any(not dirname(path) for path in plain):
        plain = [path for path in plain if not dirname(path)]
    if plain:
        if any(path not in weights.by_type for path in plain):
            return {}, 0, None
        by_type: Counter[str] = Counter()
        for path in plain:
            by_type.update(weights.by_type[path])
        return dict(by_type), sum(weights.tensors[path] for path in plain), by_type.total()
    sets: Counter[str] = Counter()
    for path in gguf_models(weights.gguf):
        sets[gguf_set(path)] += weights.gguf[path]
    if sets:
        return {}, 0, min(sets.values())
    size = sum(model.contents.sizes[path] for path in weights.pickles)
    return {}, 0, size or None


def _plain(paths: list[str]) -> list[str]:
    """The safetensors that engines load: without variants of others, and without the form of their makers."""
    try:
        kept = chosen(paths, "safetensors")
    except Invalid:
        return []
    return [path for path in paths if path in kept]
