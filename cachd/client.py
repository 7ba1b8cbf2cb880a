"""An async client of the daemon's HTTP API, used by the command line."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import aiohttp

from cachd.errors import Invalid, Unavailable, Unreachable, error_of
from cachd.files import content, reason
from cachd.foreign import Limit, load_json, too_large
from cachd.model import check_name
from cachd.sources.trust import Authorities, reason_of

_UNIX = "unix:"
_HOST_AND_PORT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?")
_BUSY_SECONDS, _BUSY_PAUSE_SECONDS = 60.0, 1.0

_SILENT_SECONDS = 60.0  # the daemon sends something every 15 seconds
_LONGEST_PEM = 1 << 20
_LONGEST = Limit(256 << 20, tokens=50_000_000)  # a model with very many files, or a page of models


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files for an https:// daemon: the authorities to trust, and the certificate to present and its key.

    With `certificate`, the daemon must present exactly this certificate, whoever issued it.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    certificate: Path | None = None


class Client:
    """An HTTP session with one daemon. An async context manager.

    Every call raises the CachdError that the daemon answered as a problem document, or Unreachable when no
    daemon answers. While the daemon is busy, a call is repeated for up to a minute.
    """

    def __init__(
        self,
        server: str,
        token: str | None = None,
        *,
        tls: ClientTls = ClientTls(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`server` is http://HOST:PORT, https://HOST:PORT or unix:/PATH.

        Raises Invalid for another `server`, or for files that cannot be used.
        """
        self._server, self._clock = server.rstrip("/"), clock
        self._base = "http://localhost" if server.startswith(_UNIX) else self._server
        self.has_token = bool(token)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(sock_connect=5),
            connector=_connector(self._server, tls),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def pull(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Start or join a pull. Returns the model's document."""
        return await self._call("POST", "/v1/models", json=asked)

    async def models(self) -> list[dict[str, Any]]:
        """The documents of all models, fetched page by page."""
        page = await self._call("GET", "/v1/models")
        found: list[dict[str, Any]] = page["models"]
        while "next" in page:
            page = await self._call("GET", "/v1/models", params={"after": page["next"]})
            found += page["models"]
        return found

    async def model(self, name: str) -> dict[str, Any]:
        """The document of a model. Raises NotFound."""
        return await self._call("GET", f"/v1/models/{check_name(name)}")

    async def ready(self, name: str, *, wait: float) -> dict[str, Any]:
        """The ready document. The daemon waits up to `wait` seconds for the model to become ready."""
        return await self._call("GET", f"/v1/models/{check_name(name)}/ready", params={"wait": f"{wait:.3f}"})

    async def pin(self, name: str) -> dict[str, Any]:
        """Pin a model: it is not evicted, and not deleted without force. Returns its name and `pinned`."""
        await self._call("PUT", f"/v1/models/{check_name(name)}/pin")
        return {"name": name, "pinned": True}

    async def unpin(self, name: str) -> dict[str, Any]:
        """Undo `pin`. A model that is not pinned stays as it is. Returns as `pin` does."""
        await self._call("DELETE", f"/v1/models/{check_name(name)}/pin")
        return {"name": name, "pinned": False}

    async def delete(self, name: str, *, force: bool) -> dict[str, Any]:
        """Delete a model. `force`: even a pinned, used or configured one. Returns the bytes that it freed."""
        return await self._call(
            "DELETE", f"/v1/models/{check_name(name)}", params={"force": str(force).lower()}
        )

    async def cancel(self, name: str) -> dict[str, Any]:
        """Cancel the running pull of a model. Returns the model's document when it has ended."""
        return await self._call("DELETE", f"/v1/models/{check_name(name)}/pull")

    async def files(self, name: str, *, most: int | None = None) -> tuple[list[dict[str, Any]], int]:
        """The files of a model, fetched page by page, and how many there are. `most`: the first so many."""
        path, limit = f"/v1/models/{check_name(name)}/files", {"limit": str(most)} if most else {}
        page = await self._call("GET", path, params=limit)
        found: list[dict[str, Any]] = page["files"]
        while "next" in page and most is None:
            page = await self._call("GET", path, params={"after": page["next"]})
            found += page["files"]
        return found, page["total"]

    async def preflight(self, name: str) -> dict[str, Any]:
        """Whether engines would load a ready model without a network."""
        return await self._call("GET", f"/v1/models/{check_name(name)}/preflight")

    async def preflight_ref(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Examine a model that is not here. Returns its report. `asked`: as for `resolve`."""
        return await self._call("POST", "/v1/preflight", json=asked)

    async def resolve(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What a pull would fetch and evict. Nothing is pulled."""
        return await self._call("POST", "/v1/resolve", json=asked)

    async def take_lease(self, name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Take a lease on a model. Returns it, with its id."""
        return await self._call("POST", f"/v1/models/{check_name(name)}/leases", json=asked)

    async def renew_lease(self, name: str, lease: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Let a lease expire later. Raises NotFound when it has expired."""
        return await self._call("PUT", _lease_path(name, lease), json=asked)

    async def release_lease(self, name: str, lease: str) -> None:
        """Release a lease. One that has expired or never was is no error."""
        await self._call("DELETE", _lease_path(name, lease))

    async def limits(self) -> dict[str, Any]:
        """The bandwidth limits in force."""
        return await self._call("GET", "/v1/limits")

    async def set_limits(self, limits: Mapping[str, Any]) -> dict[str, Any]:
        """Replace all limits. Returns the limits now in force."""
        return await self._call("PUT", "/v1/limits", json=limits)

    async def rollback(self, name: str) -> dict[str, Any]:
        """Make a name point to its previous snapshot. Returns the model's document."""
        return await self._call("POST", f"/v1/models/{check_name(name)}/rollback")

    async def verify(self, name: str) -> dict[str, Any]:
        """Start to verify a model. Returns the progress, which the model's document shows from then on."""
        return await self._call("POST", f"/v1/models/{check_name(name)}/verify")

    async def warm(self, name: str) -> dict[str, Any]:
        """Start to load a model into the page cache. Returns the progress, as `verify` does."""
        return await self._call("POST", f"/v1/models/{check_name(name)}/warm")

    async def sweep(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Remove leftovers, or list what would be removed."""
        return await self._call("POST", "/v1/sweeps", json=asked)

    async def make_space(self, asked: Mapping[str, Any], *, dry_run: bool) -> dict[str, Any]:
        """Evict models until the requested space is available, or list what would be evicted."""
        return await self._call("POST", "/v1/evictions", json=asked, params={"dry_run": str(dry_run).lower()})

    async def get(self, path: str, *, params: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The document at any other path, such as /readyz or /v1/capacity."""
        return await self._call("GET", path, params=params)

    async def text(self, path: str) -> str:
        """The answer at a path that is no JSON, such as /metrics."""
        with self._reached():
            async with self._session.get(self._base + path) as response:
                if response.status >= 400:
                    await self._document(response)
                return (await _body(response)).decode()

    async def lines(
        self, path: str, *, params: Mapping[str, str], headers: Mapping[str, str]
    ) -> AsyncIterator[str]:
        """Yields the lines of an answer that does not end by itself, without their line ends.

        Raises Unreachable when the connection breaks.
        """
        timeout = aiohttp.ClientTimeout(sock_connect=5, sock_read=_SILENT_SECONDS)
        with self._reached():
            async with self._session.get(
                self._base + path, params=params, headers=headers, timeout=timeout
            ) as response:
                if response.status >= 400:
                    await self._document(response)
                while line := await response.content.readline():  # of at most 128 KiB
                    yield line.decode(errors="replace").rstrip("\r\n")

    async def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The JSON answer of a call, which is repeated for a minute while the daemon is busy."""
        deadline = self._clock() + _BUSY_SECONDS
        while True:
            try:
                return await self._call_once(method, path, **options)
            except Unavailable as error:
                if error.code != "busy" or self._clock() > deadline:
                    raise
            await asyncio.sleep(_BUSY_PAUSE_SECONDS)

    async def _call_once(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        with self._reached():
            async with self._session.request(method, self._base + path, **options) as response:
                if response.status == 204:
                    return {}
                return await self._document(response)

    async def _document(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        """The JSON object of an answer. Raises the error that it describes, or ValueError."""
        document = load_json(await _body(response), f"the answer of {self._server}", _LONGEST)
        if not isinstance(document, dict):
            raise ValueError("the answer is not a JSON object")  # noqa: TRY004 `_reached` catches it
        if response.status >= 400:
            raise error_of(document)
        return document

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Raises Unreachable for every error of the connection, and for an answer that is none of cachd."""
        try:
            yield
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise Unreachable(
                f"no cachd answers at {self._server}: {_why(error)}",
                hint="start the daemon (cachd serve), or give its address with --url or CACHD_URL",
            ) from error


def _why(error: Exception) -> str:
    """What is wrong with a connection, without the words of the libraries where the system has its own."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else None
    if isinstance(cause, ConnectionError | FileNotFoundError | PermissionError) and cause.errno:
        return os.strerror(cause.errno)
    return str(error) or type(error).__name__


def _lease_path(name: str, lease: str) -> str:
    if not lease.isalnum():  # a path such as .. would be another call
        raise Invalid(
            f"{lease!r:.80} is not the id of a lease", code="bad_lease", hint="cachd lease prints the id"
        )
    return f"/v1/models/{check_name(name)}/leases/{quote(lease)}"


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The complete body of an answer. Raises Invalid when it is longer than `_LONGEST`."""
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > _LONGEST.size_bytes:
            raise too_large(str(response.url.origin()), _LONGEST.size_bytes)
    return bytes(content)


def _connector(server: str, tls: ClientTls) -> aiohttp.BaseConnector:
    if server.startswith(_UNIX):
        return aiohttp.UnixConnector(server.removeprefix(_UNIX).removeprefix("//"))
    if not _is_http(server):
        raise _no_address(server)
    if not server.startswith("https://"):
        return aiohttp.TCPConnector()
    if tls.certificate:
        return aiohttp.TCPConnector(ssl=_only(tls.certificate))
    return aiohttp.TCPConnector(ssl=_context(tls))


def _context(tls: ClientTls) -> ssl.SSLContext:
    """The TLS context for an https:// daemon. Raises Invalid."""
    try:
        context = Authorities(str(tls.ca_file) if tls.ca_file else None).context()
    except Unavailable as error:
        raise Invalid(
            f"{tls.ca_file} cannot be used: {reason_of(error)}",
            code="bad_ca_file",
            hint="give a PEM file of certificate authorities (--ca-file, CACHD_API_CA_FILE)",
        ) from error
    if tls.cert_file:
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file)
        except OSError as error:
            raise Invalid(
                f"{tls.cert_file} cannot be used: {reason(error)}",
                code="bad_certificate",
                hint="give PEM files of a certificate and its key (--cert-file, --key-file)",
            ) from error
    return context


def _is_http(server: str) -> bool:
    """Whether it is an http:// or https:// URL with a host and a possible port."""
    try:
        url = urlsplit(server)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def _no_address(server: str) -> Invalid:
    """The error for an address of the daemon that is none. The hint completes a host and port."""
    is_bare = _HOST_AND_PORT.fullmatch(server)
    written = f"http://{server}" if is_bare else f"unix:{server}" if server.startswith("/") else ""
    forms = "http://HOST:PORT, https://HOST:PORT or unix:/PATH"
    return Invalid(
        f"{server!r:.200} is not the address of a daemon",
        code="bad_url",
        hint=f"write {written} ({forms})" if written else f"write {forms}",
    )


def _only(certificate: Path) -> aiohttp.Fingerprint:
    """What accepts the first certificate of a PEM file, and no other."""
    try:
        first, end, _ = content(certificate, at_most=_LONGEST_PEM).decode().partition(ssl.PEM_FOOTER)
        der = ssl.PEM_cert_to_DER_cert(first[first.index(ssl.PEM_HEADER) :] + end)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else "it has no certificate"
        raise Invalid(
            f"{certificate} cannot be used: {why}",
            code="bad_certificate",
            hint="correct tls_cert_file of this node's daemon, or name the authorities with --ca-file",
        ) from error
    return aiohttp.Fingerprint(hashlib.sha256(der).digest())
