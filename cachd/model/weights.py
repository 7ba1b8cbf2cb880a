"""Chooses the weights that one engine needs, from a repository that holds them in several forms.

    all                   every file
    safetensors, bin, …   the files of one format; variants such as fp16 only of files that have no plain one
    gguf:Q4_K_M           the GGUF files of one quantisation, and one projector (mmproj) if there are any
    safetensors:fp16      the files of one variant, and plain files that lack this variant

All other files (configurations, tokenizers, code, licences) are kept, except in a folder of another format,
such as `onnx/` or `original/`. An index is kept if it belongs to the chosen format.

A folder with a configuration of its own and no weights in the chosen format is a component of a pipeline. The
engine loads it in the format that it has, so its safetensors or bin files are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from posixpath import dirname

from cachd.errors import Invalid
from cachd.model.name import shown
from cachd.model.units import count_text

ALL = "all"
FORMATS = ("safetensors", "bin", "gguf", "onnx", "openvino", "coreml", "tflite", "flax", "tf", "original")

# The tag of a quantisation, as people name GGUF files: Q4_K_M, IQ2_XXS, UD-Q4_K_XL, BF16, MXFP4_MOE.
_TAG = (
    r"(?:UD-|i1-)?(?:I?Q[1-9]\d?(?:_[0-9A-Za-z]+)*|TQ[12]_0|B?F16|F32|FP(?:8|16|32)"
    r"|(?:MX|NV)FP4(?:_[0-9A-Za-z]+)*)"
)
_IS_TAG = re.compile(_TAG, re.I | re.A)
_TAGS = re.compile(rf"(?:^|[-._])({_TAG})(?=[-._]|$)", re.I | re.A)
_GGUF_NUMBER = re.compile(r"-\d{5}(-of-\d{5}\.gguf)$", re.A)
_SPLIT = re.compile(r"[-.]\d+-of-\d+$|[-.]part\d+of\d+$", re.A)
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|int8|int4|8bit|4bit|non_ema|ema)(?=[-.]|$)", re.I)
_ONNX_VARIANT = re.compile(
    r"_(q4f16|q4|q8|fp16|bf16|int8|uint8|bnb4|quantized|qint8_\w+|quint8_\w+|O[1-4])$", re.I
)
_INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack)\.index(?:\.[\w-]+)?\.json$", re.I | re.A)
_PART, _ONNX_DATA = re.compile(r"\.part\d+of\d+$", re.A), re.compile(r"\.onnx[._]data(?:_\d+)?$", re.A)
_TRAINING = re.compile(
    r"(?:optimizer|scheduler|scaler|training_args|rng_state\w*|random_states\w*|trainer_state)\.(?:bin|pt|pth|pkl)$"
)
_SUFFIXES = {
    ".safetensors": "safetensors",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), "bin"),
    **dict.fromkeys((".gguf", ".ggml"), "gguf"),
    **dict.fromkeys((".onnx", ".onnx_data", ".ort"), "onnx"),
    **dict.fromkeys((".mlmodel", ".mlmodelc", ".mlpackage"), "coreml"),
    ".tflite": "tflite",
    ".msgpack": "flax",
    ".h5": "tf",
}
_FOLDERS = ("original", "onnx", "openvino", "coreml", "tflite", "metal")
_OF_INDEX = {"safetensors": "safetensors", "bin": "bin", "h5": "tf", "msgpack": "flax"}
_TORCH = ("safetensors", "bin")
_MAX_LISTED = 60  # forms in a hint
_PROJECTORS = ("F16", "BF16", "Q8_0", "F32")  # which quantisation of a projector is taken first


@dataclass(frozen=True, slots=True)
class Weights:
    """Which form of the weights a user asks for: a format, and perhaps a quantisation or a variant of it."""

    format: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Read `safetensors`, `gguf:Q4_K_M` or a quantisation alone. Raises Invalid with the right forms."""
        name, colon, variant = text.strip().partition(":")
        if not colon and is_tag(name):
            name, variant = "gguf", name
        name = name.lower()
        known = name == ALL or name in FORMATS
        if not known or (colon and (name == ALL or not re.fullmatch(r"[\w.-]{1,64}", variant, re.A))):
            raise Invalid(
                f"weights {shown(text)} is no form of weights",
                code="bad_weights",
                hint=f"use all, {', '.join(FORMATS)} or gguf:QUANTISATION, such as gguf:Q4_K_M",
            )
        return cls(name, variant)

    def __str__(self) -> str:
        return f"{self.format}:{self.variant}" if self.variant else self.format


