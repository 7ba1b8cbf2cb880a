"""The content of SHA256SUMS for files in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def sha256sums(files: Mapping[str, bytes]) -> bytes:
    """A line for each file, as sha256sum writes it."""
    lines = [f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in files.items()]
    return "".join(lines).encode()
