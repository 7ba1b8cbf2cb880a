"""Asks a web server about a file before it is fetched: by HEAD, or by GET if HEAD cannot be trusted.

    HEAD    200, a size above zero, not encoded    believed, until a GET contradicts it (`doubt`)
            429, 503, 401                          raised: the server asks to wait, or for a credential
            anything else                          a GET of the first byte decides
    GET     206  Content-Range: bytes 0-0/SIZE     the size, unless it is 1: that may be the size of the part
            200  Content-Length: SIZE              the size; the server sends complete files only
            else a GET of the complete file: its Content-Length, or its bytes counted, up to a bound
            none of these                          the size that HEAD states, if any

That a file is empty is believed only after a GET. The bytes of these GETs are dropped, except the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from cachd.bounded import Bounded
from cachd.errors import CachdError, Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.sources.cancel import CancelToken
from cachd.sources.checks import check_encoding, check_status
from cachd.sources.connection import Origin, origin_of
from cachd.sources.failures import bare
from cachd.sources.http import Http
from cachd.sources.http1 import Headers
from cachd.sources.response import Response
from cachd.sources.secrets import Secrets

COUNTED_BYTES = 16 << 20  # a file without a stated size is received once to count its bytes, up to so many
_MAX_DOUBTED = 1000
_NOT_ABOUT_HEAD = (401, 429, 503)
_NO_RANGE = (400, 405, 416, 500, 501)  # what servers answer to a Range that they do not understand


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What an origin says about a file. `begin`: its first byte, if a GET brought it."""

    size: int
    validator: str | None
    headers: Headers
    begin: bytes = b""


class Probe:
    """Asks about files. Thread-safe. It remembers the origins whose HEAD was wrong, and asks them by GET."""

    def __init__(self, http: Http) -> None:
        self._http = http
        self._doubted = Bounded[Origin, None](_MAX_DOUBTED)

    def doubt(self, url: str) -> None:
        """Ask this origin by GET from now on."""
        self._doubted[origin_of(urlsplit(url))] = None

    def doubts(self, url: str) -> bool:
        """Whether this origin is asked by GET."""
        return bool(self._doubted) and origin_of(urlsplit(url)) in self._doubted

    def ask(
        self, url: str, cancel_token: CancelToken, secrets: Secrets, *, may_be_empty: bool = False
    ) -> FileFacts:
        """The facts of the file at `url`. `may_be_empty`: its digest is that of an empty file.

        Raises as the methods of `Http`, and Invalid (`size_unknown`).
        """
        head = None if self.doubts(url) else self._head(url, cancel_token, secrets)
        if head is not None and (head.file_size or (may_be_empty and head.file_size == 0)):
            return _facts(head, head.file_size)
        try:
            facts = self._by_get(url, cancel_token, secrets)
        except Invalid:  # GET states no size: it does not contradict HEAD
            head = head or self._head(url, cancel_token, secrets)
            if head is None or not head.file_size:
                raise
            return _facts(head, head.file_size)
        if head is None or head.file_size != facts.size:
            self.doubt(url)
        return facts

    def _head(self, url: str, cancel_token: CancelToken, secrets: Secrets) -> Response | None:
        """The answer to HEAD; None if a GET may have another one."""
        try:
            return self._http.head(url, cancel_token, secrets=secrets)
        except (Forbidden, NotFound, Unavailable, Changed) as error:
            is_about_head = error.origin_status is not None or isinstance(error, Unavailable)
            if not is_about_head or error.origin_status in _NOT_ABOUT_HEAD:
                raise
            cancel_token.check()
            return None

    def _by_get(self, url: str, cancel_token: CancelToken, secrets: Secrets) -> FileFacts:
        with self._http.first_byte(url, cancel_token, secrets=secrets) as response:
            if response.status not in _NO_RANGE:
                check_status(response, url)
                check_encoding(response, url)
                if response.file_size is not None and (response.status == 200 or response.file_size > 1):
                    return _facts(response, response.file_size, _begin(response, cancel_token))
        with self._http.get(url, cancel_token, secrets=secrets) as response:
            check_status(response, url)
            check_encoding(response, url)
            if response.file_size is not None:
                return _facts(response, response.file_size, _begin(response, cancel_token))
            return _facts(response, _counted(response, url, cancel_token))


def _facts(response: Response, size: int | None, begin: bytes = b"") -> FileFacts:
    assert size is not None
    return FileFacts(size, response.validator, response.headers, begin)


def _begin(response: Response, cancel_token: CancelToken) -> bytes:
    """The first byte of a body."""
    buffer = bytearray(1)
    with cancel_token.reaches(response):
        count = response.readinto(memoryview(buffer))
    return bytes(buffer[:count])


def _counted(response: Response, url: str, cancel_token: CancelToken) -> int:
    """The number of bytes in a body of unstated length. Raises Invalid when that cannot be known."""
    if (response.headers.get("Transfer-Encoding") or "").lower() == "chunked":
        try:
            return len(response.content(cancel_token, at_most=COUNTED_BYTES))
        except CachdError as error:
            if error.code != "document_too_large":
                raise
    stored = response.headers.get("X-Goog-Stored-Content-Encoding") or "identity"
    unpacked = f": it is stored as {stored:.20} and unpacked on the way" if stored != "identity" else ""
    raise Invalid(
        f"the server does not state the size of {bare(url)}{unpacked}",
        code="size_unknown",
        hint="store it without Content-Encoding" if unpacked else "serve it with a Content-Length",
    )