def is_tag(text: str) -> bool:
    """Whether a text has the form of a quantisation, such as Q4_K_M."""
    return bool(_IS_TAG.fullmatch(text))


def choices(paths: Iterable[str]) -> list[str]:
    """The forms of weights among these files, such as `bin`, `safetensors` and `gguf:Q4_K_M`, sorted."""
    found = {
        f"{each.format}:{each.variant}" if each.variant and each.format != "original" else each.format
        for each in map(_kind, paths)
        if each.format in FORMATS and not each.is_projector
    }
    return sorted(found)


def format_of(path: str) -> str:
    """The format of a file's weights: one of FORMATS, or `training`; empty if it has none."""
    return _kind(path).format


def gguf_set(path: str) -> str:
    """The path of a split GGUF without its own number, which its whole set shares; any other path itself."""
    return _GGUF_NUMBER.sub(r"\1", path)


def gguf_models(paths: Iterable[str]) -> list[str]:
    """The GGUF files among these but for projectors, sorted."""
    kinds = ((path, _kind(path)) for path in paths if path.lower().endswith(".gguf"))
    return sorted(path for path, each in kinds if each.format == "gguf" and not each.is_projector)


def chosen(paths: Sequence[str], weights: str) -> set[str]:
    """The paths that `weights` keeps. If there are no such weights, raises Invalid and lists the choices."""
    asked = Weights.parse(weights)
    if asked.format == ALL:
        return set(paths)
    kinds = {path: _kind(path) for path in paths}
    wanted = _wanted(kinds, asked)
    if not wanted:
        raise _no_such(asked, paths)
    folders = {dirname(path) for path in wanted}
    components = {
        folder
        for folder in {dirname(path) for path in paths} - folders - {""}
        if asked.format in _TORCH and f"{folder}/config.json" in kinds
    }
    return wanted | {path for path, each in kinds.items() if _is_beside(path, each, asked.format, components)}


def _no_such(asked: Weights, paths: Sequence[str]) -> Invalid:
    """The error for weights that are not there. Its hint lists those that are."""
    there = choices(paths)
    listed = ", ".join(there[:_MAX_LISTED]) + (" and more" if len(there) > _MAX_LISTED else "")
    has = f"it has {listed}" if there else "it has no weights in a form that cachd knows"
    is_revision = f"; if {asked.variant} is a revision, write @{asked.variant}" if asked.variant else ""
    return Invalid(
        f"the source has no weights {asked} among {count_text(len(paths), 'file')}",
        code="no_such_weights",
        hint=has + is_revision,
    )


def _is_beside(path: str, kind: _Kind, wanted: str, components: set[str]) -> bool:
    """Whether to keep a file that is not among the wanted weights."""
    of_component = dirname(path) in components
    if kind.goes_with:
        return kind.goes_with == wanted or (of_component and kind.goes_with in _TORCH)
    return not kind.format or (of_component and kind.format in _TORCH)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a file is.

    `format`: the format of its weights; empty if it has none. `goes_with`: for a file without weights, such
    as an index, the only format that needs it; empty if all do. `plain`: the path of its plain variant.
    """

    format: str = ""
    variant: str = ""
    plain: str = ""
    goes_with: str = ""
    is_projector: bool = False


def _kind(path: str) -> _Kind:
    folder, _, name = path.rpartition("/")
    folders = folder.split("/") if folder else []
    of_folder = next((each.lower() for each in folders if each.lower() in _FOLDERS), "")
    if found := _INDEX.search(name):
        return _Kind(goes_with=of_folder or _OF_INDEX[found[1].lower()])
    if _TRAINING.match(name):
        return _Kind("training")
    stem, suffix = _parted(name)
    of_suffix = _SUFFIXES.get(suffix, "")
    if any(each.endswith((".mlpackage", ".mlmodelc")) for each in folders):
        return _Kind("coreml")
    if of_folder == "openvino" or name.startswith("openvino_"):
        return _Kind("openvino") if suffix in (".bin", ".xml") else _Kind(goes_with="openvino")
    if not of_suffix:
        return _Kind(goes_with=of_folder)
    if of_suffix == "gguf":
        return _gguf(name, stem, folders)
    if name.startswith("consolidated") and of_suffix in _TORCH:
        return _Kind("original", of_suffix if not of_folder else "")
    if of_folder and of_folder != of_suffix:
        return _Kind(of_folder)
    return _with_variant(path, stem, suffix, of_suffix)


def _parted(name: str) -> tuple[str, str]:
    """A file's name without its suffix and without the number of its part; the suffix in lower case."""
    name = _PART.sub("", name)
    name = _ONNX_DATA.sub(".onnx_data", name)
    stem, dot, suffix = name.rpartition(".")
    return _SPLIT.sub("", stem), f"{dot}{suffix.lower()}" if dot else ""


