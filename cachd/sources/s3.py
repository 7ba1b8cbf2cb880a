"""The source of s3:// refs: botocore lists a bucket and signs URLs, `Http` downloads the objects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from cachd.bounded import Bounded
from cachd.errors import CachdError, Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.model import MAX_FILES, Digest, Extent, File, Manifest, Ref, Unusable
from cachd.model.bucket import bucket_and_key
from cachd.model.leftovers import not_ended, unfinished
from cachd.sources import checksums
from cachd.sources.access import Access
from cachd.sources.aws import Keys
from cachd.sources.aws_errors import bucket_errors
from cachd.sources.bucket_listing import BucketListing
from cachd.sources.buckets import Buckets, Service
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http, Target
from cachd.sources.objects import Listed, Object
from cachd.sources.response import Response
from cachd.sources.secrets import Secrets

_ASKED_AT_ONCE = 16
_FIRST_BYTE = {"Range": "bytes=0-0"}
_MAX_HOSTS = 1000
_AS_AWS_CLIENTS, _AWS = Keys(), Service()
# After these statuses, S3 is asked by a GET through botocore, whose errors say the reason: an answer to HEAD
# has none, and `Http` does not read that of a signed URL. 404 of HEAD is not among them: its reason is clear.
_UNEXPLAINED = (301, 307, 400, 401, 403, 405, 501)


class BucketSource:
    """The objects below a prefix. Digests: the prefix's SHA256SUMS, else full-object checksums, else none.

    In a versioned bucket, a file is the version that was the latest when its prefix was resolved. `beneath`
    makes a client that may also request hosts below the endpoint's domain: URLs may name the bucket there
    (bucket.endpoint). The revision is a hash of the listing.
    """

    def __init__(
        self,
        http: Http,
        service: Service = _AWS,
        keys: Keys = _AS_AWS_CLIENTS,
        beneath: Callable[[str], Http] | None = None,
        *,
        max_files: int = MAX_FILES,
    ) -> None:
        self._clients = _Clients(http, service.endpoint_url, beneath)
        self._buckets = Buckets(http, service, keys)
        self._listing = BucketListing(self._buckets, max_files)
        self._unversioned: set[str] = set()  # buckets whose versions these credentials may not read
        self._without_checksums: set[str] = set()  # buckets whose server refuses to be asked for checksums

    @property
    def buckets(self) -> Buckets:
        """The buckets of its service, with its credentials."""
        return self._buckets

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`."""
        bucket, key = bucket_and_key(ref.location)
        with bucket_errors(ref.base):
            self._buckets.renew(cancel_token)
        try:
            return self._manifest(ref, bucket, key, cancel_token)
        except Forbidden as error:
            self._suggest_anonymous(error, bucket, key, cancel_token)
            raise

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        """See `Source.open`. When S3 refuses, it is asked why: credentials may have expired, for example."""
        bucket, key = bucket_and_key(file.origin.removeprefix("s3://"))
        try:
            return self._open(file, extent, cancel_token)
        except (Forbidden, NotFound, Unavailable) as error:
            if error.origin_status not in (*_UNEXPLAINED, 404):
                raise
        with bucket_errors(file.origin):
            self._buckets.renew(cancel_token)
        version = Object.version_of(file.validator)
        try:
            self._first_byte(bucket, key, version, cancel_token)
        except Forbidden:
            if version is None:
                raise
            self._first_byte(bucket, key, None, cancel_token)
            self._unversioned.add(bucket)  # s3:GetObjectVersion is a permission of its own
        return self._open(file, extent, cancel_token)

    def anew(self) -> None:
        """See `Source.anew`."""
        self._clients.anew()

    # --- listing ---

    def _manifest(self, ref: Ref, bucket: str, key: str, cancel_token: CancelToken) -> Manifest:
        """The file or the files that a ref names."""
        if key and not key.endswith("/"):
            return self._exactly_or_below(ref, bucket, key, cancel_token)
        return self._below(ref, bucket, key, self._listing.read(bucket, key, cancel_token), cancel_token)

    def _exactly_or_below(self, ref: Ref, bucket: str, key: str, cancel_token: CancelToken) -> Manifest:
        """The file that is the object of exactly this key, else those below `key/`."""
        single: Object | None = None
        refusal: Forbidden | None = None
        try:
            single = self._head(bucket, key, cancel_token)
        except NotFound:
            pass
        except Forbidden as error:  # the listing decides: S3 may answer 403 for a key that is not there
            refusal = error
        try:
            listed = self._listing.read(bucket, key, cancel_token)
        except Forbidden as error:
            if single is None or not single.size:
                raise refusal or error from error
            listed = {}  # s3:ListBucket is a permission of its own, which one object does not need
        if single is not None and not single.is_folder and (single.size or not listed):
            return _manifest_of(ref, [self._only_file(ref, bucket, key, single, listed)])
        if not listed and refusal is not None:
            raise refusal
        return self._below(ref, bucket, key, listed, cancel_token)

    def _below(
        self, ref: Ref, bucket: str, key: str, listed: Mapping[str, Listed], cancel_token: CancelToken
    ) -> Manifest:
        """The files of a listing."""
        if not listed:
            raise _empty(ref.base)
        begun = {path: target for path in listed if (target := unfinished(path))}
        digests = self._checksums(bucket, listed, cancel_token)

        def ask(path: str) -> File | None:
            found = self._ask(bucket, listed[path], cancel_token)
            return None if found.is_folder else found.file(path, bucket, listed[path].key, digests.get(path))

        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            asked = pool.map(ask, sorted(listed.keys() - begun.keys() - {checksums.NAME}))
            files = [file for file in asked if file is not None]
        if self._listing.read(bucket, key, cancel_token) != listed:
            raise Changed(f"{ref.base}: objects were added, removed or changed while they were listed")
        if not files and not begun:
            raise _empty(ref.base)
        return _manifest_of(
            ref, files, [Unusable(begun[path], not_ended(f"{ref.base}: {path}")) for path in sorted(begun)]
        )

    def _only_file(
        self, ref: Ref, bucket: str, key: str, single: Object, listed: Mapping[str, Listed]
    ) -> File:
        """The file of a ref that names one object. Raises Invalid if it names a folder of others, too."""
        if listed:
            raise Invalid(
                f"{ref.base} is an object of {single.size} bytes and the folder of {len(listed)} others, such"
                f" as {min(listed)!r:.200}",
                code="bad_manifest",
                hint=f"write {ref.base}/ for the folder, or rename the object",
            )
        if not single.size:
            raise NotFound(
                f"{ref.base} is an empty object that stands for a folder, and no object is below it",
                code="file_not_found",
                hint="check the prefix: the objects may be elsewhere, or not uploaded yet",
            )
        return single.file(key.rpartition("/")[2], bucket, key, None)

    def _checksums(
        self, bucket: str, listed: Mapping[str, Listed], cancel_token: CancelToken
    ) -> dict[str, Digest]:
        """The digests in the prefix's SHA256SUMS, by path; empty when there is none."""
        if checksums.NAME not in listed:
            return {}
        key = listed[checksums.NAME].key
        shown = f"s3://{bucket}/{key}"
        with bucket_errors(shown):
            url = self._buckets.link(bucket, key, None, cancel_token)
        content = self._clients.of(url).read(
            url, cancel_token, at_most=checksums.LONGEST_BYTES, secrets=Secrets(self._buckets.headers)
        )
        return checksums.parse(content, shown)

    # --- one object ---

    def _ask(self, bucket: str, listed: Listed, cancel_token: CancelToken) -> Object:
        """What S3 says about a listed object."""
        found = self._head(bucket, listed.key, cancel_token)
        if listed.size in (found.size, None):
            return found
        found = self._first_byte(bucket, listed.key, None, cancel_token)  # HEAD is wrong
        if found.size != listed.size:
            raise Changed(
                f"s3://{bucket}/{listed.key} is listed with {listed.size} bytes and has {found.size}"
            )
        return found

    def _head(self, bucket: str, key: str, cancel_token: CancelToken) -> Object:
        query = {"Bucket": bucket, "Key": key, **self._checksum_mode(bucket), **self._buckets.payer}
        try:
            with bucket_errors(f"s3://{bucket}/{key}"):
                answer = self._buckets.ask(bucket, cancel_token, lambda c: c.head_object(**query))
            if "ContentLength" in answer:
                return Object.of(answer)
        except CachdError as error:
            if error.origin_status not in _UNEXPLAINED:
                raise
        return self._first_byte(bucket, key, None, cancel_token)

    def _first_byte(self, bucket: str, key: str, version: str | None, cancel_token: CancelToken) -> Object:
        """What S3 says about an object in the answer to a GET, which gives reasons unlike HEAD."""
        query = {"Bucket": bucket, "Key": key, **self._buckets.payer}
        query |= {"VersionId": version} if version else {}
        mode = self._checksum_mode(bucket)
        try:
            return self._get(query | mode | _FIRST_BYTE, cancel_token)
        except Changed as error:
            if error.origin_status != 416:
                raise
            return self._get(query | mode, cancel_token)  # an empty object has no first byte
        except Unavailable as error:
            if error.origin_status not in (400, 501) or not mode:
                raise
            found = self._get(query | _FIRST_BYTE, cancel_token)
            self._without_checksums.add(bucket)  # the server refuses the header that asks for them
            return found

    def _checksum_mode(self, bucket: str) -> dict[str, str]:
        return {} if bucket in self._without_checksums else {"ChecksumMode": "ENABLED"}

    def _get(self, query: Mapping[str, str], cancel_token: CancelToken) -> Object:
        bucket = query["Bucket"]
        with bucket_errors(f"s3://{bucket}/{query['Key']}"):
            return Object.of(self._buckets.ask(bucket, cancel_token, lambda c: c.get_object(**query)))

    def _open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        bucket, key = bucket_and_key(file.origin.removeprefix("s3://"))
        version = None if bucket in self._unversioned else Object.version_of(file.validator)
        with bucket_errors(file.origin):
            url = self._buckets.link(bucket, key, version, cancel_token)
        began = self._buckets.wait(cancel_token)
        secrets = Secrets(self._buckets.headers)
        target = Target(url, file.size, secrets, Object.validator_of(file.validator))
        try:
            return self._clients.of(url).open(target, extent, cancel_token)
        except Unavailable as error:
            if error.origin_status == 503:
                raise self._buckets.busy(file.origin, began) from error
            raise

    def _suggest_anonymous(self, error: Forbidden, bucket: str, key: str, cancel_token: CancelToken) -> None:
        """Add a hint to the error of a pull without credentials, if the bucket answers without them."""
        if error.code != "source_unauthorized" or error.origin_status is not None:
            return
        query = {"Bucket": bucket, "Prefix": key, "MaxKeys": 1}
        try:
            with bucket_errors(f"s3://{bucket}/"):
                self._buckets.anonymously().ask(bucket, cancel_token, lambda c: c.list_objects_v2(**query))
        except CachdError:
            return
        error.hint = (
            f"the bucket answers without credentials: give s3://{bucket}/ `anonymous: true` in `sources`"
        )


