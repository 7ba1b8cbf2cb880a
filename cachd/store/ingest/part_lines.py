"""Reads and writes part hashes as text lines: `<start> <stop> <hash of the bytes between>`.

A part is a range of bytes that was downloaded and hashed as one.
Three files have such lines: `received` and `journal` of an ingest, and `<hex>.parts` beside a blob.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

from cachd import files
from cachd.kernel import durable
from cachd.model import Extent
from cachd.store.digests import PartHash

_MAX_BYTES = 64 << 20  # a line takes about 60 bytes
_NUMBER = re.compile(r"[0-9]{1,18}")
_HASH = re.compile(r"[0-9a-f]{16}|[0-9a-f]{32}")  # the forms of PartHash.hexdigest


def line_of(part: Extent, hashed: PartHash) -> str:
    """The line of one part."""
    return f"{part.start} {part.stop} {hashed.hexdigest}\n"


def read_parts(path: Path, size: int) -> Iterator[tuple[Extent, str]]:
    """Yields the (extent, hash) of each valid line for a file of `size` bytes; skips all other lines.

    Yields nothing when there is no file at `path`, or the file is longer than 64 MiB. Raises OSError, or
    Leased, when it cannot be read.
    """
    try:
        written = durable.read_file(path, at_most=_MAX_BYTES)
    except (FileNotFoundError, files.TooLong):
        return
    for line in io.BytesIO(written):
        words = line.decode("ascii", "replace").rstrip("\r\n").split(" ")
        if len(words) == 3 and all(map(re.Pattern.fullmatch, (_NUMBER, _NUMBER, _HASH), words)):
            start, stop = int(words[0]), int(words[1])
            if start < stop <= size:
                yield Extent(start, stop), words[2]


def parts_of(blob: Path) -> Path:
    """The path of a blob's part hashes. A blob with a digest that arrived as one part has no such file."""
    return blob.with_name(blob.name + ".parts")
