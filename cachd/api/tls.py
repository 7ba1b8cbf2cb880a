"""Loads the TLS certificate of the API, and reloads it when its files change.

cert-manager and the kubelet replace all files of a Secret at once, by changing one symbolic link. However the
files change, a certificate and key that do not work together are never used: the previous pair stays in
force, and the log and the metrics say so.
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import Invalid
from cachd.kernel import threads

log = structlog.get_logger(__name__)

_CHECK_SECONDS = 1.0
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, absent from Python's ssl
_BIGGEST_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the certificate with its chain, its key, and the authorities that sign client certificates.

    Without `client_ca` (None), clients need no certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def paths(self) -> list[Path]:
        """All files that are given."""
        return [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]


class Certificate:
    """The newest working pair of certificate and key. A thread checks the files from `start` to `close`."""

    def __init__(self, paths: TlsFiles) -> None:
        """Load the files. Raises Invalid when certificate and key do not work."""
        self._files = paths
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="certificate", daemon=True)
        self._is_in_force = True
        self._seen = _fingerprints(paths)
        self._context, self._expires_at = _loaded(paths)
        self._log_taken_over()

    def start(self) -> None:
        """Begin to check the files."""
        threads.start([self._thread])

    def close(self) -> None:
        """Stop checking, and join the thread."""
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def context(self) -> ssl.SSLContext:
        """The context for the next handshake."""
        return self._context

    @property
    def expires_at(self) -> float:
        """Unix time at which the certificate expires."""
        return self._expires_at

    @property
    def is_in_force(self) -> bool:
        """Whether the newest files are in use."""
        return self._is_in_force

    def _run(self) -> None:
        while not self._stop.wait(_CHECK_SECONDS):
            seen = _fingerprints(self._files)
            if seen != self._seen:
                self._seen = seen
                self._reload()

    def _reload(self) -> None:
        try:
            self._context, self._expires_at = _context(self._files)
        except (OSError, ValueError) as error:
            self._is_in_force = False
            log.warning(
                "certificate not taken over", file=str(self._files.certificate), reason=_reason(error)
            )
            return
        self._is_in_force = True
        self._log_taken_over()

    def _log_taken_over(self) -> None:
        log.info("certificate taken over", file=str(self._files.certificate), expires_at=self._expires_at)


def expiry(paths: TlsFiles) -> float:
    """Unix time at which the certificate expires. Raises Invalid when certificate and key do not work."""
    return _loaded(paths)[1]


def _loaded(paths: TlsFiles) -> tuple[ssl.SSLContext, float]:
    """As `_context`. Raises Invalid."""
    try:
        return _context(paths)
    except (OSError, ValueError) as error:
        raise Invalid(
            f"TLS cannot use {paths.certificate} and {paths.key}: {_reason(error)}",
            code="bad_certificate",
            hint="set tls_cert_file and tls_key_file to a matching PEM certificate and key, and"
            " tls_client_ca_file to PEM certificates of authorities",
        ) from error


def _fingerprints(paths: TlsFiles) -> list[tuple[int, int, int] | None]:
    """Inode, size and mtime of each file, which change when it is replaced; None for a missing file."""
    found: list[tuple[int, int, int] | None] = []
    for path in paths.paths():
        try:
            status = path.stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _context(paths: TlsFiles) -> tuple[ssl.SSLContext, float]:
    """A server's context, and when (epoch) its certificate expires. Raises OSError or ValueError.

    A handshake in memory proves that certificate and key work together.
    """
    for path in paths.paths():
        files.content(path, at_most=_BIGGEST_FILE)  # raises for a pipe, on which OpenSSL would block
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(paths.certificate, paths.key, password=_no_password)
    expires_at = _expiry(context, paths.certificate)
    if paths.client_ca:
        context.load_verify_locations(paths.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context, expires_at


def _no_password() -> str:
    """Raises ValueError. Without this callback, OpenSSL would ask for a password on the terminal."""
    raise ValueError("the key is encrypted")


def _expiry(server: ssl.SSLContext, certificate: Path) -> float:
    """When (epoch) the certificate expires, as a client sees it in a handshake. Raises ssl.SSLError."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    client.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = ends[0].getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


def _reason(error: Exception) -> str:
    return files.reason(error) if isinstance(error, OSError) else str(error)
