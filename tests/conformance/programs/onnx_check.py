"""Checks and loads a model with external data with onnx."""

import os

import onnx

model = os.environ["MODEL"]
if not os.path.isdir(model):
    from huggingface_hub import snapshot_download

    model = snapshot_download(model)
path = os.path.join(model, "model.onnx")
onnx.checker.check_model(path)
assert onnx.load(path).graph.initializer[0].raw_data
