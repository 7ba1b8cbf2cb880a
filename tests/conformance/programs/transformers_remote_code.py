"""Loads a model that has its own code, with transformers and trust_remote_code."""

import os

import torch
from transformers import AutoModel

loaded = AutoModel.from_pretrained(os.environ["MODEL"], trust_remote_code=True)
assert loaded(torch.ones(1, 8)).shape == (1, 8)
