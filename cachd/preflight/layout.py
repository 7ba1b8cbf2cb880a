"""Examines the documents that say how a model is loaded: configurations, pipelines, modules, adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from posixpath import dirname
from typing import Any

from cachd.model.finding import Level
from cachd.model.units import count_text
from cachd.preflight.codes import Code
from cachd.preflight.contents import Examined, NotADocumentError
from cachd.preflight.weights import Weights, named

CONFIG, PIPELINE, MODULES, ADAPTER = (
    "config.json",
    "model_index.json",
    "modules.json",
    "adapter_config.json",
)
_MISTRAL = "params.json"  # beside consolidated.safetensors
_TOKENIZERS = {
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "tekken.json", "tokenizer.tiktoken", "qwen.tiktoken", "tiktoken.model"),
}
_WRITES_TEXT = re.compile(r"ForCausalLM$|ForConditionalGeneration$|LMHeadModel$")
_WITH_CODE = (CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_MODULE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", re.A)
_MAX_ITEMS = 200  # classes, components and modules that are looked at
_MAX_WORDS, _LONGEST_WORD = 8, 120


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is laid out.

    `has`: which of the documents it has, and whether it has `params.json` of Mistral. `architectures`: those
    of `config.json`, or the class of the pipeline. `dtype`: what `config.json` says. `base_model`: that an
    adapter needs.
    """

    has: frozenset[str]
    architectures: tuple[str, ...]
    dtype: str | None
    base_model: str | None
    writes_text: bool


def layout_of(model: Examined, weights: Weights) -> Layout:
    """Examine the documents of a model, and the files that they name."""
    given = _document(model, CONFIG, Code.config)
    config = given or {}
    pipeline = _document(model, PIPELINE, Code.pipeline)
    adapter = _document(model, ADAPTER, Code.adapter)
    architectures = _words(config.get("architectures")) or _words([(pipeline or {}).get("_class_name")])
    writes_text = any(_WRITES_TEXT.search(each) for each in architectures)
    if pipeline is not None:
        _check_components(model, pipeline)
    _check_modules(model)
    base_model = _base_model_of(model, adapter) if adapter is not None else None
    _check_config(model, weights, given)
    _check_tokenizer(model, writes_text=writes_text)
    _check_code(model, config)
    types = _words([config.get("dtype", config.get("torch_dtype"))])
    documents = {CONFIG, PIPELINE, MODULES, ADAPTER, _MISTRAL}
    return Layout(
        frozenset(documents & model.present),
        architectures,
        types[0] if types else None,
        base_model,
        writes_text,
    )


def _document(model: Examined, path: str, code: Code) -> Mapping[str, Any] | None:
    """A JSON object of the model; None if there is none, or if it cannot be used, which is a finding."""
    try:
        return model.mapping(path)
    except NotADocumentError as error:
        model.found(code, Level.refused, str(error), path, "upload the file again")
        return None


def _words(value: object) -> tuple[str, ...]:
    """The strings of a list, shortened."""
    if not isinstance(value, list):
        return ()
    return tuple(each[:_LONGEST_WORD] for each in value[:_MAX_WORDS] if isinstance(each, str))


def _check_config(model: Examined, weights: Weights, config: Mapping[str, Any] | None) -> None:
    others = {PIPELINE, MODULES, ADAPTER, _MISTRAL} & model.present
    needed = [path for path in (*weights.safetensors, *weights.pickles) if not dirname(path)]
    if config is not None:
        model.found(Code.config, Level.ok, "it is read", CONFIG)
    elif needed and not others and CONFIG not in model.present:
        model.found(
            Code.config,
            Level.warning,
            f"there is no config.json beside {named(needed)}",
            hint="most engines need it; pull it, too",
        )


def _check_tokenizer(model: Examined, *, writes_text: bool) -> None:
    here = sorted(_TOKENIZERS & model.present) or [p for p in model.paths if p.endswith(".tiktoken")][:1]
    if here:
        model.found(Code.tokenizer, Level.ok, f"{named(here)} is here")
    elif writes_text:
        model.found(
            Code.tokenizer,
            Level.warning,
            "there is no tokenizer beside the weights of a language model",
            hint="pull tokenizer.json, too; or give the engine another tokenizer that is on the node",
        )


# --- Python code ---


