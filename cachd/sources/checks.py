"""Decides whether an HTTP response is the one that was asked for."""

from __future__ import annotations

import re

from cachd.errors import Changed, Forbidden, NotFound, Unavailable
from cachd.model import Extent
from cachd.sources.failures import bare, protocol_error, requested_wait, retry_after
from cachd.sources.http1 import number
from cachd.sources.response import Response, content_range
from cachd.sources.source import NoRanges
from cachd.sources.validators import differ

# Values of Content-Encoding that change no byte. `aws-chunked` frames an upload to S3, and the server has
# removed the frames. The others are no codings of HTTP, but texts that somebody stored with the object.
_CHARSETS = ("utf-8", "utf8", "ascii", "us-ascii", "iso-8859-1")
_MAX_BEFORE_BYTES = 1 << 20  # of a block of a cache, before the bytes that were asked for
_NO_CODINGS = ("identity", "aws-chunked", "none", "null", "undefined", "binary", "7bit", "8bit", *_CHARSETS)

REFUSALS = (402, 403, 406, 451)  # 406 is what firewalls of web servers say to a client that they dislike
ABSENT = (404, 405, 410)  # 405: what is there answers no GET, such as a folder of WebDAV


class UnknownRange(NoRanges):
    """A 206 whose headers do not say which bytes of the file it holds."""


def check_status(response: Response, url: str) -> None:
    """Raises Forbidden, NotFound, Changed or Unavailable for a status other than 200 and 206."""
    status = response.status
    if status in (200, 206):
        return
    shown = bare(url)
    hub_says = response.headers.get("X-Error-Code")  # the Hub sends it where the status alone is ambiguous
    reason = f"{shown}: {status} {response.reason}".rstrip()
    if status == 401:
        raise Forbidden(
            reason,
            code="source_unauthorized",
            hint="it wants credentials: give it a headers_file in `sources`, or check the one that it has",
            origin_status=status,
            hub_error=hub_says,
        )
    if status in REFUSALS:
        raise Forbidden(
            reason,
            code="source_forbidden",
            hint="check that its credentials, if it has any, may read it; some origins answer this for a"
            " file that does not exist",
            origin_status=status,
            hub_error=hub_says,
        )
    if status in ABSENT:
        raise NotFound(reason, code="file_not_found", hint="check the name", origin_status=status)
    if status in (412, 416):
        raise Changed(f"{shown}: the file has changed ({status})", origin_status=status)
    wait = requested_wait(response.headers)
    raise Unavailable(
        f"{reason}; the origin asks for a pause of {wait:.0f} s" if wait else reason,
        code="rate_limited" if status == 429 else "origin_failed",
        retry_after=retry_after(response.headers),
        origin_status=status,
    )


def check_encoding(response: Response, url: str) -> None:
    """Raises Unavailable for an encoded body (RFC 9110, 8.4): a digest is of the file's own bytes."""
    stated = response.headers.get("Content-Encoding")
    if not stated:
        return
    codings = [each for each in re.split(r"[\s,]+", stated.lower()) if each and each not in _NO_CODINGS]
    if codings:
        raise Unavailable(
            f"{bare(url)}: Content-Encoding is {stated:.40}, though the request asks for identity",
            code="content_encoded",
            hint="store the file without Content-Encoding, or let the server send it as it is",
        )


def check_validator(response: Response, url: str, validator: str | None) -> None:
    """Raises Changed when the response has another validator than `validator`."""
    stated = response.validator
    if validator and stated and differ(stated, validator):
        raise Changed(
            f"{bare(url)}: the file has changed: its validator was {validator:.80} and is now {stated:.80}"
        )


def announced(response: Response, url: str, size: int, extent: Extent) -> Extent:
    """The extent of the file that is in the body, after a check of the headers (RFC 9110, 14.4 and 8.6).

    `size`: the bytes of the file. `extent`: what was asked for. A partial answer has all of it or only its
    first bytes; it may also begin a little before it and end after it, as caches send complete blocks.

    Raises NoRanges if the complete file comes instead of a part, UnknownRange if no header says which part
    comes, Changed if the file has another size, Unavailable if the headers contradict the request.
    """
    length_header = response.stated_length
    length = number(length_header)
    if length_header is not None and length is None:
        raise protocol_error(url, f"Content-Length is {length_header:.40}")
    found = extent
    if response.is_partial:
        header = response.headers.get("Content-Range")
        stated = content_range(header)
        if extent.size != size and _is_multipart(response):
            raise NoRanges(url)
        if extent.size != size and stated is None:
            raise UnknownRange(url)
        first, last, total = stated or (-1, -1, -1)
        begins = max(0, extent.start - _MAX_BEFORE_BYTES) <= first <= extent.start <= last
        if not begins and stated == (0, size - 1, size):  # the complete file, though with 206
            raise NoRanges(url)
        if not begins or last >= size or total not in (size, None):
            wanted = f"bytes {extent.start}-{extent.stop - 1}/{size}"
            raise protocol_error(url, f"Content-Range is {header or 'none':.60}, not {wanted}")
        found = Extent(first, last + 1)
    elif extent.size != size:
        raise NoRanges(url)
    elif length is not None and length != size:
        kind = response.headers.get("Content-Type") or "no type"
        raise Changed(f"{bare(url)}: {length} bytes of {kind:.60} where {size} were expected")
    if length is not None and length != found.size:
        raise protocol_error(url, f"Content-Length is {length}, not {found.size}")
    return found


def _is_multipart(response: Response) -> bool:
    """Whether a single range came in the form of several (RFC 9110, 15.3.7.2), which cachd does not read."""
    return (response.headers.get("Content-Type") or "").lower().startswith("multipart/byteranges")
