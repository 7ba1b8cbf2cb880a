"""Loads a GGUF file with llama.cpp's server in this process, by the arguments of `cachd env`, and asks it."""

import os
import shlex

from xllamacpp import CommonParams, Server

words = shlex.split(os.environ["RUN"])
options = {word: following for word, following in zip(words, [*words[1:], ""], strict=True) if word[0] == "-"}
params = CommonParams()
params.model_alias = options["--alias"]
params.n_ctx = int(options["--ctx-size"])
params.model.path = options["--model"]
answer = Server(params).handle_completions({"prompt": "a", "max_tokens": 1})
assert answer["choices"], answer
