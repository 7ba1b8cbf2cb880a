"""Tries the credentials of a source of s3:// refs: where they come from, and whether S3 accepts them."""

from __future__ import annotations

from cachd.model.bucket import bucket_and_key
from cachd.sources.aws_errors import bucket_errors
from cachd.sources.cancel import CancelToken
from cachd.sources.s3 import BucketSource


def credentials_from(source: BucketSource, cancel_token: CancelToken) -> str | None:
    """See `Signed.credentials_from`. Raises Forbidden, Unavailable or Cancelled."""
    with bucket_errors("S3"):
        return source.buckets.credentials_from(cancel_token)


def try_credentials(source: BucketSource, location: str, cancel_token: CancelToken) -> None:
    """Use the credentials in one request: for an object below `location`; if it is empty, for all buckets.

    Raises as `Source.resolve`.
    """
    if not location:
        with bucket_errors("S3"):
            source.buckets.ask("", cancel_token, lambda client: client.list_buckets())
        return
    bucket, key = bucket_and_key(location)
    query = {"Bucket": bucket, "Prefix": key, "MaxKeys": 1, **source.buckets.payer}
    with bucket_errors(f"s3://{bucket}/{key}"):
        source.buckets.ask(bucket, cancel_token, lambda client: client.list_objects_v2(**query))
