"""The certificate that the API shows, and whose clients it takes: read again as its files rotate.

cert-manager and the kubelet replace all files of a Secret by one link. Whatever replaces them, a pair that
does not work is never shown: the one before stays in force, and the log and the metrics say so.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import Unavailable
from cachd.transfer import threads

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0
_NO_CHECK_TIME = ssl.VerifyFlags(
    0x200000
)  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which the module does not name
_BIGGEST_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the certificate with its chain, its key, and the authorities whose clients may connect
    (None: anybody may)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def paths(self) -> list[Path]:
        return [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]


class Certificate:
    """A pair that works, and its successors. A thread looks at the files from `start` to `close`."""

    def __init__(self, told: TlsFiles) -> None:
        """Raises Unavailable when the pair does not work."""
        self._files = told
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="certificate", daemon=True)
        self._is_in_force = True
        self._seen = _marks(told)
        try:
            self._context, self._expires_at = _context(told)
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"TLS cannot begin with {told.certificate} and {told.key}: {_reason(error)}",
                code="bad_certificate",
                hint="tls_cert_file and tls_key_file hold one pair, tls_client_ca_file authorities, as PEM",
            ) from error
        self._tell()

    def start(self) -> None:
        threads.start([self._thread])

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def context(self) -> ssl.SSLContext:
        """For the next handshake."""
        return self._context

    def gauges(self) -> Mapping[str, float]:
        return {
            "cachd_tls_certificate_expiry_timestamp_seconds": self._expires_at,
            "cachd_tls_in_force": float(self._is_in_force),
        }

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            seen = _marks(self._files)
            if seen != self._seen:
                self._seen = seen
                self._take_over()

    def _take_over(self) -> None:
        try:
            self._context, self._expires_at = _context(self._files)
        except (OSError, ValueError) as error:
            self._is_in_force = False
            log.warning(
                "certificate not taken over", file=str(self._files.certificate), reason=_reason(error)
            )
            return
        self._is_in_force = True
        self._tell()

    def _tell(self) -> None:
        log.info("certificate taken over", file=str(self._files.certificate), expires_at=self._expires_at)


def _marks(told: TlsFiles) -> list[tuple[int, int, int] | None]:
    """What tells one state of the files from another."""
    marks: list[tuple[int, int, int] | None] = []
    for path in told.paths():
        try:
            status = path.stat()
            marks.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            marks.append(None)
    return marks


def _context(told: TlsFiles) -> tuple[ssl.SSLContext, float]:
    """A server's context, and when (epoch) its certificate expires. Raises OSError or ValueError.

    A handshake with itself proves that the pair works.
    """
    for path in told.paths():
        files.content(path, at_most=_BIGGEST_FILE)  # no pipe that would be waited for
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(told.certificate, told.key, password=_no_password)
    expires_at = _expiry(context, told.certificate)
    if told.client_ca:
        context.load_verify_locations(told.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context, expires_at


def _no_password() -> str:
    """Asked for one, OpenSSL would otherwise ask the terminal."""
    raise ValueError("the key is encrypted")


def _expiry(server: ssl.SSLContext, certificate: Path) -> float:
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
