"""Parses SHA256SUMS files, as sha256sum of coreutils and of BSD write them, and others in their form.

    HEX  path      HEX *path      HEX path      SHA256 (path) = HEX      SHA2-256(path)= HEX

Coreutils begin a line with a backslash if its name has one, and double it in the name. On Windows it
separates directories. The text is UTF-8, or UTF-16 with a byte order mark, as PowerShell writes it for `>`.
Of a text that PGP signed, only the lines between its header and its signature count. The signature is not
checked.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
import threading
import time
from collections.abc import Callable, Mapping

from cachd.errors import Invalid
from cachd.foreign import too_large
from cachd.model import MAX_FILES, Digest, Entries, check_path
from cachd.model.folders import folder_markers
from cachd.model.leftovers import is_left_out
from cachd.sources.cancel import CancelToken

NAME = "SHA256SUMS"
OF_NO_BYTES = Digest("sha256", hashlib.sha256().hexdigest())  # the digest of an empty file
LONGEST_BYTES = 16 << 20
_LATEST_SECONDS = 10.0
_MAX_LINES = 2 * MAX_FILES  # some may be empty or comments
_LINE = re.compile(r"([0-9a-fA-F]{64})(?: [ *]|[ \t](?=\S))(?:\./)?(.+)")
_SIGNED, _SIGNATURE = b"-----BEGIN PGP SIGNED MESSAGE-----", b"-----BEGIN PGP SIGNATURE-----"
_BSD_LINE = re.compile(r"SHA(?:2-)?256 ?\((?:\./)?(.+)\) ?= ([0-9a-fA-F]{64})")


def parse(content: bytes, shown: str) -> dict[str, Digest]:
    """The digest of each path. Raises Invalid, and names the line or path that is malformed or repeated."""
    checksums: dict[str, Digest] = {}
    entries = Entries(shown)
    for number, written in enumerate(io.BytesIO(_unsigned(_as_utf8(content, shown))), start=1):
        if number > _MAX_LINES:
            raise too_large(shown, _MAX_LINES, unit="lines")
        line = _decoded(written, shown, number)
        if not line.strip() or line.startswith("#"):
            continue
        stated, path = _parts(line)
        if not stated or path in checksums:
            raise Invalid(
                f"{shown} line {number} is not a digest and a path, or repeats a path",
                code="bad_checksums",
                hint="make it with: sha256sum FILE... > SHA256SUMS",
            )
        if path == NAME:
            continue  # `sha256sum *`, run a second time, lists the old SHA256SUMS, too
        entries.add(path)
        if is_left_out(path):
            continue
        checksums[check_path(path)] = Digest("sha256", stated.lower())
    # If the tree was copied from a bucket, an empty file in it may stand for a folder.
    markers = folder_markers({path: int(digest != OF_NO_BYTES) for path, digest in checksums.items()})
    return {path: digest for path, digest in checksums.items() if path not in markers}


def _parts(line: str) -> tuple[str, str]:
    """The digest and the path of a line; both are empty if it has none."""
    if line.startswith("\\"):
        line = line[1:].replace("\\\\", "/")
        if "\\" in line:  # such as `\\n` for a line feed
            return "", ""
    if found := _LINE.fullmatch(line):
        return found[1], found[2]
    if found := _BSD_LINE.fullmatch(line):
        return found[2], found[1]
    return "", ""


def _as_utf8(content: bytes, shown: str) -> bytes:
    """The content without its byte order mark, as UTF-8. Raises Invalid if it has a mark and is no UTF-16."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16").encode()
        except UnicodeError as error:
            raise Invalid(f"{shown} is not text: {error}", code="bad_checksums") from error
    return content.removeprefix(codecs.BOM_UTF8)


def _unsigned(content: bytes) -> bytes:
    """The content without what PGP wrote around it (RFC 9580, 7). Empty lines stand for its header."""
    if not content.startswith(_SIGNED):
        return content
    header, _, signed = content.replace(b"\r\n", b"\n").partition(b"\n\n")
    return b"\n" * (header.count(b"\n") + 2) + signed.partition(_SIGNATURE)[0]


def _decoded(line: bytes, shown: str, number: int) -> str:
    """The text of a line. Raises Invalid when it is not UTF-8."""
    try:
        return line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"{shown} line {number} is not text: {error.reason}", code="bad_checksums") from error


class LatestChecksums:
    """Reads the checksums of a directory once in ten seconds, however many of its files ask. Thread-safe.

    It remembers one directory, the last. `listing` returns the content of a directory's SHA256SUMS.
    """

    def __init__(
        self, listing: Callable[[str, CancelToken], bytes], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._listing, self._clock = listing, clock
        self._lock = threading.Lock()
        self._base, self._until = "", 0.0
        self._checksums: Mapping[str, Digest] = {}

    def of(self, base: str, cancel_token: CancelToken) -> Mapping[str, Digest]:
        """The checksums of the directory `base`, at most ten seconds old. Raises as `listing` and `parse`."""
        with self._lock:
            if base == self._base and self._clock() < self._until:
                return self._checksums
        content = self._listing(base, cancel_token)  # not with the lock: several threads may ask at once
        checksums = parse(content, base + NAME)
        with self._lock:
            self._base, self._until, self._checksums = base, self._clock() + _LATEST_SECONDS, checksums
        return checksums
