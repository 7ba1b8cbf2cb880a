"""Loads a language model and its tokenizer with transformers, and generates a token."""

import os

from transformers import AutoModelForCausalLM, AutoTokenizer

model = os.environ["MODEL"]
tokens = AutoTokenizer.from_pretrained(model)("what every pod reads", return_tensors="pt")
generated = AutoModelForCausalLM.from_pretrained(model).generate(tokens["input_ids"], max_new_tokens=1)
assert generated.shape[1] == tokens["input_ids"].shape[1] + 1
