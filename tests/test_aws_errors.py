"""Each exception of botocore becomes the error that says what to do next."""

from __future__ import annotations

from typing import Any

import pytest
from botocore import exceptions as botocore
from botocore.parsers import ResponseParserError

from cachd.errors import CachdError, Forbidden, NotFound, Unavailable
from cachd.sources.aws_errors import bucket_errors

SHOWN = "s3://models/m/file"


def answered(status: Any, code: str) -> botocore.ClientError:
    """What botocore raises for an answer of S3 with this status and code."""
    said: Any = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.ClientError(said, "HeadObject")


# What botocore raises -> the class, the code, and the status of the origin if there is one.
ERRORS: dict[str, tuple[Exception, type[CachdError], str, int | None]] = {
    "archived": (answered(403, "InvalidObjectState"), Forbidden, "archived", 403),
    "skewed": (answered(403, "RequestTimeTooSkewed"), Forbidden, "clock_skewed", 403),
    "in the future": (answered(403, "RequestInTheFuture"), Forbidden, "clock_skewed", 403),
    "expired": (answered(403, "RequestExpired"), Forbidden, "clock_skewed", 403),
    "denied": (answered(403, "AccessDenied"), Forbidden, "source_forbidden", 403),
    "no keys": (answered(401, "Unauthorized"), Forbidden, "source_unauthorized", 401),
    "no such key": (answered(404, "NoSuchKey"), NotFound, "file_not_found", 404),
    "not to be got": (answered(405, "MethodNotAllowed"), NotFound, "file_not_found", 405),
    "slow down": (answered(503, "SlowDown"), Unavailable, "rate_limited", 503),
    "throttled": (answered(400, "Throttling"), Unavailable, "rate_limited", 400),
    "too many": (answered(429, "x"), Unavailable, "rate_limited", 429),
    "failed": (answered(500, "InternalError"), Unavailable, "origin_failed", 500),
    "without a code": (answered(502, ""), Unavailable, "origin_failed", 502),
    "without anything": (botocore.ClientError({}, "HeadObject"), Unavailable, "origin_failed", 0),
    "no credentials": (botocore.NoCredentialsError(), Forbidden, "source_unauthorized", None),
    "half of them": (
        botocore.PartialCredentialsError(provider="x", cred_var="y"),
        Forbidden,
        "source_unauthorized",
        None,
    ),
    "a wrong file of them": (botocore.ConfigParseError(path="x"), Forbidden, "source_unauthorized", None),
    "a role that fails": (
        botocore.CredentialRetrievalError(provider="x", error_msg="y"),
        Unavailable,
        "credentials_failed",
        None,
    ),
    "no connection": (
        botocore.EndpointConnectionError(endpoint_url="x"),
        Unavailable,
        "connection_failed",
        None,
    ),
    "another answer": (ResponseParserError("x"), Unavailable, "origin_protocol", None),
    "a number that is none": (ValueError("x"), Unavailable, "origin_protocol", None),
    "a field of another type": (TypeError("x"), Unavailable, "origin_protocol", None),
    "a field that lacks": (KeyError("x"), Unavailable, "origin_protocol", None),
}


@pytest.mark.parametrize(("raised", "kind", "code", "status"), ERRORS.values(), ids=ERRORS)
def test_an_exception_of_botocore_becomes_an_error_with_its_code(
    raised: Exception, kind: type[CachdError], code: str, status: int | None
) -> None:
    with pytest.raises(CachdError) as refusal, bucket_errors(SHOWN):
        raise raised
    found = refusal.value
    assert (type(found), found.code, found.origin_status) == (kind, code, status)
    assert SHOWN in found.detail
    assert found.__cause__ is raised


def test_an_error_of_cachd_passes_unchanged() -> None:
    error = NotFound("x", code="file_not_found")
    with pytest.raises(NotFound) as refusal, bucket_errors(SHOWN):
        raise error
    assert refusal.value is error