class _Clients:
    """Chooses the client for a signed URL: its host may be a domain below that of the operator's endpoint."""

    def __init__(self, http: Http, endpoint_url: str | None, beneath: Callable[[str], Http] | None) -> None:
        self._http, self._endpoint, self._beneath = http, urlsplit(endpoint_url or ""), beneath
        self._hosts = Bounded[str, Http](_MAX_HOSTS)

    def of(self, url: str) -> Http:
        """The client that may request `url`."""
        parts, endpoint = urlsplit(url), self._endpoint
        is_beneath = parts.scheme == endpoint.scheme and parts.netloc.endswith("." + endpoint.netloc)
        if self._beneath is None or not endpoint.netloc or not is_beneath:
            return self._http
        host = f"{parts.scheme}://{parts.netloc}/"
        client = self._hosts.get(host)
        if client is None:
            client = self._hosts[host] = self._beneath(host)
        return client

    def anew(self) -> None:
        """See `Source.anew`."""
        for http in (self._http, *list(self._hosts.values())):
            http.anew()


def make(access: Access) -> BucketSource:
    """The S3 endpoint of some settings."""
    columns = access.columns
    named = columns.get("credentials") or columns.get("profile") or columns.get("instance_role")
    keys = Keys(
        columns.get("credentials"),
        columns.get("profile"),
        instance_role=columns.get("instance_role", False),
        are_none=columns.get("anonymous", False) or not (access.may_use_own_credentials or named),
    )
    return BucketSource(
        access.http(),
        Service(
            columns.get("endpoint"),
            columns.get("region"),
            columns.get("addressing", "auto"),
            columns.get("requester_pays", False),
        ),
        keys,
        access.http_for,
    )


def _manifest_of(ref: Ref, files: Sequence[File], unusable: Sequence[Unusable] = ()) -> Manifest:
    """The manifest of these files. Its revision is a hash of them."""
    if not files and unusable:
        raise unusable[0].error
    state = "".join(f"{f.path}\n{f.size}\n{f.validator}\n{f.stated}\n" for f in files)
    revision = hashlib.sha256(state.encode()).hexdigest()
    return Manifest(ref.base, revision, tuple(files), unusable=tuple(unusable))


def _empty(shown: str) -> NotFound:
    return NotFound(
        f"{shown} holds no objects",
        code="file_not_found",
        hint="check the bucket, the prefix and the permission s3:ListBucket",
    )
