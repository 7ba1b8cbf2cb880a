"""Asks the daemon over its API."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cachd import files
from cachd.cli.node import FoundDaemon, found_daemon
from cachd.errors import Invalid, Unreachable

if TYPE_CHECKING:
    from cachd.client import Client

T = TypeVar("T")
_LONGEST_TOKEN_BYTES = 256 << 10
_tls_files: dict[str, Path | None] = {}  # the fields of ClientTls that the command line sets


def use_tls_files(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> None:
    """Use these files for the TLS of every later call of this process."""
    _tls_files.update({"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file})


def tls_variables() -> dict[str, Path | None]:
    """The environment variables with which another process of cachd uses the same files."""
    return {f"CACHD_API_{key.upper()}": file for key, file in _tls_files.items()}


def ask(
    server: str | None,
    token_file: Path | None,
    call: Callable[[Client], Awaitable[T]],
    *,
    config_file: Path | None = None,
) -> T:
    """What `call` returns, given a client of the daemon. Raises CachdError.

    Without a `server`, it is the daemon of this node: that of `config_file`, or else of CACHD_CONFIG.
    """
    import asyncio  # it and aiohttp take longer to load than all else that a command needs

    from cachd.client import Client, ClientTls

    found = FoundDaemon(server) if server else found_daemon(config_file)
    token = _token(token_file) or found.token
    tls = ClientTls(**_tls_files, certificate=None if _tls_files.get("ca_file") else found.certificate)

    async def session() -> T:
        async with Client(found.server, token, tls=tls) as client:
            return await call(client)

    try:
        return asyncio.run(session())
    except Unreachable as error:
        if found.fault:
            raise _perhaps_elsewhere(error, found.fault) from error
        raise


def _perhaps_elsewhere(error: Unreachable, fault: str) -> Unreachable:
    """The error where the address of the daemon was not found, because of a fault in its file."""
    return Unreachable(
        f"{error.detail}; the configuration file, which says where it listens, is wrong: {fault}",
        hint="correct the file, or give the address of the daemon with --url or CACHD_URL",
    )


def _token(file: Path | None) -> str | None:
    """The token in the file, else the one in CACHD_TOKEN. Raises Invalid."""
    try:
        token = _content(file) if file else os.environ.get("CACHD_TOKEN")
    except OSError as error:
        raise Invalid(
            f"token file {file} cannot be read: {files.reason(error)}",
            code="bad_secret",
            hint="give a file that this user may read (--token-file, CACHD_TOKEN_FILE), or set CACHD_TOKEN",
        ) from error
    if token and not (token.isascii() and token.isprintable()):
        raise Invalid(
            "the token contains characters that no token may have",
            code="bad_secret",
            hint="write the token on one line, in printable ASCII",
        )
    return token


def _content(file: Path) -> str | None:
    """The token in a file, which may be a pipe, or in a token_file of the daemon. Raises OSError."""
    if not file.is_dir():
        with file.open("rb") as opened:
            content = opened.read(_LONGEST_TOKEN_BYTES)
        text = content.decode(errors="replace").strip()
        if len(text.split()) < 2:
            return text
        from cachd.settings.own_token import token_in

        return token_in(content) or text
    from cachd.settings.own_token import own_token

    return own_token(file)