def _gguf(name: str, stem: str, folders: Sequence[str]) -> _Kind:
    if name.lower().startswith("imatrix"):
        return _Kind("training")
    tags = [*_TAGS.findall(stem)] or [each for each in reversed(folders) if is_tag(each)][:1]
    if not tags:
        tags = [tag for each in reversed(folders) for tag in _TAGS.findall(each)][:1]
    is_projector = "mmproj" in name.lower()
    return _Kind("gguf", tags[-1] if tags else "", is_projector=is_projector)


def _with_variant(path: str, stem: str, suffix: str, of_format: str) -> _Kind:
    pattern = _ONNX_VARIANT if of_format == "onnx" else _VARIANT
    found = pattern.search(stem)
    if not found:
        return _Kind(of_format, plain=f"{dirname(path)}/{stem}{suffix}")
    plain = stem[: found.start()] + stem[found.end() :]
    return _Kind(of_format, found[1].lower(), f"{dirname(path)}/{plain}{suffix}")


def _wanted(kinds: dict[str, _Kind], asked: Weights) -> set[str]:
    """The weights that are asked for, without what goes with them."""
    of_format = {path: each for path, each in kinds.items() if each.format == asked.format}
    if not of_format and not asked.variant:  # some models come in the form of their makers alone
        return {p for p, each in kinds.items() if (each.format, each.variant) == ("original", asked.format)}
    if asked.format == "gguf":
        return _quantised(of_format, asked.variant)
    variant = asked.variant.lower()
    if variant and not any(each.variant == variant for each in of_format.values()):
        return set()
    has = {(each.plain, each.variant) for each in of_format.values()}

    def is_wanted(each: _Kind) -> bool:
        if each.variant == variant:
            return True
        if variant and (each.plain, variant) in has:
            return False
        return not each.variant or (each.plain, "") not in has

    if asked.format == "original":
        return set(of_format)
    return {path for path, each in of_format.items() if is_wanted(each)}


def _quantised(kinds: dict[str, _Kind], tag: str) -> set[str]:
    """The GGUF files of a quantisation (empty: all), with one projector of each folder that has any."""
    models = {path for path, each in kinds.items() if not each.is_projector}
    if not tag:
        return models and models | _projectors(kinds)
    exact = {path for path in models if kinds[path].variant.lower() == tag.lower()}
    bare = {path for path in models if _without_maker(kinds[path].variant) == tag.lower()}
    found = exact or bare
    return found and found | _projectors(kinds)


def _without_maker(tag: str) -> str:
    return re.sub(r"^(?:UD-|i1-)", "", tag, flags=re.I).lower()


def _projectors(kinds: dict[str, _Kind]) -> set[str]:
    """One projector of each folder that has any: engines take a single one."""
    best: dict[str, tuple[int, str]] = {}
    for path, each in kinds.items():
        if each.is_projector:
            tag = each.variant.upper()
            rank = (_PROJECTORS.index(tag) if tag in _PROJECTORS else len(_PROJECTORS), path)
            best[dirname(path)] = min(best.get(dirname(path), rank), rank)
    return {path for _, path in best.values()}
