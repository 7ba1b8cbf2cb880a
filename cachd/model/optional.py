"""Names the files that inference clients look for in every model, though most models lack most of them.

A client that is not told to work offline asks the Hub for each of these that it does not find, several times
if nothing answers. The Hub view says which ones a revision does not have. The list is what transformers,
sentence-transformers, peft, vLLM, SGLang, TGI and TEI ask for when they load a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

_CONFIGURATIONS = """
config.json generation_config.json adapter_config.json params.json model_index.json
hf_quant_config.json quant_config.json quantize_config.json quantization_config.json
preprocessor_config.json processor_config.json image_processor_config.json video_preprocessor_config.json
feature_extractor_config.json audio_tokenizer_config.json router_config.json custom_generate/generate.py
modules.json config_sentence_transformers.json 1_Pooling/config.json
sentence_bert_config.json sentence_roberta_config.json sentence_distilbert_config.json
sentence_camembert_config.json sentence_albert_config.json sentence_xlm-roberta_config.json
sentence_xlnet_config.json
README.md
"""
_TOKENIZERS = """
tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
tokenizer.model tokenizer.model.v3 tekken.json spiece.model sentencepiece.bpe.model
vocab.json vocab.txt merges.txt
chat_template.jinja chat_template.json
"""
_WEIGHTS = """
model.safetensors model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json
adapter_model.safetensors adapter_model.bin consolidated.safetensors consolidated.safetensors.index.json
tf_model.h5 tf_model.h5.index.json model.ckpt.index flax_model.msgpack flax_model.msgpack.index.json
medusa_lm_head.safetensors
"""
OPTIONAL = tuple(sorted(f"{_CONFIGURATIONS} {_TOKENIZERS} {_WEIGHTS}".split()))


def absent(paths: Collection[str], unusable: Iterable[str] = ()) -> tuple[str, ...]:
    """The optional files that a model does not have, sorted. `paths`: those of all its files.

    `unusable`: entries that are there but cannot be files; one that ends with '/' may contain any file. No
    path of the answer is a directory of the model, or lies below one of its files.
    """
    taken = {*paths, *unusable}
    above = {path[:at] for path in taken for at, letter in enumerate(path) if letter == "/"}
    return tuple(
        each for each in OPTIONAL if each not in taken | above and not any(p in taken for p in _parents(each))
    )


def _parents(path: str) -> list[str]:
    """The directories of a path, each with and without a '/' at its end."""
    folders = [path[:at] for at, letter in enumerate(path) if letter == "/"]
    return [*folders, *(f"{folder}/" for folder in folders)]
