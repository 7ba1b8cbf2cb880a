"""Runs a model with external data with ONNX Runtime."""

import os

import numpy as np
import onnxruntime

model = os.environ["MODEL"]
if not os.path.isdir(model):
    from huggingface_hub import snapshot_download

    model = snapshot_download(model)
session = onnxruntime.InferenceSession(os.path.join(model, "model.onnx"), providers=["CPUExecutionProvider"])
(answer,) = session.run(None, {"x": np.ones((1, 64), np.float32)})
assert (answer == 64).all()
