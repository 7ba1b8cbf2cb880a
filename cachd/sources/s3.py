"""The source of s3:// refs: botocore lists a bucket and signs URLs, `Http` downloads the objects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from cachd.errors import CachdError, Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.foreign import too_large
from cachd.model import MAX_FILES, Digest, Entries, Extent, File, Manifest, Ref, check_path
from cachd.model.bucket import bucket_and_key
from cachd.model.folders import check_folders, folder_markers
from cachd.sources import checksums
from cachd.sources.access import Access
from cachd.sources.aws import Keys
from cachd.sources.aws_errors import bucket_errors
from cachd.sources.buckets import Buckets, Service
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http, Target
from cachd.sources.objects import Listed, Object
from cachd.sources.response import Response

_ASKED_AT_ONCE = 16
_MAX_PAGES = 1000
_MAX_HOSTS = 1000
_AS_AWS_CLIENTS, _AWS = Keys(), Service()
# What S3 answers HEAD without a reason, and a signed URL with a reason that `Http` does not read. 404 is not
# among those of HEAD, as it has one meaning there.
_UNEXPLAINED = (301, 307, 400, 401, 403, 405, 501)


class BucketSource:
    """The objects below a prefix. Digests: the prefix's SHA256SUMS, else full-object checksums, else none.

    Of a versioned bucket, a file is the version that was the latest when its prefix was resolved. `beneath`
    makes a client that may also request a URL below the endpoint's domain.
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
        self._max_files = max_files
        self._buckets = Buckets(http, service, keys)
        self._unversioned: set[str] = set()  # buckets whose versions these credentials may not read

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
            files = self._files(ref, bucket, key, cancel_token)
        except Forbidden as error:
            self._suggest_anonymous(error, bucket, key, cancel_token)
            raise
        state = "".join(f"{f.path}\n{f.size}\n{f.validator}\n{f.stated}\n" for f in files)
        return Manifest(ref.base, hashlib.sha256(state.encode()).hexdigest(), files)

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

    def _files(self, ref: Ref, bucket: str, key: str, cancel_token: CancelToken) -> tuple[File, ...]:
        """The file or the files that a ref names, sorted by path."""
        if key and not key.endswith("/"):
            return self._exactly_or_below(ref, bucket, key, cancel_token)
        return self._below(ref, bucket, key, self._list(bucket, key, cancel_token), cancel_token)

    def _exactly_or_below(
        self, ref: Ref, bucket: str, key: str, cancel_token: CancelToken
    ) -> tuple[File, ...]:
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
            listed = self._list(bucket, key, cancel_token)
        except Forbidden as error:
            if single is None or not single.size:
                raise refusal or error from error
            listed = {}  # s3:ListBucket is a permission of its own, which one object does not need
        if single is not None and not single.is_folder and (single.size or not listed):
            return (self._only_file(ref, bucket, key, single, listed),)
        if not listed and refusal is not None:
            raise refusal
        return self._below(ref, bucket, key, listed, cancel_token)

    def _below(
        self, ref: Ref, bucket: str, key: str, listed: Mapping[str, Listed], cancel_token: CancelToken
    ) -> tuple[File, ...]:
        """The files of a listing."""
        if not listed:
            raise _empty(ref.base)
        digests = self._checksums(bucket, listed, cancel_token)

        def ask(path: str) -> File | None:
            found = self._ask(bucket, listed[path], cancel_token)
            return None if found.is_folder else found.file(path, bucket, listed[path].key, digests.get(path))

        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            asked = pool.map(ask, sorted(listed.keys() - {checksums.NAME}))
            files = tuple(file for file in asked if file is not None)
        if self._list(bucket, key, cancel_token) != listed:
            raise Changed(f"{ref.base}: objects were added, removed or changed while they were listed")
        if not files:
            raise _empty(ref.base)
        return files

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
                f"{ref.base} is an empty object, as tools leave for a folder, and there is none below it",
                code="file_not_found",
                hint="check the prefix: the objects may be elsewhere, or not uploaded yet",
            )
        return single.file(key.rpartition("/")[2], bucket, key, None)

    def _list(self, bucket: str, prefix: str, cancel_token: CancelToken) -> dict[str, Listed]:
        """Every object below a prefix that is a file, by its path there."""
        folder = prefix if prefix.endswith("/") or not prefix else prefix + "/"
        shown = f"s3://{bucket}/{folder}"
        found: dict[str, Listed] = {}
        entries = Entries(shown, self._max_files)
        for each in self._pages(bucket, folder, shown, cancel_token):
            path = each.key.removeprefix(folder)
            if not each.key.startswith(folder) or not path.strip("/"):
                continue
            if path in found:
                raise Invalid(f"{shown} lists {path!r} twice", code="bad_manifest")
            entries.add(each.key, each.etag)
            found[path] = each
        sizes = {path: each.size for path, each in found.items()}
        files = found.keys() - folder_markers(sizes)
        check_folders(shown, {path: sizes[path] for path in files})
        return {check_path(path): found[path] for path in files}

    def _pages(self, bucket: str, folder: str, shown: str, cancel_token: CancelToken) -> Iterator[Listed]:
        """Every object that the listing of a prefix names."""
        query: dict[str, str] = {"Bucket": bucket, "Prefix": folder, **self._buckets.payer}
        for _ in range(_MAX_PAGES):
            with bucket_errors(shown):
                page = self._buckets.ask(bucket, cancel_token, lambda c: c.list_objects_v2(**query))
                cancel_token.count(len(page.get("Contents", ())))
                yield from map(Listed.of, page.get("Contents", ()))
                if not page.get("IsTruncated"):
                    return
                then = page["NextContinuationToken"]
            if then == query.get("ContinuationToken"):
                raise Unavailable(
                    f"{shown}: the listing gave the same page token twice", code="origin_protocol"
                )
            query["ContinuationToken"] = then
        raise too_large(f"the listing of {shown}", _MAX_PAGES, unit="pages")

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
            url, cancel_token, at_most=checksums.LONGEST_BYTES, secrets=self._buckets.headers
        )
        return checksums.parse(content, shown)

    # --- one object ---

    def _ask(self, bucket: str, listed: Listed, cancel_token: CancelToken) -> Object:
        """What S3 says about a listed object."""
        found = self._head(bucket, listed.key, cancel_token)
        if listed.size == found.size:
            return found
        found = self._first_byte(bucket, listed.key, None, cancel_token)  # HEAD is wrong
        if found.size != listed.size:
            raise Changed(
                f"s3://{bucket}/{listed.key} is listed with {listed.size} bytes and has {found.size}"
            )
        return found

    def _head(self, bucket: str, key: str, cancel_token: CancelToken) -> Object:
        query = {"Bucket": bucket, "Key": key, "ChecksumMode": "ENABLED", **self._buckets.payer}
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
        query = {"Bucket": bucket, "Key": key, "Range": "bytes=0-0", **self._buckets.payer}
        query |= {"ChecksumMode": "ENABLED"} | ({"VersionId": version} if version else {})
        with bucket_errors(f"s3://{bucket}/{key}"):
            return Object.of(self._buckets.ask(bucket, cancel_token, lambda c: c.get_object(**query)))

    def _open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        bucket, key = bucket_and_key(file.origin.removeprefix("s3://"))
        version = None if bucket in self._unversioned else Object.version_of(file.validator)
        with bucket_errors(file.origin):
            url = self._buckets.link(bucket, key, version, cancel_token)
        began = self._buckets.wait(cancel_token)
        target = Target(url, file.size, self._buckets.headers, Object.validator_of(file.validator))
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
        self._hosts: dict[str, Http] = {}

    def of(self, url: str) -> Http:
        """The client that may request `url`."""
        parts, endpoint = urlsplit(url), self._endpoint
        is_beneath = parts.scheme == endpoint.scheme and parts.netloc.endswith("." + endpoint.netloc)
        if self._beneath is None or not endpoint.netloc or not is_beneath:
            return self._http
        host = f"{parts.scheme}://{parts.netloc}/"
        if len(self._hosts) >= _MAX_HOSTS:
            self._hosts.clear()
        return self._hosts.get(host) or self._hosts.setdefault(host, self._beneath(host))

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


def _empty(shown: str) -> NotFound:
    return NotFound(
        f"{shown} holds no objects",
        code="file_not_found",
        hint="check the bucket, the prefix and the permission s3:ListBucket",
    )
