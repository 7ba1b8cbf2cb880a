"""The source of s3:// refs: botocore lists a bucket and signs URLs, `Http` downloads the objects."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from cachd.errors import Changed, Forbidden, Invalid, NotFound
from cachd.foreign import too_large
from cachd.model import Digest, Entries, Extent, File, Manifest, Ref, check_path
from cachd.sources import checksums
from cachd.sources.access import Access
from cachd.sources.aws import Keys, Signed, SignIn
from cachd.sources.aws_errors import bucket_errors
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http, Target
from cachd.sources.response import Response

_ASKED_AT_ONCE = 16
_MAX_PAGES = 1000
_AS_AWS_CLIENTS = Keys()
# Field of HeadObject's answer -> our algorithm, the strongest first. S3 computes a CRC64NVME if the uploader
# sends no checksum (S3 User Guide, "Checking object integrity").
_CHECKSUMS = {
    "ChecksumSHA256": "sha256",
    "ChecksumCRC64NVME": "crc64nvme",
    "ChecksumCRC32C": "crc32c",
    "ChecksumSHA1": "sha1",
    "ChecksumCRC32": "crc32",
}


class BucketSource:
    """The objects below a prefix. Digests: the prefix's SHA256SUMS, else full-object checksums, else none.

    COMPOSITE checksums and ETags are not used: the former are digests of part digests, the latter may be no
    digests at all (S3 User Guide, "Checking object integrity"; S3 API Reference, "Object").
    """

    def __init__(
        self, http: Http, *, endpoint_url: str | None, region: str | None, keys: Keys = _AS_AWS_CLIENTS
    ) -> None:
        self._http = http
        self._sign_in = SignIn(http, keys, endpoint_url=endpoint_url, region=region)

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`."""
        bucket, _, prefix = ref.location.partition("/")
        with bucket_errors(ref.base), self._sign_in.until(cancel_token):
            client = self._sign_in.fresh(cancel_token).client
            listed = self._list(client, bucket, prefix, cancel_token)
            keys = {path: key for path, (key, _) in listed.items()}
            if not keys:
                raise NotFound(
                    f"{ref.base} holds no objects",
                    code="file_not_found",
                    hint="check the bucket, the prefix and the permission s3:ListBucket",
                )
            digests = self._checksums(bucket, keys, cancel_token)

            def ask(path: str) -> File:
                with self._sign_in.until(cancel_token):
                    return self._ask(client, bucket, keys[path], path, digests.get(path))

            with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
                files = tuple(pool.map(ask, sorted(keys.keys() - {checksums.NAME})))
            if self._list(client, bucket, prefix, cancel_token) != listed:
                raise Changed(f"{ref.base}: objects were added, removed or changed while they were listed")
        state = "".join(f"{f.path}\n{f.size}\n{f.validator}\n{f.stated}\n" for f in files)
        return Manifest(ref.base, hashlib.sha256(state.encode()).hexdigest(), files)

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        """See `Source.open`. When S3 refuses the credentials, they are read again."""
        try:
            return self._open(file, extent, cancel_token, self._sign_in.kept)
        except Forbidden as error:
            if error.origin_status != 403:
                raise
            return self._open(file, extent, cancel_token, self._sign_in.fresh)

    def anew(self) -> None:
        """See `Source.anew`."""
        self._http.anew()

    def _open(
        self, file: File, extent: Extent, cancel_token: CancelToken, sign_in: Callable[[CancelToken], Signed]
    ) -> Response:
        with bucket_errors(file.origin), self._sign_in.until(cancel_token):
            url = sign_in(cancel_token).link(file.origin)
        return self._http.open(Target(url, file.size, validator=file.validator), extent, cancel_token)

    def _list(
        self, client: Any, bucket: str, prefix: str, cancel_token: CancelToken
    ) -> dict[str, tuple[str, str]]:
        """Key and ETag of every object, by its path below the prefix. "Directory" objects are skipped."""
        shown = f"s3://{bucket}/{prefix}"
        keys: dict[str, tuple[str, str]] = {}
        folder = prefix if prefix.endswith("/") else prefix + "/"
        entries = Entries(shown)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for number, page in enumerate(pages, start=1):
            if number > _MAX_PAGES:
                raise too_large(f"the listing of {shown}", _MAX_PAGES, unit="pages")
            cancel_token.count(len(page.get("Contents", ())))
            for found in page.get("Contents", ()):
                key = found["Key"]
                if key == prefix and not key.endswith("/"):
                    return {key.rpartition("/")[2]: (key, found["ETag"])}
                if key.startswith(folder) and not key.endswith("/"):
                    path = check_path(key.removeprefix(folder))
                    if path in keys:
                        raise Invalid(f"{shown} lists {path!r} twice", code="bad_manifest")
                    entries.add(key, found["ETag"])
                    keys[path] = key, found["ETag"]
        return keys

    def _checksums(
        self, bucket: str, keys: Mapping[str, str], cancel_token: CancelToken
    ) -> dict[str, Digest]:
        """The digests in the prefix's SHA256SUMS, by path; empty when there is none."""
        if checksums.NAME not in keys:
            return {}
        shown = f"s3://{bucket}/{keys[checksums.NAME]}"
        content = self._http.read(
            self._sign_in.kept(cancel_token).link(shown), cancel_token, at_most=checksums.LONGEST_BYTES
        )
        return checksums.parse(content, shown)

    def _ask(self, client: Any, bucket: str, key: str, path: str, listed: Digest | None) -> File:
        with bucket_errors(f"s3://{bucket}/{key}"):
            head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
            digest = listed or _full_object_checksum(head)
            return File(path, head["ContentLength"], f"s3://{bucket}/{key}", digest, head["ETag"])


def make(access: Access) -> BucketSource:
    """The S3 endpoint of some settings."""
    columns = access.columns
    named = columns.get("credentials") or columns.get("profile") or columns.get("instance_role")
    return BucketSource(
        access.http(),
        endpoint_url=columns.get("endpoint"),
        region=columns.get("region"),
        keys=Keys(
            columns.get("credentials"),
            columns.get("profile"),
            instance_role=columns.get("instance_role", False),
            are_none=not (access.may_use_own_credentials or named),
        ),
    )


def _full_object_checksum(head: Mapping[str, Any]) -> Digest | None:
    """The checksum of the complete object (S3 User Guide, "Checking object integrity").

    `head` is the answer to HeadObject. A checksum that ends in `-N` is of N part checksums: it is ignored.
    """
    if head.get("ChecksumType") == "COMPOSITE":
        return None
    for name, algorithm in _CHECKSUMS.items():
        checksum = head.get(name)
        if checksum and "-" not in checksum:
            with suppress(binascii.Error, Invalid):  # a malformed checksum is ignored
                return Digest(algorithm, base64.b64decode(checksum, validate=True).hex())
    return None
