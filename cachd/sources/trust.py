"""Whom a TLS connection believes: the system's authorities, or those of a file that may be replaced."""

from __future__ import annotations

import re
import ssl
import threading
from pathlib import Path

from cachd import files
from cachd.errors import Unavailable

_CERTIFICATE = re.compile(rb"-----BEGIN (TRUSTED |X509 )?CERTIFICATE-----.+?-----END ", re.DOTALL)
_MOST_BYTES = 64 << 20


class Authorities:
    """The PEM file `file`, read again whenever it was replaced; without one, the system's own."""

    def __init__(self, file: str | None = None) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._seen: tuple[int, int, int] | None = None

    def check(self) -> None:
        """See that the file may hold authorities. Raises Unavailable when it cannot.

        Only `context` parses them, when a connection needs them: that takes 25 ms for a system's bundle.
        """
        try:
            if self.file and not _CERTIFICATE.search(files.content(self.file, at_most=_MOST_BYTES)):
                raise OSError("it holds no PEM certificate")
        except OSError as error:
            raise self._unusable(error) from error

    def context(self) -> ssl.SSLContext:
        """For the next connection. Raises Unavailable while the file holds no authority."""
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
            hint="put a PEM file of authorities there; it is read again at the next connection",
        ).withhold(file=str(self.file))


def _strict(file: str | None) -> ssl.SSLContext:
    """TLS 1.2 at the least, and an end that TLS did not announce is a failure.

    Each Python has defaults of its own: some distributions build it to speak what is older, and before 3.11.4
    it took a connection that broke for one that ended.
    """
    context = ssl.create_default_context(cafile=file)
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    return context


def _mark(file: str | None) -> tuple[int, int, int] | None:
    """What tells one state of the file from another."""
    if file is None:
        return None
    status = Path(file).stat()
    files.check_regular(status)
    return status.st_ino, status.st_size, status.st_mtime_ns
