"""Finds a file and the snapshot with huggingface_hub, as a program that downloads what it needs does."""

import os

from huggingface_hub import hf_hub_download, snapshot_download

model = os.environ["MODEL"]
if os.path.isdir(model):
    config = os.path.join(model, "config.json")
else:
    config = hf_hub_download(model, "config.json")
    assert os.path.exists(os.path.join(snapshot_download(model), "config.json"))
with open(config) as file:
    assert file.read()
