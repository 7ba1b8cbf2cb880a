"""Turns the exceptions of botocore into those of cachd."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    CredentialRetrievalError,
    NoCredentialsError,
    PaginationError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError

from cachd.errors import CachdError, Forbidden, NotFound, Unavailable
from cachd.sources.failures import said

_SKEWED = ("RequestTimeTooSkewed", "RequestInTheFuture", "RequestExpired")
# What botocore raises for an answer that is not S3's, or for a malformed number in one.
_NO_LISTING = (ResponseParserError, ValueError, TypeError, KeyError)


@contextmanager
def bucket_errors(shown: str) -> Iterator[None]:
    """A context in which the exceptions of botocore become cachd's. `shown` is the ref or object in them."""
    try:
        yield
    except ClientError as error:
        raise _by_code(shown, error) from error
    except (NoCredentialsError, PartialCredentialsError, ConfigParseError) as error:
        raise Forbidden(
            f"no credentials for {shown}",
            code="source_unauthorized",
            hint="give its entry of `sources` credentials, a profile or instance_role; or set"
            " AWS_SHARED_CREDENTIALS_FILE, AWS_ACCESS_KEY_ID or a role, as for any AWS client",
        ) from error
    except CredentialRetrievalError as error:
        raise Unavailable(
            f"{shown}: its credentials cannot be obtained",
            code="credentials_failed",
            hint="check the profile; a role of this machine needs instance_role: true in `sources`",
        ) from error
    except PaginationError as error:
        raise Unavailable(
            f"{shown}: the listing gave the same page token twice", code="origin_protocol"
        ) from error
    except BotoCoreError as error:
        raise Unavailable(f"{shown}: {type(error).__name__}", code="connection_failed") from error
    except _NO_LISTING as error:
        raise Unavailable(
            f"{shown}: the answer is not a valid answer of S3", code="origin_protocol"
        ) from error


def _by_code(shown: str, error: ClientError, now: Callable[[], float] = time.time) -> CachdError:
    """The error for a code that S3 answered with (S3 API Reference, "Error responses")."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    answer = error.response.get("ResponseMetadata", {})
    status = int(answer.get("HTTPStatusCode", 0))
    if code == "InvalidObjectState":
        return Forbidden(
            f"{shown} is archived", code="archived", hint="restore it first", origin_status=status
        )
    if code in _SKEWED:
        return Forbidden(
            f"{shown}: {code}: this node's clock says {said(now())}",
            code="clock_skewed",
            hint="set the node's clock (chronyc tracking); S3 accepts a difference of 15 minutes",
            origin_status=status,
        )
    if status in (401, 403):
        return Forbidden(
            f"{shown}: {code}",
            code="source_forbidden",
            hint="it does not exist, or these credentials may not read it (s3:GetObject, s3:ListBucket)",
            origin_status=status,
        )
    if status == 404:
        return NotFound(f"{shown}: {code}", code="file_not_found", hint="check bucket and key")
    return Unavailable(
        f"{shown}: {status} {code}",
        code="rate_limited" if code in ("SlowDown", "Throttling") or status == 429 else "origin_failed",
        origin_status=status,
    )
