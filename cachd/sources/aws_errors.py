"""Turns the exceptions of botocore into those of cachd, with a code and a hint for each refusal of S3."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    CredentialRetrievalError,
    InvalidConfigError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError

from cachd.errors import CachdError, Changed, Forbidden, NotFound, Unavailable
from cachd.model.bucket import bucket_and_key
from cachd.sources.checks import ABSENT
from cachd.sources.failures import said

_THROTTLED = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests")
_SKEWED = ("RequestTimeTooSkewed", "RequestInTheFuture", "RequestExpired")
_WRONG_KEYS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "InvalidSecurity",
    "AuthFailure",
)
# What botocore raises for an answer that is not S3's, or for a malformed number in one.
_INVALID_ANSWER = (ResponseParserError, ValueError, TypeError, KeyError)
_CONFIGURATION = (ProfileNotFound, InvalidConfigError, ConfigNotFound, PartialCredentialsError)
_KMS = re.compile(r"\bkms\b", re.IGNORECASE)


@contextmanager
def bucket_errors(shown: str) -> Iterator[None]:
    """A context in which the exceptions of botocore become cachd's. `shown` is the ref or object in them."""
    try:
        yield
    except ClientError as error:
        raise _by_code(shown, error) from error
    except BotoCoreError as error:
        raise _of_client(shown, error) from error
    except _INVALID_ANSWER as error:
        raise Unavailable(
            f"{shown}: the answer is not a valid answer of S3", code="origin_protocol"
        ) from error


def _of_client(shown: str, error: BotoCoreError) -> CachdError:
    """The error for a request that botocore did not send, or whose answer did not arrive."""
    if isinstance(error, (NoCredentialsError, ConfigParseError)):
        return Forbidden(
            f"no credentials for {shown}",
            code="source_unauthorized",
            hint="give its entry of `sources` credentials, a profile, instance_role or anonymous; or set"
            " AWS_SHARED_CREDENTIALS_FILE, AWS_ACCESS_KEY_ID or a role, as for any AWS client",
        )
    if isinstance(error, _CONFIGURATION):
        return Forbidden(
            f"{shown}: the AWS configuration of this node gives no credentials: {type(error).__name__}:"
            f" {error}",
            code="source_unauthorized",
            hint="check the profile of its entry of `sources`, AWS_PROFILE, AWS_CONFIG_FILE and"
            " AWS_SHARED_CREDENTIALS_FILE",
        )
    if isinstance(error, (SSOError, TokenRetrievalError)):
        return Forbidden(
            f"{shown}: the login of AWS IAM Identity Center has expired, or there was none",
            code="credentials_expired",
            hint="run `aws sso login` for the profile, as the daemon's user",
        )
    if isinstance(error, (CredentialRetrievalError, MetadataRetrievalError)):
        return Unavailable(
            f"{shown}: its credentials cannot be obtained",
            code="credentials_failed",
            hint="check the profile; a role of this machine needs instance_role: true in `sources`",
        )
    return Unavailable(f"{shown}: {type(error).__name__}", code="connection_failed")


def _by_code(shown: str, error: ClientError, now: Callable[[], float] = time.time) -> CachdError:
    """The error for a code that S3 answered with (S3 API Reference, "Error responses")."""
    stated = error.response.get("Error", {})
    code, message = str(stated.get("Code", "")), str(stated.get("Message", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "InvalidObjectState":
        return _archived(shown, str(stated.get("StorageClass", "")), status)
    if code in _SKEWED:
        return Forbidden(
            f"{shown}: {code}: this node's clock says {said(now())}",
            code="clock_skewed",
            hint="set the node's clock (chronyc tracking); S3 accepts a difference of 15 minutes",
            origin_status=status,
        )
    if code.startswith("KMS.") or (status in (400, 403) and _KMS.search(message)):
        return Forbidden(
            f"{shown}: {code}: its KMS key cannot be used",
            code="kms_denied",
            hint="let the credentials use the key (kms:Decrypt), and check that the key is enabled",
            origin_status=status,
        )
    if status == 400 and code.startswith("Invalid") and "encryption" in message.lower():
        return Forbidden(
            f"{shown} is encrypted with a customer's own key (SSE-C), and cachd has no such keys",
            code="object_encrypted",
            hint="copy the object with SSE-S3 or SSE-KMS, whose keys S3 keeps",
            origin_status=status,
        )
    return _by_status(shown, code, status)


def _by_status(shown: str, code: str, status: int) -> CachdError:
    if status == 401 or code in _WRONG_KEYS:
        return Forbidden(
            f"{shown}: {code}",
            code="source_unauthorized",
            hint="S3 does not know the access key, or the secret key is not the right one for it",
            origin_status=status,
        )
    if status == 403:
        return Forbidden(
            f"{shown}: {code}",
            code="source_forbidden",
            hint="it does not exist, or the credentials in use (or none) lack s3:GetObject or s3:ListBucket;"
            " if its owner lets the requester pay, set requester_pays: true in `sources`",
            origin_status=status,
        )
    if code == "NoSuchBucket":
        bucket, _ = bucket_and_key(shown.removeprefix("s3://"))
        return NotFound(
            f"there is no bucket {bucket} at this endpoint",
            code="bucket_not_found",
            hint="check its name, and the endpoint of its entry of `sources`",
            origin_status=status,
        )
    if status in ABSENT:
        return NotFound(
            f"{shown}: {code}",
            code="file_not_found",
            hint="check bucket and key, and whether an S3 server answers at the endpoint",
            origin_status=status,
        )
    if status in (412, 416):
        return Changed(f"{shown}: the object has changed ({status})", origin_status=status)
    return Unavailable(
        f"{shown}: {status} {code}",
        code="rate_limited" if status == 429 or code in _THROTTLED else "origin_failed",
        origin_status=status,
    )


def _archived(shown: str, storage_class: str, status: int) -> Forbidden:
    bucket, key = bucket_and_key(shown.removeprefix("s3://"))
    return Forbidden(
        f"{shown} is archived{f' in the class {storage_class:.40}' if storage_class else ''}",
        code="archived",
        hint="restore it first, which takes minutes to days: aws s3api restore-object"
        f" --bucket {bucket} --key '{key}' --restore-request Days=7",
        origin_status=status,
    )
