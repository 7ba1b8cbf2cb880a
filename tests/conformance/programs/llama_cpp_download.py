"""Lets llama.cpp's server download a GGUF file by its repository id, as with `-hf`, and asks it."""

import os

from xllamacpp import CommonParams, Server

params = CommonParams()
params.n_ctx = 64
params.model.path = os.environ["MODEL"]  # the library asks for one; the path of the download replaces it
params.model.hf_repo = os.environ["MODEL"]
answer = Server(params).handle_completions({"prompt": "a", "max_tokens": 1})
assert answer["choices"], answer
