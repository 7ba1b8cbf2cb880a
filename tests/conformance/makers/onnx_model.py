"""Makes a model of one multiplication, with its weights in a file beside it (external data), with onnx."""

import os
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])
graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
path = os.path.join(sys.argv[1], "model.onnx")
external = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 0}
onnx.save_model(model, path, **external)
