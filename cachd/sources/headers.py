"""Reads the extra headers for an origin from an operator's file of `Name: value` lines, at every use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cachd import files
from cachd.errors import Invalid

LONGEST_BYTES = 16 << 10
MAX_HEADERS = 20
_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([ -~]+)")
# The headers that frame a message or choose bytes and version of a file: only cachd sets these.
_OURS = re.compile(
    r"(?:host|connection|content-.*|transfer-encoding|te|trailer|upgrade|keep-alive|expect|range|if-.*"
    r"|accept-encoding|proxy-.*)",
    re.IGNORECASE,
)


class HeadersFile:
    """Extra headers of one origin, such as Authorization. Their values are never shown."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> Mapping[str, str]:
        """The headers in the file now.

        Raises Invalid, which may name a line but no value, for a file that cannot be read or sent.
        """
        try:
            text = files.content(self._file, at_most=LONGEST_BYTES).decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            why = files.reason(error) if isinstance(error, OSError) else "not ASCII text"
            raise self._refused(f"cannot be read: {why}", "check the path and its mode") from error
        found: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            header = _LINE.fullmatch(line.rstrip())
            if not header or len(found) >= MAX_HEADERS:
                raise self._refused(
                    f"line {number} is not a header, or goes beyond the limit of {MAX_HEADERS} headers",
                    "write 'Name: value', one header a line",
                )
            if _OURS.fullmatch(header[1]):
                raise self._refused(
                    f"line {number}: {header[1]:.40} is set by cachd itself", "remove the line"
                )
            found[header[1]] = header[2].strip()
        return found

    def _refused(self, why: str, hint: str) -> Invalid:
        return Invalid(f"headers_file {self._file} {why}", code="bad_secret", hint=hint)
