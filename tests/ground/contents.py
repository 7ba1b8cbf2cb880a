"""The files of a model in memory, as a preflight reads them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

from cachd.preflight.examine import Preflight, examine


class Files:
    """Files by path. `open_now`: how many are open."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self.sizes: Mapping[str, int] = {path: len(content) for path, content in files.items()}
        self.open_now = 0

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        self.open_now += 1
        try:
            yield io.BytesIO(self._files[path])
        finally:
            self.open_now -= 1


def examined(files: Mapping[str, bytes]) -> Preflight:
    """What a preflight finds in these files. No file stays open."""
    contents = Files(files)
    found = examine(contents)
    assert contents.open_now == 0
    return found
