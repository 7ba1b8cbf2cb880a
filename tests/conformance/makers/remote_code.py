"""Makes a model whose repository has its own Python code, with transformers."""

import json
import os
import sys

CONFIGURATION = """
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
"""
MODEL = """
import torch
from transformers import PreTrainedModel
from .configuration_own import OwnConfig
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(8, 8)
        self.post_init()
    def forward(self, x):
        return self.layer(x)
"""
place = sys.argv[1]
for name, text in (("configuration_own.py", CONFIGURATION), ("modeling_own.py", MODEL)):
    with open(os.path.join(place, name), "w") as file:
        file.write(text)
own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
with open(os.path.join(place, "config.json"), "w") as file:
    json.dump({"model_type": "own", "architectures": ["OwnModel"], "auto_map": own}, file)

import torch  # noqa: E402 only this part needs it
from safetensors.torch import save_file  # noqa: E402

weights = {"layer.weight": torch.randn(8, 8), "layer.bias": torch.zeros(8)}
save_file(weights, os.path.join(place, "model.safetensors"), metadata={"format": "pt"})
