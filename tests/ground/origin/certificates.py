"""Certificates of loopback origins, right and wrong."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509


@dataclass(frozen=True, slots=True)
class Tls:
    """How an origin does TLS: when its certificate is valid (days from now), for whom, by which version."""

    from_days: float = -1
    to_days: float = 1
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    newest: ssl.TLSVersion | None = None

    def context(self, pem_file: Path) -> ssl.SSLContext:
        """A server's, with the certificate that is made in `pem_file`."""
        certify(pem_file, self)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        if self.newest is not None:
            context.set_ciphers("ALL:@SECLEVEL=0")  # else OpenSSL 3 itself refuses to speak what is so old
            context.minimum_version = context.maximum_version = self.newest
        context.load_cert_chain(pem_file)
        return context


def certify(pem_file: Path, tls: Tls | None = None) -> None:
    """Write a new key and its certificate, for loopback unless told otherwise, which is its own authority."""
    from cryptography import x509  # few origins speak TLS, and the demonstration's environment has it not
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    told = tls or Tls()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, told.hosts[-1])])
    alternatives = [_named(host) for host in told.hosts]
    now = datetime.datetime.now(datetime.UTC)
    signs_and_serves = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=told.from_days))
        .not_valid_after(now + datetime.timedelta(days=told.to_days))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs_and_serves, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem_file.write_bytes(private + certificate.public_bytes(pem))


def _named(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
