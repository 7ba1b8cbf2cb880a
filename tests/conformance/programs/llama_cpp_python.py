"""Loads a GGUF file with llama-cpp-python: by its path, or from a repository as its README shows."""

import os

from llama_cpp import Llama

model, file, quiet = os.environ["MODEL"], "tiny-F32.gguf", {"n_ctx": 64, "verbose": False}
if os.path.isdir(model):
    llama = Llama(os.path.join(model, file), **quiet)
else:
    llama = Llama.from_pretrained(model, filename=file, **quiet)
assert llama("a", max_tokens=1)["usage"]["completion_tokens"] <= 1
