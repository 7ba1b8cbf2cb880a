"""Answers the calls of the Hub's API: what a revision has, and its files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from urllib.parse import urlencode

from cachd.errors import CachdError, NotFound
from cachd.kernel import durable
from cachd.model import Extent, File, is_hub_id, quoted
from cachd.policy.hosts import OwnNames
from cachd.report.models import Models
from cachd.serve import listings
from cachd.serve.answer import (
    Answer,
    Body,
    document,
    listing,
    no_entry,
    no_repository,
    refusal,
    refused,
)
from cachd.serve.call import Call, Kind, address_of, call_of, path_of, paths_of, query_of
from cachd.serve.callers import Callers
from cachd.serve.content import ArrivingBody, ReadyBody, is_here
from cachd.serve.exchange import Request
from cachd.serve.repositories import Repositories, Revision
from cachd.store.ingest import HELD_BYTES

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:[0-9]{1,5})?")
_HF_HUB = re.compile(r"\bhf_hub/([0-9]{1,4})\.([0-9]{1,4})\b")
_NEVER_RESUMES_SINCE = (1, 18)
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})|bytes=-([0-9]{1,18})")


class HubApi:
    """The calls of the endpoint. `hasten`: fetches a file of a running pull before the others.

    `names`: which names in a Host header are this node's.
    """

    def __init__(
        self,
        models: Models,
        repositories: Repositories,
        callers: Callers,
        hasten: Callable[[File], bool],
        *,
        names: OwnNames,
    ) -> None:
        self._names = names
        self._models, self._store = models, models.store
        self._repositories, self._callers, self._hasten = repositories, callers, hasten

    def answer(self, request: Request) -> Answer:
        """The answer to a request."""
        if self._is_of_a_page(request):
            return refusal(403, "requests of web pages, and names that are not this node's, are refused")
        call = call_of(request)
        if call is None:
            return refusal(404, "cachd does not serve this address of the Hub's API")
        if not is_hub_id(call.repo):
            return replace(no_repository(call.repo), call=call.kind.name)
        try:
            self._callers.check(call.repo, request.headers.get("authorization"), request.peer)
            answer = self._answer(call, request)
        except CachdError as error:
            answer = refused(error, call.repo)
        return replace(answer, call=call.kind.name)

    def _is_of_a_page(self, request: Request) -> bool:
        """Whether a browser may have sent a request for a page of another site. Clients of the Hub send none.

        A page may have its own name lead to this node (DNS rebinding), and so read every answer.
        """
        headers = request.headers
        is_cross_site = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        return is_cross_site or "origin" in headers or not self._names.has(headers.get("host", ""))

    def _answer(self, call: Call, request: Request) -> Answer:
        if call.kind is Kind.refs:
            return self._refs(call, request)
        found = self._repositories.revision(call.repo, call.revision, request.peer)
        match call.kind:
            case Kind.info:
                blobs = query_of(request).get("blobs", "").lower() in ("true", "1")
                return listing(listings.info(call.repo, found.manifest, blobs=blobs))
            case Kind.tree:
                return _tree(call, found, request)
            case Kind.paths_info:
                return listing(listings.some(found.manifest, paths_of(request)))
        return self._file(call, found, request)

    def _refs(self, call: Call, request: Request) -> Answer:
        branches = self._repositories.branches(call.repo)
        if not branches:
            found = self._repositories.revision(call.repo, "main", request.peer)
            branches = {"main": found.commit}
        shown = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in branches.items()
        ]
        return document({"branches": shown, "tags": [], "converts": [], "pullRequests": []})

    # --- files ---

    def _file(self, call: Call, found: Revision, request: Request) -> Answer:
        file = found.file(call.path)
        if file is None and not found.lacks(call.path):
            try:
                found = self._repositories.with_file(found, call.path, request.peer)
            except NotFound as error:
                if error.code != "file_not_found":
                    raise
                return no_entry(call.path, found.commit)
            file = found.file(call.path)
        if file is None:
            return no_entry(call.path, found.commit)
        with durable.disk_errors(self._store.layout.root):
            headers = _headers(found, file)
            if found.snapshot is not None or is_here(self._store.content, file):
                return self._ready(call, found, file, request, headers)
            return self._arriving(call, found, file, request, headers)

    def _ready(
        self, call: Call, found: Revision, file: File, request: Request, headers: dict[str, str]
    ) -> Answer:
        """The answer for a file whose verified bytes are here."""
        offer = self._store.content.offers.of(file)
        if call.attempt is not None and not offer.is_right(call.attempt):
            return _gone(file, call.attempt)
        asked = _range_of(request, file)
        if asked and asked.is_resume and (offer.has_wrong_readers or (call.attempt or 1) > 1):
            asked = None  # whoever resumes may have bytes that were never verified: he gets the complete file
        if found.snapshot is None:
            path = self._store.content.path(file.blob)
        else:
            path = self._store.layout.tree(found.snapshot.manifest) / found.manifest.place_of(file.path)
            self._models.note_use(found.snapshot.name)
        return _ranged(file, asked, headers, lambda extent: ReadyBody(path, extent, self._store.content))

    def _arriving(
        self, call: Call, found: Revision, file: File, request: Request, headers: dict[str, str]
    ) -> Answer:
        """The answer for a file that is being pulled: a redirect, or the bytes of an attempt."""
        pull, attempt = found.pull, call.attempt
        assert pull is not None
        self._hasten(file)
        offer = self._store.content.offers.of(file)
        number, waits = offer.next_attempt, _may_resume_anywhere(request)
        if attempt is None and file.size > HELD_BYTES and not waits:
            address = address_of(call, found.commit, number, quoted(file.path))
            return Answer(307, {**headers, "Location": address})
        if attempt is not None and attempt != number:
            return _gone(file, attempt)
        asked = _range_of(request, file)
        if asked and asked.is_resume and number > 1:
            asked = None  # as for a file that is here
        # A range with an end is a piece of a file, unless it can be the rest of an attempt that has readers.
        is_piece = asked is not None and asked.has_end and not (asked.is_resume and offer.has_wrong_readers)
        if waits or is_piece:
            attempt = None  # nothing is sent before the digest is right

        def body(extent: Extent) -> ArrivingBody:
            offer.follow(extent.start)  # before the client hears of it
            return ArrivingBody(file, extent, offer, pull, self._store.content, self._hasten, attempt)

        return _ranged(file, asked, headers, body)


def _tree(call: Call, found: Revision, request: Request) -> Answer:
    """A page of a tree, with a link to the next one."""
    if not listings.has_directory(found.manifest, call.path):
        return no_entry(call.path, found.commit)
    query = query_of(request)
    is_recursive = query.get("recursive", "").lower() in ("true", "1")
    start, limit = _number(query.get("cursor"), 0), _number(query.get("limit"), listings.PAGE)
    stop = start + max(1, min(limit, listings.PAGE))
    entries = listings.tree(found.manifest, call.path, recursive=is_recursive)
    page = list(islice(entries, start, stop))
    if next(entries, None) is None:
        return document(page)
    host = request.headers.get("host", "")
    base = f"http://{host}" if _HOST.fullmatch(host) else ""
    following = urlencode({**query, "cursor": stop})
    path = path_of(request)
    return document(page, Link=f'<{base}{path}?{following}>; rel="next"')


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 10 else default


def _headers(found: Revision, file: File) -> dict[str, str]:
    etag = _etag(file)
    return {
        "X-Repo-Commit": found.commit,
        "ETag": etag,
        "X-Linked-Etag": etag,
        "X-Linked-Size": str(file.size),
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }


def _etag(file: File) -> str:
    return f'"{listings.etag_of(file)}"'


@dataclass(frozen=True, slots=True)
class _Range:
    """The range of a file that a request asks for. `has_end`: it says where it ends. It may be empty."""

    start: int
    stop: int
    has_end: bool
    size: int

    @property
    def is_resume(self) -> bool:
        """Whether the client may have the bytes before this range, and wants the rest."""
        return 0 < self.start < self.stop == self.size


def _range_of(request: Request, file: File) -> _Range | None:
    """The range that was asked for; None without one. One of another form is ignored (RFC 9110, 14.2).

    A client with bytes of another file sends the ETag of that one, and gets the complete file (13.1.5).
    """
    if request.headers.get("if-range", _etag(file)) != _etag(file):
        return None
    found = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if not found:
        return None
    first, last, suffix = found.groups()
    if last and int(last) < int(first):
        return None
    if suffix:
        return _Range(max(0, file.size - int(suffix)), file.size, has_end=False, size=file.size)
    stop = min(int(last) + 1 if last else file.size, file.size)
    return _Range(int(first), stop, has_end=bool(last), size=file.size)


def _ranged(
    file: File, asked: _Range | None, headers: dict[str, str], body: Callable[[Extent], Body]
) -> Answer:
    """The answer with the range that was asked for, or with the complete file."""
    if asked is None:
        return Answer(200, headers, body(Extent(0, file.size)))
    start, stop = asked.start, asked.stop
    if start >= stop:
        return refusal(416, f"{file.path} has {file.size} bytes", None, Content_Range=f"bytes */{file.size}")
    ranged = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}
    return Answer(206, ranged, body(Extent(start, stop)))


def _may_resume_anywhere(request: Request) -> bool:
    """Whether a later download may go on with the bytes of a failed one, perhaps at another node.

    huggingface_hub does so before 1.18, and so do llama.cpp and programs such as curl.
    """
    found = _HF_HUB.search(request.headers.get("user-agent", ""))
    return found is None or (int(found[1]), int(found[2])) < _NEVER_RESUMES_SINCE


def _gone(file: File, attempt: int) -> Answer:
    return refusal(410, f"{file.path}: the bytes of attempt {attempt} were wrong; ask for the file again")
