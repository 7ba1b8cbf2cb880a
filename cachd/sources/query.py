"""Reads what is added to the query of URLs from an operator's file of one line, at every use."""

from __future__ import annotations

import re
from pathlib import Path

from cachd import files
from cachd.errors import Invalid

LONGEST_BYTES = 8 << 10  # what servers accept as a URL
_QUERY = re.compile(r"[!-\"$-~]+")  # visible ASCII without the '#' that ends a query (RFC 3986, 3.4)


class QueryFile:
    """The secret query of one prefix, such as the signature of a CDN. It is never shown."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> str:
        """The query in the file now, without a `?` before it; empty if the file is.

        Raises Invalid, which shows nothing of the query, for a file that cannot be read or sent.
        """
        try:
            text = files.content(self._file, at_most=LONGEST_BYTES).decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            why = files.reason(error) if isinstance(error, OSError) else "not ASCII text"
            raise self._refused(f"cannot be read: {why}", "check the path and its mode") from error
        query = text.strip().removeprefix("?")
        if query and not _QUERY.fullmatch(query):
            raise self._refused(
                "is not one line of visible ASCII characters without '#'",
                "write what follows '?' in the signed URL, percent-encoded, on one line",
            )
        return query

    def _refused(self, why: str, hint: str) -> Invalid:
        return Invalid(f"query_file {self._file} {why}", code="bad_secret", hint=hint)
