"""The source of https:// and http:// refs: one file, or a directory that publishes SHA256SUMS."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from urllib.parse import unquote

from cachd.errors import Invalid, NotFound, Unavailable
from cachd.model import Digest, Extent, File, Manifest, Ref, quoted
from cachd.sources import checksums
from cachd.sources.access import Access
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http, Target
from cachd.sources.response import Response

_ASKED_AT_ONCE = 8
_PAGES = ("text/html", "application/xhtml+xml")
_REPR_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/=]+):")


class WebSource:
    """The files of web servers. Digests come from SHA256SUMS, the ref, or Repr-Digest (RFC 9530, 3).

    `headers` gives the extra headers for a URL. They go to its origin, and to none that it redirects to.
    `unique` gives another value at every call.
    """

    def __init__(
        self,
        http: Http,
        headers: Callable[[str], Mapping[str, str]] = lambda _url: {},
        unique: Callable[[], object] = uuid.uuid4,
    ) -> None:
        self._http, self._headers, self._unique = http, headers, unique

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`."""
        if ref.location.endswith("/"):
            return self._resolve_directory(ref, cancel_token)
        file = self._ask(ref, ref.base, unquote(ref.location.rpartition("/")[2]), ref.digest, cancel_token)
        return Manifest(ref.base, _revision(file), (file,))

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        """See `Source.open`."""
        validator = None if (file.validator or "").startswith("once:") else file.validator
        target = Target(file.origin, file.size, self._headers(file.origin), validator)
        return self._http.open(target, extent, cancel_token)

    def anew(self) -> None:
        """See `Source.anew`."""
        self._http.anew()

    def _resolve_directory(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        url = ref.base + checksums.NAME
        try:
            listing = self._http.read(
                url, cancel_token, at_most=checksums.LONGEST_BYTES, secrets=self._headers(url)
            )
        except NotFound as error:
            raise NotFound(
                f"{ref.base} has no {checksums.NAME}",
                code="no_checksums",
                hint=f"publish one there (sha256sum * > {checksums.NAME}), or ask for one file",
            ) from error
        listed = list(checksums.parse(listing, url).items())
        stopped = threading.Event()

        def ask_every(first: int) -> list[File]:
            """Ask about every eighth file, so that each thread works alone and on its own connection."""
            try:
                return [
                    self._ask(ref, ref.base + quoted(path), path, digest, cancel_token)
                    for path, digest in listed[first::_ASKED_AT_ONCE]
                    if not stopped.is_set()
                ]
            except BaseException:
                stopped.set()
                raise

        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            asked = list(pool.map(ask_every, range(_ASKED_AT_ONCE)))
        return Manifest(ref.base, hashlib.sha256(listing).hexdigest(), tuple(chain.from_iterable(asked)))

    def _ask(self, ref: Ref, url: str, path: str, digest: Digest | None, cancel_token: CancelToken) -> File:
        head = self._http.head(url, cancel_token, secrets=self._headers(url))
        kind = (head.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
        if kind in _PAGES and not path.lower().endswith((".html", ".htm", ".xhtml")):
            raise Unavailable(
                f"{url} answers with a page ({kind}) where a file was expected",
                code="login_page",
                hint="open it in a browser: it may be a login page, or the URL may be wrong",
            )
        size = head.file_size
        if size is None:
            raise Invalid(
                f"the server does not state the size of {url}",
                code="size_unknown",
                hint="serve it with a Content-Length",
            )
        # Without a validator a later version of the file may look the same. A unique one keeps other pulls
        # from reusing this version.
        validator = head.validator or f"once:{self._unique()}"
        digest = digest or _repr_digest(head.headers.get("Repr-Digest"))
        return File(path, size, url, digest, validator, ref.base)


def make(access: Access) -> WebSource:
    """The source of all URLs with the same settings."""
    return WebSource(access.http(), access.table.headers)


def _revision(file: File) -> str:
    """The revision of a model of one file."""
    return hashlib.sha256(f"{file.origin}\n{file.size}\n{file.stated}\n".encode()).hexdigest()


def _repr_digest(header: str | None) -> Digest | None:
    """The sha-256 in a Repr-Digest header (RFC 9530, 3); None when it has no valid one."""
    found = _REPR_DIGEST.search(header or "")
    try:
        return Digest("sha256", base64.b64decode(found[1], validate=True).hex()) if found else None
    except (binascii.Error, Invalid):
        return None
