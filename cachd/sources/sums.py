"""SHA256SUMS, as coreutils' sha256sum writes it: one `HEX  path` or `HEX *path` a line."""

from __future__ import annotations

import re

from cachd.errors import Invalid
from cachd.model import Digest, check_path

NAME = "SHA256SUMS"
LONGEST_BYTES = 16 << 20
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")


def parse(content: bytes, shown: str) -> dict[str, Digest]:
    """Digest of each path. Raises Invalid, naming the line or the path, for anything else."""
    sums: dict[str, Digest] = {}
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise Invalid(f"{shown} is not text: {error}", code="bad_sums") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if not found or found[2] in sums:
            raise Invalid(
                f"{shown} line {number} is not a digest and a new path",
                code="bad_sums",
                mend="make it with: sha256sum FILE... > SHA256SUMS",
            )
        if found[2] == NAME:
            continue  # made by `sha256sum *` a second time: the list cannot hold its own digest
        sums[check_path(found[2])] = Digest("sha256", found[1].lower())
    return sums
