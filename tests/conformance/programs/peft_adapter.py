"""Loads a LoRA adapter with peft. Its base model is a repository id, which the Hub view has."""

import os

import torch
from peft import AutoPeftModelForCausalLM

adapted = AutoPeftModelForCausalLM.from_pretrained(os.environ["MODEL"])
assert adapted(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 128)
