"""Decides who may connect: checks the addresses, and loads the API's certificate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from cachd.api.tls import Certificate, TlsFiles
from cachd.config import Config
from cachd.errors import Forbidden, Invalid
from cachd.model.listener import Address, Listener, Serves


def check_listen(config: Config) -> None:
    """Raises Forbidden when anybody on the network could write, and Invalid when nobody could read."""
    if not (config.anonymous_reads or config.token_file):
        raise Invalid(
            "with anonymous_reads: false and no token_file, nobody could read",
            code="bad_option",
            hint="set token_file, too",
        )
    if config.token_file or config.anonymous_writes:
        return
    for each in config.listeners:
        if not each.at.is_local and each.serves is Serves.everything:
            raise Forbidden(
                f"listening on {each} would let anybody on the network pull and delete models",
                code="open_writes",
                hint="set token_file, or anonymous_writes: true if the network is trusted",
            )


def allowed_hosts(config: Config, listeners: Iterable[Listener]) -> list[str]:
    """The names that requests may have in their Host header, besides addresses and localhost."""
    hosts = [each.at.host for each in listeners if isinstance(each.at, Address)]
    return [*config.allowed_hosts, *hosts]


def tls_files(config: Config) -> TlsFiles | None:
    """The PEM files of the API's certificate; None without one."""
    if config.tls_cert_file is None:
        return None
    return TlsFiles(
        config.tls_cert_file, config.tls_key_file or config.tls_cert_file, config.tls_client_ca_file
    )


@contextmanager
def certified(config: Config) -> Iterator[Certificate | None]:
    """The API's certificate, reloaded when its files change; None without one. Raises Invalid."""
    paths = tls_files(config)
    if paths is None:
        yield None
        return
    certificate = Certificate(paths)
    certificate.start()
    try:
        yield certificate
    finally:
        certificate.close()
