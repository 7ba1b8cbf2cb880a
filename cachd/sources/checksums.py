"""Parses SHA256SUMS files: one `HEX  path` or `HEX *path` a line, as sha256sum of coreutils writes them."""

from __future__ import annotations

import io
import re

from cachd.errors import Invalid
from cachd.foreign import too_large
from cachd.model import MAX_FILES, Digest, Entries, check_path

NAME = "SHA256SUMS"
LONGEST_BYTES = 16 << 20
_MAX_LINES = 2 * MAX_FILES  # some may be empty or comments
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")


def parse(content: bytes, shown: str) -> dict[str, Digest]:
    """The digest of each path. Raises Invalid, which names the malformed or repeated line or path."""
    checksums: dict[str, Digest] = {}
    entries = Entries(shown)
    for number, written in enumerate(io.BytesIO(content), start=1):
        if number > _MAX_LINES:
            raise too_large(shown, _MAX_LINES, unit="lines")
        line = _decoded(written, shown, number)
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if not found or found[2] in checksums:
            raise Invalid(
                f"{shown} line {number} is not a digest and a path, or repeats a path",
                code="bad_checksums",
                hint="make it with: sha256sum FILE... > SHA256SUMS",
            )
        if found[2] == NAME:
            continue  # `sha256sum *`, run a second time, lists the old SHA256SUMS, too
        entries.add(found[2])
        checksums[check_path(found[2])] = Digest("sha256", found[1].lower())
    return checksums


def _decoded(line: bytes, shown: str, number: int) -> str:
    """The text of a line. Raises Invalid when it is not UTF-8."""
    try:
        return line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"{shown} line {number} is not text: {error.reason}", code="bad_checksums") from error
