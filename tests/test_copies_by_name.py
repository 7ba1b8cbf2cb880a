"""Which files the views show as copies: external data of ONNX by its name, or what patterns match."""

from __future__ import annotations

import pytest

from cachd.policy.copies import copied

DATA = [
    "model.onnx_data",
    "model.onnx_data_1",
    "model.onnx.data",
    "MODEL.ONNX.DATA",
    "model.data",
    "weights.pb",
]
OTHER = [
    "model.onnx",
    "model.onnx_data.txt",
    "model.onnx_dat",
    "my_weights.pb",
    "weights.pb2",
    "data",
    "x.bin",
]


@pytest.mark.parametrize("graph", ["model.onnx", "other.ONNX"])
@pytest.mark.parametrize("folder", ["", "a/", "a/b/"])
def test_external_data_is_copied_in_a_folder_that_has_a_graph(folder: str, graph: str) -> None:
    paths = [f"{folder}{name}" for name in (graph, *DATA, *OTHER)]
    assert copied(paths, None) == tuple(sorted(f"{folder}{name}" for name in DATA))


def test_data_without_a_graph_beside_it_is_not_copied() -> None:
    assert copied([*DATA, "a/model.onnx"], None) == ()
    assert copied(["b.onnx", "a/b.data"], None) == ()


def test_patterns_alone_decide_where_there_are_some() -> None:
    paths = ["x.bin", "model.onnx", "model.onnx_data", "a/y.bin"]
    assert copied(paths, ("*.bin",)) == ("a/y.bin", "x.bin")
    assert copied(paths, ()) == ()
