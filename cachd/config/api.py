"""Options of the HTTP API."""

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from cachd.config.group import Group
from cachd.fields import AbsolutePath
from cachd.model.listener import Listener
from cachd.settings.types import Listens, Strings


class ApiOptions(Group):
    """Where the API listens, and who may use it."""

    listen: Listens = Field(
        ("127.0.0.1:8470",),
        description="addresses of the API, one or several: HOST:PORT or unix:/PATH; see Listeners",
    )
    tls_cert_file: AbsolutePath | None = Field(
        None,
        description="PEM file of the API's certificate and its chain: the API speaks TLS at every HOST:PORT"
        " not marked plain; reloaded when it changes",
    )
    tls_key_file: AbsolutePath | None = Field(
        None,
        description="PEM file of the certificate's private key; default: tls_cert_file; reloaded when it"
        " changes",
    )
    tls_client_ca_file: AbsolutePath | None = Field(
        None,
        description="PEM file of certificate authorities: clients must present a certificate that one of them"
        " issued; reloaded when it changes",
    )
    token_file: AbsolutePath | None = Field(
        None,
        description="bearer tokens of the API: a file with one admin token, a file with a list of tokens, or"
        " a directory with one file for each token, such as a mounted Secret; re-read at every use",
    )
    anonymous_reads: bool = Field(
        default=True,
        description="answer reads without a token; the probes (/livez, /readyz, …/ready) and the"
        " files of the web pages never need one",
    )
    anonymous_writes: bool = Field(
        default=False,
        description="without token_file: start even on addresses other than loopback, where anybody on the"
        " network can write",
    )
    allowed_hosts: Strings = Field(
        (),
        description="host names to accept in the Host header, also at the Hub endpoint; IP addresses and"
        " localhost are always accepted",
    )

    @field_validator("tls_key_file", "tls_client_ca_file")
    @classmethod
    def _needs_certificate(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file and not info.data.get("tls_cert_file"):
            raise ValueError("needs tls_cert_file, too")
        return file

    @property
    def listeners(self) -> list[Listener]:
        """The addresses of `listen`, parsed."""
        return [Listener.parse(each) for each in self.listen]
