"""Estimates the disk space that the files of a model need in addition to their content, at most.

While a file arrives, its content is rounded up to blocks, and its ingest has small files of its own. Once its
blob is here, only its entries in the views and in the manifest need space.
"""

from __future__ import annotations

from cachd.model import File
from cachd.policy.parts import is_small

MODEL_BYTES = 128 << 10  # directories of the views, manifest, ready file
ENTRIES_BYTES = 2 << 10  # of each file: in the directories of both views, in the manifest, in the Hub's list
_BLOCK_BYTES = 4096
_INGEST_BYTES = 20 << 10  # about.json, received, journal, owners and the directory of an ingest
_BYTES_PER_BYTE_OF_LINES = 4096  # part lines take at most one byte for so many bytes of the file


def beside_file(file: File, *, by_ingest: bool) -> int:
    """The overhead of one new file until its blob is here. `by_ingest`: even a small file gets an ingest."""
    rounding = -file.size % _BLOCK_BYTES
    if is_small(file) and not by_ingest:
        return rounding
    return rounding + _INGEST_BYTES + file.size // _BYTES_PER_BYTE_OF_LINES