def _check_code(model: Examined, config: Mapping[str, Any]) -> None:
    elsewhere: dict[str, str] = {}
    needed: dict[str, str] = {}
    for path in _WITH_CODE:
        document = config if path == CONFIG else _of_tokenizer(model, path)
        for text in _classes(document.get("auto_map")):
            repository, _, name = text.rpartition("--")
            module = name.rpartition(".")[0]
            if repository:
                elsewhere[repository] = path
            elif _MODULE.fullmatch(module):
                needed[f"{module.replace('.', '/')}.py"] = path
    for file, path in needed.items():
        if file not in model.present:
            said = f"auto_map names {file!r:.120}, which is not here"
            model.found(Code.remote_code, Level.refused, said, path, "pull the Python files, too")
    for repository, path in elsewhere.items():
        said = f"auto_map names code of the repository {repository!r:.120}, which no engine fetches offline"
        model.found(Code.remote_code, Level.warning, said, path, "copy the code into the model")
    if needed and all(file in model.present for file in needed):
        said = f"its own code is here: {named(sorted(needed))}"
        model.found(Code.remote_code, Level.ok, said, hint="engines run it only with --trust-remote-code")


def _of_tokenizer(model: Examined, path: str) -> Mapping[str, Any]:
    try:
        return model.mapping(path) or {}
    except NotADocumentError as error:
        model.found(Code.tokenizer, Level.warning, str(error), path, "upload the file again")
        return {}


def _classes(auto_map: object) -> Iterator[str]:
    """Yields the classes that `auto_map` names: `module.Class`, or `org/model--module.Class`."""
    values = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    for value in values[:_MAX_ITEMS]:
        several = value if isinstance(value, list) else [value]
        yield from (each[: 2 * _LONGEST_WORD] for each in several[:_MAX_WORDS] if isinstance(each, str))


# --- pipelines, modules and adapters ---


def _check_components(model: Examined, pipeline: Mapping[str, Any]) -> None:
    here = _folders(model.paths)
    components = [
        name
        for name, of in pipeline.items()
        if not name.startswith("_") and isinstance(of, list) and len(of) == 2 and all(of)
    ][:_MAX_ITEMS]
    missing = [name[:_LONGEST_WORD] for name in components if name not in here]
    if missing:
        said = f"{count_text(len(missing), 'component')} of the pipeline have no files: {named(missing)}"
        model.found(Code.pipeline, Level.refused, said, PIPELINE, "pull them, too", missing=len(missing))
    else:
        said = f"all {count_text(len(components), 'component')} of the pipeline are here"
        model.found(Code.pipeline, Level.ok, said, PIPELINE, components=len(components))


def _check_modules(model: Examined) -> None:
    try:
        modules = model.document(MODULES)
        if modules is not None and not isinstance(modules, list):
            raise NotADocumentError("it is no list")
    except NotADocumentError as error:
        model.found(Code.modules, Level.refused, str(error), MODULES, "upload the file again")
        return
    for each in (modules or [])[:_MAX_ITEMS]:
        path, kind = (each.get("path"), each.get("type")) if isinstance(each, dict) else (None, None)
        # A module such as Normalize has nothing to configure, and often no folder.
        if not isinstance(path, str) or not str(kind).endswith(("Transformer", "Pooling", "Dense")):
            continue
        config = f"{path}/{CONFIG}" if path else CONFIG
        if config not in model.present:
            said = f"its module {str(kind)!r:.80} needs {config!r:.120}, which is not here"
            model.found(Code.modules, Level.refused, said, MODULES, "pull it, too")
    if modules:
        model.found(Code.modules, Level.ok, f"{count_text(len(modules), 'module')} are named", MODULES)


def _base_model_of(model: Examined, adapter: Mapping[str, Any]) -> str | None:
    if not {"adapter_model.safetensors", "adapter_model.bin"} & model.present:
        said = "there is neither adapter_model.safetensors nor adapter_model.bin beside it"
        model.found(Code.adapter, Level.refused, said, ADAPTER, "pull the weights of the adapter, too")
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        model.found(Code.adapter, Level.warning, "it names no base model", ADAPTER, "ask its author")
        return None
    base = base[:_LONGEST_WORD]
    said = f"it is an adapter of the model {base!r}"
    model.found(Code.adapter, Level.ok, said, ADAPTER, "pull that model, too")
    return base


def _folders(paths: Iterable[str]) -> set[str]:
    """The folders at the top of a model."""
    return {path.partition("/")[0] for path in paths if "/" in path}
