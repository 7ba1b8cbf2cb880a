"""Builds the TLS context for connections to origins, from the system's authorities or a PEM file."""

from __future__ import annotations

import ssl
import threading
from pathlib import Path

from cachd import files
from cachd.errors import Unavailable


class Authorities:
    """The certificate authorities in the PEM file `file`; without a file, the system's own.

    A file that has been replaced is read again.
    """

    def __init__(self, file: str | None = None) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._seen: tuple[int, int, int] | None = None

    def context(self) -> ssl.SSLContext:
        """The TLS context for the next connection. Raises Unavailable while the file cannot be used."""
        with self._lock:
            try:
                seen = _mark(self.file)
                if self._context is None or seen != self._seen:
                    self._context, self._seen = _strict(self.file), seen
                return self._context
            except OSError as error:  # such as ssl.SSLError
                raise Unavailable(
                    f"the daemon's CA file cannot be used: {files.reason(error)}",
                    code="bad_ca_file",
                    hint="put a PEM file of certificate authorities there; the next connection reads it",
                ).withhold(file=str(self.file)) from error


def _strict(file: str | None) -> ssl.SSLContext:
    """A context that demands TLS 1.2 (RFC 8996) and takes an end without close_notify for a failure.

    Without close_notify a cut connection looks like a complete one (RFC 8446, 6.1). Python's defaults differ:
    some distributions build it to accept older versions, and before 3.11.4 it accepted such an end.
    """
    context = ssl.create_default_context(cafile=file)
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    return context


def _mark(file: str | None) -> tuple[int, int, int] | None:
    """A value that changes when the file does."""
    if file is None:
        return None
    status = Path(file).stat()
    files.check_regular(status)
    return status.st_ino, status.st_size, status.st_mtime_ns
