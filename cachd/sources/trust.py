"""Builds the TLS context for connections to origins, from the system's authorities or a PEM file."""

from __future__ import annotations

import re
import ssl
import threading
from pathlib import Path

from cachd import files
from cachd.errors import Unavailable

_CERTIFICATE = re.compile(rb"-----BEGIN (TRUSTED |X509 )?CERTIFICATE-----.+?-----END ", re.DOTALL)
_MAX_BYTES = 64 << 20


class Authorities:
    """The certificate authorities in the PEM file `file`; without a file, the system's own.

    A file that has been replaced is read again.
    """

    def __init__(self, file: str | None = None) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._seen: tuple[int, int, int] | None = None

    def check(self) -> None:
        """Check that the file holds a PEM certificate. Raises Unavailable when it does not.

        The certificates are parsed by `context`, which takes 25 ms for the bundle of a system.
        """
        try:
            if self.file and not _CERTIFICATE.search(files.content(self.file, at_most=_MAX_BYTES)):
                raise OSError("it holds no PEM certificate")
        except OSError as error:
            raise self._unusable(error) from error

    def context(self) -> ssl.SSLContext:
        """The TLS context for the next connection. Raises Unavailable while the file cannot be used."""
        with self._lock:
            try:
                seen = _mark(self.file)
                if self._context is None or seen != self._seen:
                    self._context, self._seen = _strict(self.file), seen
                return self._context
            except OSError as error:  # of which ssl.SSLError is one
                raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"the daemon's CA file cannot be used: {files.reason(error)}",
            code="bad_ca_file",
            hint="put a PEM file of certificate authorities there; the next connection reads it",
        ).withhold(file=str(self.file))


def reason_of(error: Unavailable) -> str:
    """Why a file of authorities cannot be used, for whoever chose that file."""
    return files.reason(error.__cause__) if isinstance(error.__cause__, OSError) else error.detail


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
