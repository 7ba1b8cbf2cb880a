"""Chooses the files of a model that the views show as copies of their own, not as hard links.

`onnx.load` and `onnx.checker` refuse external data, the file with the tensors of an ONNX graph, if it is a
symbolic link or has several hard links. Without patterns, the files are chosen by their names alone:

    model.onnx_data   model.onnx_data_1   model.onnx.data   model.data   weights.pb

in a folder that has an `.onnx` file. A graph may name any other file; patterns select such a file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from posixpath import basename, dirname

from cachd.model import matches

_DATA = re.compile(r"(?:\.onnx[._]data(?:[._]?\d+)?|\.data)$", re.I | re.A)
_OLD_DATA = "weights.pb"  # the one file to which older exporters of pipelines write all tensors


def copied(paths: Sequence[str], patterns: tuple[str, ...] | None) -> tuple[str, ...]:
    """The paths to copy, sorted: those that `patterns` match, or external data of ONNX if that is None."""
    if patterns is not None:
        return tuple(sorted(path for path in paths if matches(path, patterns)))
    with_graph = {dirname(path) for path in paths if path.lower().endswith(".onnx")}
    return tuple(sorted(path for path in paths if dirname(path) in with_graph and _is_data(basename(path))))


def _is_data(name: str) -> bool:
    return name == _OLD_DATA or bool(_DATA.search(name))
