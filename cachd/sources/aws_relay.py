"""Sends the requests of botocore's clients through `Http`, and notices that a bucket is elsewhere."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from botocore.awsrequest import AWSPreparedRequest, AWSResponse

from cachd.foreign import SMALL, check_json, check_xml
from cachd.sources.cancel import CancelToken
from cachd.sources.failures import bare
from cachd.sources.http import Http, parsed
from cachd.sources.http1 import Request
from cachd.sources.response import Response

_REDIRECTS = (301, 302, 307, 308)
_REGION = re.compile(rb"<Region>\s*([a-z0-9-]{1,32})\s*</Region>")
_EXPECTED = re.compile(rb"expecting '([a-z0-9-]{1,32})'")  # the message of servers without <Region>
_SIGNED_FOR = re.compile(r"Credential=[^/]*/[0-9]*/([^/]*)/")
_BUSY = re.compile(rb"<Code>\s*(SlowDown|RequestLimitExceeded|Throttling|TooManyRequests)\s*</Code>")
_EXPIRED = re.compile(rb"<Code>\s*(ExpiredToken|ExpiredTokenException|TokenRefreshRequired)\s*</Code>")
# Answers of servers that require the bucket in the host's name: Alibaba OSS, Tencent COS, Huawei OBS, TOS.
_WANTS_VIRTUAL = re.compile(
    rb"<Code>\s*(SecondLevelDomainForbidden|PathStyleDomainForbidden|VirtualHostDomainRequired"
    rb"|InvalidPathAccess)\s*</Code>"
)


@dataclass(eq=False)
class Elsewhere(Exception):
    """The bucket is in this region, or wants its name in the host (`is_virtual`)."""

    region: str | None = None
    is_virtual: bool = False


class SlowDown(Exception):
    """S3 gets too many requests."""


class Expired(Exception):
    """The credentials were valid, and are no longer."""


class HttpRelay:
    """Sends the requests of botocore's clients, also those for credentials, through `Http`.

    So they use cachd's proxies and certificate authorities, the length of their answers is bounded, and a
    cancel ends them (see `until`). Only the machine's metadata service is asked by botocore itself.
    """

    def __init__(self, http: Http) -> None:
        self._http = http
        self._here = threading.local()

    @contextmanager
    def until(self, cancel_token: CancelToken) -> Iterator[None]:
        """A context in which a cancel ends the requests of the clients that this thread uses."""
        before = getattr(self._here, "cancel_token", None)
        self._here.cancel_token = cancel_token
        try:
            yield
        finally:
            self._here.cancel_token = before

    def __call__(self, request: AWSPreparedRequest, *, event_name: str, **_: object) -> AWSResponse:
        """The answer to a client's request (botocore's event `before-send`).

        Raises Elsewhere, SlowDown or Expired for such answers of S3.
        """
        headers = {name: _text(value) for name, value in request.headers.items() if name.lower() != "host"}
        body = (request.body or "").encode() if not isinstance(request.body, bytes) else request.body
        # botocore may renew credentials in a thread of its own, which has no token.
        cancel_token: CancelToken = getattr(self._here, "cancel_token", None) or CancelToken()
        sent = Request(request.method, parsed(request.url), headers, body)
        with self._http.relay(sent, cancel_token) as response:
            # A HEAD has no body, even without a Content-Length that says so (RFC 9110, 9.3.2).
            is_head = request.method == "HEAD"
            content = b"" if is_head else response.content(cancel_token, at_most=SMALL.size_bytes)
        is_object = event_name == "before-send.s3.GetObject" and response.status < 300
        if not is_object:  # else the content is a file's, and nothing parses it
            _check(content, bare(request.url))
        if response.status >= 300 and event_name.startswith("before-send.s3."):
            if response.status == 503 or _BUSY.search(content):
                raise SlowDown
            if _EXPIRED.search(content):
                raise Expired
            _check_place(headers, response, content)
        return AWSResponse(request.url, response.status, dict(response.headers.items()), _Raw(content))


def _check_place(sent: Mapping[str, str], response: Response, content: bytes) -> None:
    """Raises Elsewhere for an answer that says where the bucket is (S3 User Guide, "Request redirection").

    A 301 or 307 names the region of the bucket. So does a 400, if the request was signed for another one.
    """
    if _WANTS_VIRTUAL.search(content):
        raise Elsewhere(is_virtual=True)
    if response.status not in (*_REDIRECTS, 400):
        return
    found = _REGION.search(content) or _EXPECTED.search(content)
    region = found[1].decode() if found else response.headers.get("x-amz-bucket-region")
    signed = _SIGNED_FOR.search(sent.get("Authorization", ""))
    if not region or not re.fullmatch(r"[a-z0-9-]{1,32}", region):
        return
    if response.status != 400 or (signed and signed[1] != region):
        raise Elsewhere(region)


def _check(content: bytes, shown: str) -> None:
    """Raises Invalid for an answer that is too large for a parser, ValueError for malformed JSON.

    S3 answers in XML; some services that issue credentials answer in JSON.
    """
    if content.lstrip()[:1] in (b"{", b"["):
        check_json(content, shown)
    check_xml(content, shown)


class _Raw(io.BytesIO):
    """A body in the form that botocore reads."""

    def stream(self) -> Iterator[bytes]:
        yield self.read()


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
