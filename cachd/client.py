"""The daemon's API from the outside, as the command line uses it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from cachd.errors import Invalid, Unavailable, Unreachable, error_of
from cachd.files import reason
from cachd.foreign import Limit, load_json, too_large
from cachd.model import check_name
from cachd.sources.trust import Authorities

_UNIX = "unix:"
_BUSY_SECONDS, _BUSY_PAUSE_SECONDS = 60.0, 1.0

_LONGEST = Limit(256 << 20, tokens=50_000_000)  # all the files of a model, or thousands of models


class Client:
    """One session with a daemon. An async context manager.

    A call raises the CachdError that the daemon's problem document names, or Unreachable.
    """

    def __init__(
        self,
        server: str,
        token: str | None = None,
        *,
        ca_file: Path | None = None,
        cert_file: Path | None = None,
        key_file: Path | None = None,
    ) -> None:
        """`server`: http://HOST:PORT, https://HOST:PORT or unix:/PATH. Raises Invalid, or Unavailable when a
        file of https cannot be used."""
        self._server = server.rstrip("/")
        self._base = "http://localhost" if server.startswith(_UNIX) else self._server
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(sock_connect=5),
            connector=_connector(self._server, ca_file, cert_file, key_file),
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
        """Start or join a pull; the model's document."""
        return await self._call("POST", "/v1/models", json=asked)

    async def models(self) -> list[dict[str, Any]]:
        """Every model, page after page."""
        page = await self._call("GET", "/v1/models")
        found: list[dict[str, Any]] = page["models"]
        while "next" in page:
            page = await self._call("GET", "/v1/models", params={"after": page["next"]})
            found += page["models"]
        return found

    async def model(self, name: str) -> dict[str, Any]:
        return await self._call("GET", f"/v1/models/{check_name(name)}")

    async def ready(self, name: str, *, wait: float) -> dict[str, Any]:
        """The ready document, waited for at most `wait` seconds."""
        return await self._call("GET", f"/v1/models/{check_name(name)}/ready", params={"wait": f"{wait:.3f}"})

    async def pin(self, name: str) -> None:
        await self._call("PUT", f"/v1/models/{check_name(name)}/pin")

    async def unpin(self, name: str) -> None:
        await self._call("DELETE", f"/v1/models/{check_name(name)}/pin")

    async def delete(self, name: str, *, force: bool) -> dict[str, Any]:
        return await self._call(
            "DELETE", f"/v1/models/{check_name(name)}", params={"force": str(force).lower()}
        )

    async def limits(self) -> dict[str, Any]:
        return await self._call("GET", "/v1/limits")

    async def set_limits(self, limits: Mapping[str, Any]) -> dict[str, Any]:
        """Replace all limits; the document of those in force now."""
        return await self._call("PUT", "/v1/limits", json=limits)

    async def rollback(self, name: str) -> dict[str, Any]:
        """Let a name lead to what it led to before; the model's document."""
        return await self._call("POST", f"/v1/models/{check_name(name)}/rollback")

    async def verify(self, name: str) -> dict[str, Any]:
        """Start reading a model again; how far that is, which its document tells from then on."""
        return await self._call("POST", f"/v1/models/{check_name(name)}/verify")

    async def warm(self, name: str) -> dict[str, Any]:
        """Start bringing a model into memory; how far that is, which its document tells from then on."""
        return await self._call("POST", f"/v1/models/{check_name(name)}/warm")

    async def sweep(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Remove what nothing needs, or say what would go."""
        return await self._call("POST", "/v1/sweeps", json=asked)

    async def make_space(self, asked: Mapping[str, Any], *, dry_run: bool) -> dict[str, Any]:
        """Evict for so many bytes or a ref, or tell what would go."""
        return await self._call("POST", "/v1/evictions", json=asked, params={"dry_run": str(dry_run).lower()})

    async def get(self, path: str) -> dict[str, Any]:
        """Any other document, such as /readyz or /v1/capacity."""
        return await self._call("GET", path)

    async def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Asked again for a while when the daemon is busy."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return await self._call_once(method, path, **options)
            except Unavailable as error:
                if error.code != "busy" or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_BUSY_PAUSE_SECONDS)

    async def _call_once(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            async with self._session.request(method, self._base + path, **options) as response:
                if response.status == 204:
                    return {}
                document = load_json(await _whole(response), f"the answer of {self._server}", _LONGEST)
                if not isinstance(document, dict):
                    raise ValueError("its answer is no document")  # noqa: TRY004 as any other that is none
                if response.status >= 400:
                    raise error_of(document)
                return document
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise Unreachable(
                f"no cachd answers at {self._server}: {error or type(error).__name__}",
                hint="start it (cachd serve), or give its address with --url or CACHD_URL",
            ) from error


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer. Raises Invalid when it does not end."""
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > _LONGEST.size_bytes:
            raise too_large(str(response.url.origin()), _LONGEST.size_bytes)
    return bytes(content)


def _connector(
    server: str, ca_file: Path | None, cert_file: Path | None, key_file: Path | None
) -> aiohttp.BaseConnector:
    if server.startswith(_UNIX):
        return aiohttp.UnixConnector(server.removeprefix(_UNIX).removeprefix("//"))
    if not server.startswith(("http://", "https://")):
        raise Invalid(
            f"{server} is no address of a daemon",
            code="bad_url",
            hint="write http://HOST:PORT, https://HOST:PORT or unix:/PATH",
        )
    if not server.startswith("https://"):
        return aiohttp.TCPConnector()
    context = Authorities(str(ca_file) if ca_file else None).context()
    if cert_file:
        try:
            context.load_cert_chain(cert_file, key_file)
        except OSError as error:
            raise Invalid(f"{cert_file} cannot be used: {reason(error)}", code="bad_certificate") from error
    return aiohttp.TCPConnector(ssl=context)
