"""Asks the daemon over its API."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from cachd import files
from cachd.errors import Invalid

if TYPE_CHECKING:
    from cachd.client import Client

T = TypeVar("T")
_LONGEST_TOKEN_BYTES = 64 << 10


class _TlsFiles(TypedDict, total=False):
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None


_tls_files: _TlsFiles = {}


def use_tls_files(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> None:
    """Use these files for the TLS of every later call of this process."""
    _tls_files.update({"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file})


def ask(server: str, token_file: Path | None, call: Callable[[Client], Awaitable[T]]) -> T:
    """What `call` returns, given a client of the daemon. Raises CachdError."""
    import asyncio  # it and aiohttp take longer to load than all else that a command needs

    from cachd.client import Client

    token = _token(token_file)

    async def session() -> T:
        async with Client(server, token, **_tls_files) as client:
            return await call(client)

    return asyncio.run(session())


def _token(file: Path | None) -> str | None:
    """The token in the file, else the one in CACHD_TOKEN. Raises Invalid."""
    try:
        token = _content(file) if file else os.environ.get("CACHD_TOKEN")
    except OSError as error:
        raise Invalid(
            f"token file {file} cannot be read: {files.reason(error)}", code="bad_secret"
        ) from error
    if token and not (token.isascii() and token.isprintable()):
        raise Invalid(
            "the token contains characters that no token may have",
            code="bad_secret",
            hint="write the token on one line, in printable ASCII",
        )
    return token


def _content(file: Path) -> str:
    """The first 64 KiB of the file, which may be a pipe, without surrounding white space."""
    with file.open("rb") as opened:
        return opened.read(_LONGEST_TOKEN_BYTES).decode(errors="replace").strip()
