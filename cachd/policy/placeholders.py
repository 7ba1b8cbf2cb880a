"""Recognises what stands where the bytes of weights should be: pointers of git, links as text, pages.

version https://git-lfs.github.com/spec/v1    git clone without git-lfs, and every copy of such a clone
# xet version 0, /annex/objects/...           the same of git-xet and git-annex
XSym, IntxLNK, !<symlink>, ../../blobs/...    a symbolic link, where the file system keeps none
<!doctype html>, <Error>                      an error of a server that says 200 and no type
400;chunk-signature=..., 400                  an upload to S3 in its frames, which the server has not removed
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import BinaryIO

_LONGEST_FRAME_LINE = 100
LONGEST_BYTES = 2048  # of a pointer or of a link as text
_BINARY = re.compile(
    r".*\.(?:safetensors|bin|gguf|ggml|pt|pth|ckpt|onnx|onnx_data|ort|h5|msgpack|npz|npy|tflite|pkl|model"
    r"|parquet|arrow|tar|gz|zst|zip)",
    re.IGNORECASE | re.DOTALL,
)
# Large ones of these are in LFS, too.
_TEXT = re.compile(r".*\.(?:json|jsonl|txt|spm|vocab|jinja|tiktoken|md|csv)", re.IGNORECASE | re.DOTALL)
_ONLY_LFS = re.compile(
    rb"version https://(?:git-lfs|hawser)\.github\.com/spec/v1\n(?:ext-[^\n]*\n)*"
    rb"oid sha256:[0-9a-f]{64}\nsize [0-9]+\n?"
)
_POINTER = re.compile(
    rb"(?P<lfs>version https://(?:git-lfs|hawser)\.github\.com/spec/)"
    rb"|(?P<other># xet version |/annex/objects/)"
    rb"|(?P<link>XSym\n[0-9]{4}\n|IntxLNK\x01|!<symlink>|(?:\.\./)+[\w.@+-]+(?:/[\w.@+-]+)*\Z)"
)
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s|html\b|head\b|\?xml\s|error\b)", re.IGNORECASE)
_FRAME = re.compile(rb"([0-9a-fA-F]{1,12})(?:;chunk-signature=[0-9a-f]{64})?\r\n")


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What a file is instead of weights, and what its owner can do."""

    what: str
    hint: str


_OF_LFS = Placeholder(
    "a pointer of Git LFS",
    "the repository was cloned without git-lfs: run `git lfs pull` there, and copy the files again",
)
_OF_OTHERS = Placeholder(
    "a pointer of git-xet or git-annex", "fetch the content in that repository, and copy the files again"
)
_LINK = Placeholder(
    "a symbolic link stored as text",
    "the file system does not support links: mount it so that it does (mfsymlinks for SMB), or copy with"
    " `cp --dereference`",
)
_DOCUMENT = Placeholder(
    "a page or an error document", "open its address in a browser, and check what the server stores there"
)
_FRAMES = Placeholder(
    "an upload stored with its chunk frames (aws-chunked), not the file itself",
    "the S3 server does not support chunked uploads: update it, or upload the file with another client",
)


def found(path: str, size: int, opened: BinaryIO) -> Placeholder | None:
    """What a file of `size` bytes is instead of weights; None if nothing shows that. Raises OSError."""
    begin = opened.read(LONGEST_BYTES)
    instead = pointer(path, begin) if len(begin) == size else None
    if instead or not is_binary(path):
        return instead
    opened.seek(0)
    return page(begin) or frames(opened)


def is_binary(path: str) -> bool:
    """Whether a file is weights or another binary file, by its name."""
    return bool(_BINARY.fullmatch(path))


def may_be_pointer(path: str, size: int) -> bool:
    """Whether a file may be a pointer, by its name and its size."""
    return size <= LONGEST_BYTES and bool(_BINARY.fullmatch(path) or _TEXT.fullmatch(path))


def pointer(path: str, content: bytes) -> Placeholder | None:
    """The kind of pointer or link that the complete content of a file is; None if it is none.

    A text file may quote a pointer, so it counts as one only if it has nothing else in it.
    """
    if not is_binary(path):
        return _OF_LFS if _ONLY_LFS.fullmatch(content) else None
    found = _POINTER.match(content)
    if not found:
        return None
    return _OF_LFS if found["lfs"] else _OF_OTHERS if found["other"] else _LINK


def page(begin: bytes) -> Placeholder | None:
    """Whether a binary file begins as a page or an error document does; None if not."""
    return _DOCUMENT if _PAGE.match(begin) else None


def frames(opened: BinaryIO) -> Placeholder | None:
    """Whether a binary file begins with the frames of an upload; None if not. Raises OSError."""
    first = _FRAME.match(opened.read(_LONGEST_FRAME_LINE))
    if first is None:
        return None
    opened.seek(first.end() + int(first[1], 16))
    return _FRAMES if opened.read(2) == b"\r\n" else None
