"""The text form of part hashes, one part a line: `<start> <stop> <hash of the bytes between>`.

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

_MOST_BYTES = 64 << 20  # a line takes about sixty
_NUMBER = re.compile(r"[0-9]{1,18}")


def line_of(part: Extent, hashed: PartHash) -> str:
    """The line of one part."""
    return f"{part.start} {part.stop} {hashed.hexdigest}\n"


def read_parts(path: Path, size: int) -> Iterator[tuple[Extent, str]]:
    """The (extent, hash) of each valid line for a file of `size` bytes.

    None when there is no file at `path` or it is too long. A torn or senseless line is left out.
    """
    try:
        written = durable.read_file(path, at_most=_MOST_BYTES)
    except (FileNotFoundError, files.TooLong):
        return
    for line in io.BytesIO(written):
        words = line.decode("ascii", "replace").rstrip("\r\n").split(" ")
        if len(words) == 3 and all(_NUMBER.fullmatch(word) for word in words[:2]):
            start, stop = int(words[0]), int(words[1])
            if start < stop <= size:
                yield Extent(start, stop), words[2]


def parts_of(blob: Path) -> Path:
    """The path of a blob's part hashes. A blob with a digest that arrived as one part has none."""
    return blob.with_name(blob.name + ".parts")
