"""What the relay makes of a request of botocore, and of each answer of S3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse

from cachd.errors import CachdError, Cancelled
from cachd.sources.aws_relay import Elsewhere, Expired, HttpRelay, SlowDown
from cachd.sources.cancel import CancelToken
from tests.fetching import http
from tests.ground.raw import Asked, RawServer, reply

SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=AKID/20260131/us-east-1/s3/aws4_request, Signature=0"}
S3 = "before-send.s3.ListObjectsV2"


def relayed(
    answer: Callable[[Asked], bytes],
    *,
    method: str = "GET",
    headers: dict[str, Any] = SIGNED,
    body: Any = None,
    event: str = S3,
    asked: list[Asked] | None = None,
    token: CancelToken | None = None,
) -> AWSResponse:
    with RawServer(answer) as server:
        request = AWSPreparedRequest(method, f"{server.url}/b?x=y", headers, body, stream_output=False)
        relay = HttpRelay(http())
        try:
            with relay.until(token or CancelToken()):
                return relay(request, event_name=event)
        finally:
            if asked is not None:
                asked += server.asked


def saying(status: str, *lines: str, body: bytes = b"") -> Callable[[Asked], bytes]:
    return lambda asked: reply(asked, status, *lines, body=body)


def code(name: str) -> bytes:
    return f"<Error><Code> {name} </Code></Error>".encode()


def test_a_request_is_sent_as_botocore_made_it_but_for_its_host() -> None:
    asked: list[Asked] = []
    headers = {"X-One": "1", "X-Two": b"2", "HOST": "elsewhere"}
    relayed(saying("200 OK"), method="DELETE", headers=headers, asked=asked)
    assert (asked[0].method, asked[0].target) == ("DELETE", "/b?x=y")
    assert (asked[0].headers["x-one"], asked[0].headers["x-two"]) == ("1", "2")
    assert asked[0].headers["host"].startswith("127.0.0.1:")


@pytest.mark.parametrize("body", ["\r\n\r\n", b"\r\n\r\n"])
def test_a_body_is_sent_as_text_or_bytes(body: str | bytes) -> None:
    found = relayed(saying("200 OK", body=b"<a/>"), method="POST", headers={"Content-Length": "4"}, body=body)
    assert found.content == b"<a/>"


def test_an_answer_has_its_status_its_headers_and_its_content() -> None:
    found = relayed(saying("404 Not Found", "X-Id: 7", body=b"<Error/>"))
    assert (found.status_code, found.headers["x-id"], found.content) == (404, "7", b"<Error/>")
    assert found.url.endswith("/b?x=y")
    head = relayed(lambda asked: reply(asked, length=5), method="HEAD", event="before-send.s3.HeadObject")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "5")


@pytest.mark.parametrize("name", ["SlowDown", "RequestLimitExceeded", "Throttling", "TooManyRequests"])
def test_too_many_requests_are_known_by_their_code_or_by_503(name: str) -> None:
    with pytest.raises(SlowDown):
        relayed(saying("400 X", body=code(name)))
    with pytest.raises(SlowDown):
        relayed(saying("503 X"))
    assert relayed(saying("200 OK", body=code(name))).status_code == 200
    assert relayed(saying("503 X"), event="before-send.sts.AssumeRole").status_code == 503


@pytest.mark.parametrize("name", ["ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"])
def test_credentials_that_expired_are_known_by_their_code(name: str) -> None:
    with pytest.raises(Expired):
        relayed(saying("400 X", body=code(name)))
    assert relayed(saying("299 X", body=code(name))).status_code == 299
    with pytest.raises(Expired):
        relayed(saying("300 X", body=code(name)))


@pytest.mark.parametrize(
    ("status", "lines", "body", "region"),
    [
        (301, [], b"<Region>eu-west-1</Region>", "eu-west-1"),
        (307, [], b"<Region> eu-west-1 </Region>", "eu-west-1"),
        (302, [], b"expecting 'eu-west-1'", "eu-west-1"),
        (308, ["x-amz-bucket-region: eu-west-1"], b"", "eu-west-1"),
        (301, ["x-amz-bucket-region: EU!"], b"", None),
        (301, [], b"", None),
        (403, ["x-amz-bucket-region: eu-west-1"], b"", None),
        (400, ["x-amz-bucket-region: eu-west-1"], b"", "eu-west-1"),
        (400, ["x-amz-bucket-region: us-east-1"], b"", None),
        (301, ["x-amz-bucket-region: us-east-1"], b"", "us-east-1"),
    ],
)
def test_an_answer_may_say_in_which_region_the_bucket_is(
    status: int, lines: list[str], body: bytes, region: str | None
) -> None:
    answer = saying(f"{status} X", *lines, body=body)
    if region is None:
        assert relayed(answer).status_code == status
    else:
        with pytest.raises(Elsewhere) as found:
            relayed(answer)
        assert (found.value.region, found.value.is_virtual) == (region, False)


def test_a_400_for_a_request_that_was_not_signed_says_nothing_about_a_region() -> None:
    answer = saying("400 X", "x-amz-bucket-region: eu-west-1")
    assert relayed(answer, headers={}).status_code == 400


@pytest.mark.parametrize(
    "name",
    [
        "SecondLevelDomainForbidden",
        "PathStyleDomainForbidden",
        "VirtualHostDomainRequired",
        "InvalidPathAccess",
    ],
)
def test_a_server_may_want_the_bucket_in_the_host(name: str) -> None:
    with pytest.raises(Elsewhere) as found:
        relayed(saying("403 X", body=code(name)))
    assert (found.value.region, found.value.is_virtual) == (None, True)


@pytest.mark.parametrize("body", [b" " + b"[" * 10_000, b'{"a":', b"<!DOCTYPE a>"])
def test_what_would_harm_a_parser_is_refused_but_in_the_content_of_an_object(body: bytes) -> None:
    answer = saying("200 OK", body=body)
    with pytest.raises((CachdError, ValueError)):
        relayed(answer)
    event = "before-send.s3.GetObject"
    assert relayed(answer, event=event).content == body
    with pytest.raises((CachdError, ValueError)):
        relayed(saying("400 X", body=body), event=event)


def test_a_cancel_ends_a_request_and_the_token_of_an_outer_context_holds_again() -> None:
    token, outer = CancelToken(), CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        relayed(saying("200 OK"), token=token)
    with RawServer(saying("200 OK")) as server:
        request = AWSPreparedRequest("GET", server.url, {}, None, stream_output=False)
        relay = HttpRelay(http())
        with relay.until(outer):
            with relay.until(CancelToken()):
                relay(request, event_name=S3)
            outer.cancel()
            with pytest.raises(Cancelled):
                relay(request, event_name=S3)
        assert relay(request, event_name=S3).status_code == 200, "without a token"
