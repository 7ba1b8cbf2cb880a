"""The source of https:// and http:// refs: one file, or a directory that publishes SHA256SUMS."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import uuid
from collections.abc import Callable
from urllib.parse import unquote

from cachd.errors import Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.model import Digest, Extent, File, Manifest, Ref, quoted
from cachd.sources import checksums
from cachd.sources.access import Access
from cachd.sources.at_once import ask_all
from cachd.sources.cancel import CancelToken
from cachd.sources.checksums import OF_NO_BYTES, LatestChecksums
from cachd.sources.failures import bare
from cachd.sources.http import Http, Target
from cachd.sources.probe import COUNTED_BYTES, FileFacts, Probe
from cachd.sources.response import Response
from cachd.sources.secrets import Secrets
from cachd.sources.validators import differ, weak_tag

_PAGES = ("text/html", "application/xhtml+xml")
_DOCUMENTS = ("application/json", "application/problem+json", "application/xml", "text/xml")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".ckpt", ".npz", ".h5", ".tflite")
_BEGIN_OF_PAGES = (b"", b"<", b"{", b"[", b"\xef", b" ", b"\t", b"\r", b"\n")  # \xef begins a mark of UTF-8
_HINT = (
    "servers behind one name may have different validators for the same bytes: publish SHA256SUMS there, or"
    " add #sha256=DIGEST to the ref, and the digest decides"
)
_ONCE = "once:"  # begins the mark of a file that is itself only once, which may end with its weak ETag
_REPR_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/=]+):")


class WebSource:
    """The files of web servers. Digests come from SHA256SUMS, the ref, or Repr-Digest (RFC 9530, 3).

    `secrets` gives what a request of a URL carries. It goes to its origin, and to none that it redirects to.
    `unique` gives another value at every call.
    """

    def __init__(
        self,
        http: Http,
        secrets: Callable[[str], Secrets] = lambda _url: Secrets(),
        unique: Callable[[], object] = uuid.uuid4,
    ) -> None:
        self._http, self._secrets, self._unique = http, secrets, unique
        self._probe = Probe(http)
        self._latest = LatestChecksums(self._listing)

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`."""
        if ref.location.endswith("/"):
            return self._resolve_directory(ref, cancel_token)
        file = self._ask(ref, ref.base, unquote(ref.location.rpartition("/")[2]), ref.digest, cancel_token)
        return Manifest(ref.base, _revision(file), (file,))

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        """See `Source.open`. A file with a digest may come with another validator."""
        response = self._open(file, extent, cancel_token)
        try:
            if self._is_unconfirmed(file, response):
                response.close()
                self._check_size(file, cancel_token)
                response = self._open(file, extent, cancel_token)
            if file.digest:
                self._check_version(file, response, cancel_token)
        except BaseException:
            response.close()
            raise
        return response

    def _open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        stated = file.validator or ""
        compared = None if file.digest or stated.startswith(_ONCE) else file.validator
        target = Target(file.origin, file.size, self._secrets(file.origin), compared)
        try:
            response = self._http.open(target, extent, cancel_token)
            weak = weak_tag(response.headers) if stated.startswith(_ONCE) and not file.digest else ""
            if weak and stated.endswith('"') and not stated.endswith(f" {weak}"):
                response.close()
                raise Changed(f"{bare(file.origin)}: the file has changed: its ETag is {weak:.80} now")
            return response
        except Changed as error:
            self._probe.doubt(file.origin)
            error.hint = error.hint or ("" if file.digest else _HINT)
            raise
        except Unavailable as error:
            if error.code == "origin_protocol":
                self._check_size(file, cancel_token)
            raise

    def _is_unconfirmed(self, file: File, response: Response) -> bool:
        """Whether only HEAD states the size of a small file, so that its bytes should be counted once."""
        is_small = file.size <= COUNTED_BYTES
        return is_small and response.size_is_unstated and not self._probe.doubts(file.origin)

    def _check_size(self, file: File, cancel_token: CancelToken) -> None:
        """Raises Changed when a GET states another size than the one that the file was listed with."""
        self._probe.doubt(file.origin)
        facts = self._probe.ask(file.origin, cancel_token, self._secrets(file.origin))
        if facts.size != file.size:
            raise Changed(f"{bare(file.origin)}: it has {facts.size} bytes now, not {file.size}")

    def anew(self) -> None:
        """See `Source.anew`."""
        self._http.anew()

    def _listing(self, base: str, cancel_token: CancelToken) -> bytes:
        """The SHA256SUMS of a directory."""
        url = base + checksums.NAME
        try:
            listing = self._http.read(
                url, cancel_token, at_most=checksums.LONGEST_BYTES, secrets=self._secrets(url)
            )
        except NotFound as error:
            raise NotFound(
                f"{base} has no {checksums.NAME}",
                code="no_checksums",
                hint=f"check the address; if it is right, publish one there (sha256sum * > {checksums.NAME}),"
                " or ask for one file",
            ) from error
        if listing.lstrip()[:1] == b"<":
            raise _page(url, "a page")
        return listing

    def _resolve_directory(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        listing = self._listing(ref.base, cancel_token)
        listed = list(checksums.parse(listing, ref.base + checksums.NAME).items())

        def ask(entry: tuple[str, Digest]) -> File:
            path, digest = entry
            return self._ask(ref, ref.base + quoted(path), path, digest, cancel_token)

        asked = ask_all(ask, listed, cancel_token)
        return Manifest(ref.base, hashlib.sha256(listing).hexdigest(), tuple(asked))

    def _ask(self, ref: Ref, url: str, path: str, digest: Digest | None, cancel_token: CancelToken) -> File:
        may_be_empty = digest == OF_NO_BYTES
        facts = self._probe.ask(url, cancel_token, self._secrets(url), may_be_empty=may_be_empty)
        if _is_page(facts, path) and not self._probe.doubts(url):
            self._probe.doubt(url)
            facts = self._probe.ask(url, cancel_token, self._secrets(url))
        if _is_page(facts, path) and (digest is None or facts.begin in _BEGIN_OF_PAGES):
            raise _page(url, f"{facts.headers.get('Content-Type'):.60}")
        # Without a validator a later version of the file may look the same. A unique one keeps other pulls
        # from reusing this version.
        validator = facts.validator or f"{_ONCE}{self._unique()} {weak_tag(facts.headers)}"
        digest = digest or _repr_digest(facts.headers.get("Repr-Digest"))
        return File(path, facts.size, url, digest, validator, ref.base)

    def _check_version(self, file: File, response: Response, cancel_token: CancelToken) -> None:
        """Raises Changed when the source states another digest now, after its validator has changed.

        Servers behind one name often have other validators for the same bytes, so the digest decides.
        """
        if not response.validator or not file.validator or not differ(response.validator, file.validator):
            return
        if file.base.endswith("/"):
            stated = self._latest.of(file.base, cancel_token).get(file.path)
        else:
            stated = _repr_digest(response.headers.get("Repr-Digest")) or file.digest
        if stated != file.digest:
            raise Changed(f"{bare(file.origin)}: the file has changed: its digest is {stated} now")


def make(access: Access) -> WebSource:
    """The source of all URLs with the same settings."""
    return WebSource(access.http(), access.table.secrets)


def _page(url: str, kind: str) -> Forbidden:
    return Forbidden(
        f"{bare(url)} answers with a page ({kind}) where a file was expected",
        code="login_page",
        hint="open it in a browser: it may be a login page or an error, or the URL may be wrong",
    )


def _is_page(facts: FileFacts, path: str) -> bool:
    """Whether the answer is a page for people, or a document in place of weights."""
    kind = (facts.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    if kind in _PAGES:
        return not path.lower().endswith((".html", ".htm", ".xhtml"))
    return kind in _DOCUMENTS and path.lower().endswith(_WEIGHTS)


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
