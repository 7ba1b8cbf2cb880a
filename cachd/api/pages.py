"""The web pages: the status page, the page of the API, and the files that both load.

A page asks the API as any other client does, so it shows and changes what its token allows. The files hold
nothing of the node. They are open to everybody, because a browser sends no token when it loads a page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

router = APIRouter(include_in_schema=False)

_FILES = Path(__file__).parent / "static"
_TOKEN_FORM = b"    <!-- token -->\n"  # stands in each page for the form of token.html
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# No other site may frame a page (a click on it could be a write) or is asked for anything. No text becomes
# HTML or a script (Trusted Types). A form never navigates, so that no token gets into a URL.
_HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self';"
    " style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, slots=True)
class _StaticFile:
    """A file of the pages. It is read once, when the daemon starts."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> _StaticFile:
        content = path.read_bytes().replace(_TOKEN_FORM, (_FILES / "token.html").read_bytes())
        return cls(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def answer(self, known: str) -> Response:
        """The file, or 304 when `known`, an If-None-Match header, names it (RFC 9110, section 13.1.2)."""
        headers = {**_HEADERS, "ETag": self.etag}
        if self.etag in {tag.strip().removeprefix("W/") for tag in known.split(",")}:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def _serve(path: str, file: str, name: str) -> None:
    """Add the route that answers with a file."""
    found = _StaticFile.read(_FILES / file)

    async def serve(request: Request) -> Response:
        return found.answer(request.headers.get("if-none-match", ""))

    router.add_api_route(path, serve, name=name)


_serve("/", "status.html", "page")
_serve("/docs", "docs.html", "docs")
for _asset in sorted(_FILES.iterdir()):
    if _asset.suffix in _TYPES and _asset.suffix != ".html":
        _serve(f"/assets/{_asset.name}", _asset.name, "asset")
