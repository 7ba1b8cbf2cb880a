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


def said_by_s3(status: int, code: str, message: str = "no", **more: str) -> CachdError:
    """The error for an answer of S3 with this status, code and message."""
    stated = {"Code": code, "Message": message, **more}
    answer: Any = {"Error": stated, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(CachdError) as refusal, bucket_errors(SHOWN):
        raise botocore.ClientError(answer, "GetObject")
    assert refusal.value.origin_status == status
    return refusal.value


@pytest.mark.parametrize(
    ("status", "code", "message", "expected"),
    [
        (400, "KMS.DisabledException", "no", "kms_denied"),
        (403, "AccessDenied", "not authorized to perform kms:Decrypt", "kms_denied"),
        (400, "BadRequest", "The KMS key is gone", "kms_denied"),
        (500, "InternalError", "KMS is away", "origin_failed"),
        (403, "AccessDenied", "no akms here", "source_forbidden"),
        (400, "InvalidRequest", "The object was stored using a form of Encryption", "object_encrypted"),
        (403, "InvalidRequest", "a form of encryption", "source_forbidden"),
        (400, "BadRequest", "a form of encryption", "origin_failed"),
        (403, "InvalidAccessKeyId", "no", "source_unauthorized"),
        (403, "SignatureDoesNotMatch", "no", "source_unauthorized"),
        (400, "InvalidToken", "no", "source_unauthorized"),
        (404, "NoSuchBucket", "no", "bucket_not_found"),
        (410, "Gone", "no", "file_not_found"),
        (412, "PreconditionFailed", "no", "changed"),
        (416, "InvalidRange", "no", "changed"),
        (400, "BadRequest", "no", "origin_failed"),
    ],
)
def test_a_code_and_a_message_of_s3_say_what_is_wrong(
    status: int, code: str, message: str, expected: str
) -> None:
    error = said_by_s3(status, code, message)
    assert error.code == expected
    assert bool(error.hint) == (expected not in ("changed", "origin_failed"))
    assert "models" in error.detail


@pytest.mark.parametrize("storage_class", ["", "GLACIER"])
def test_an_archived_object_says_its_class_and_how_to_restore_it(storage_class: str) -> None:
    error = said_by_s3(403, "InvalidObjectState", StorageClass=storage_class)
    assert error.detail == f"{SHOWN} is archived" + (" in the class GLACIER" if storage_class else "")
    assert "--bucket models --key 'm/file'" in error.hint


@pytest.mark.parametrize(
    ("raised", "code", "hint"),
    [
        (botocore.ProfileNotFound(profile="x"), "source_unauthorized", "check the profile"),
        (botocore.SSOTokenLoadError(error_msg="x"), "credentials_expired", "aws sso login"),
        (botocore.TokenRetrievalError(provider="x", error_msg="y"), "credentials_expired", "aws sso login"),
        (botocore.MetadataRetrievalError(error_msg="x"), "credentials_failed", "instance_role: true"),
        (botocore.ReadTimeoutError(endpoint_url="x"), "connection_failed", ""),
    ],
)
def test_a_failure_of_the_client_says_where_its_credentials_come_from(
    raised: Exception, code: str, hint: str
) -> None:
    with pytest.raises(CachdError) as refusal, bucket_errors(SHOWN):
        raise raised
    assert refusal.value.code == code
    assert hint in refusal.value.hint
    assert bool(hint) == bool(refusal.value.hint)
