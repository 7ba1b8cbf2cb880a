"""The source of s3:// refs: botocore lists a bucket and signs URLs, `Http` downloads the objects."""

from __future__ import annotations

import base64
import binascii
import configparser
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import botocore
import botocore.config
import botocore.loaders
import botocore.session
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.credentials import CredentialResolver, SharedCredentialProvider
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    CredentialRetrievalError,
    NoCredentialsError,
    PaginationError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError

from cachd import files
from cachd.errors import CachdError, Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.foreign import SMALL, check_json, check_xml, too_large
from cachd.model import Digest, Entries, Extent, File, Manifest, Ref, check_path
from cachd.sources import checksums
from cachd.sources.answers import bare
from cachd.sources.connection import Response
from cachd.sources.detached import DetachedThreads
from cachd.sources.http import Http, Target
from cachd.sources.source import CancelToken

_ASKED_AT_ONCE = 16
_METADATA = ("169.254.169.254", "[fd00:ec2::254]")  # EC2's metadata service (EC2 User Guide)
_MOST_PAGES = 1000
_LONGEST_KEYS_BYTES = 64 << 10
_LINK_SECONDS = 3600  # how long a signed URL is valid
_SESSION_SECONDS = 300.0  # how long credentials are used before they are read again
_SIGN_IN_SECONDS = 60.0
_MOST_LEFT = 64
_MOST_LINKS = 10_000
_SKEWED = ("RequestTimeTooSkewed", "RequestInTheFuture", "RequestExpired")
# What botocore raises for an answer that is not S3's, or for a malformed number in one.
_NO_LISTING = (ResponseParserError, ValueError, TypeError, KeyError)
# Field of HeadObject's answer -> our algorithm, the strongest first. S3 computes a CRC64NVME if the uploader
# sends no checksum (S3 User Guide, "Checking object integrity").
_CHECKSUMS = {
    "ChecksumSHA256": "sha256",
    "ChecksumCRC64NVME": "crc64nvme",
    "ChecksumCRC32C": "crc32c",
    "ChecksumSHA1": "sha1",
    "ChecksumCRC32": "crc32",
}


@dataclass(frozen=True, slots=True)
class Keys:
    """Where the credentials of a bucket come from. With no field set: wherever AWS clients look for them.

    `file`: a file in the format of ~/.aws/credentials. `profile`: a profile of that file or, without one, of
    the node's AWS files. `instance_role`: the machine's metadata service, which is never asked otherwise.
    `are_none`: requests are not signed.
    """

    file: Path | None = None
    profile: str | None = None
    instance_role: bool = False
    are_none: bool = False


_AS_AWS_CLIENTS = Keys()


class _Signed(NamedTuple):
    """A client, a function from an object's origin to its signed URL, and when (monotonic) it was made."""

    client: Any
    link: Callable[[str], str]
    made: float


class BucketSource:
    """The objects below a prefix. Digests: the prefix's SHA256SUMS, else full-object checksums, else none.

    COMPOSITE checksums and ETags are not used: the former are digests of part digests, the latter may be no
    digests at all (S3 User Guide, "Checking object integrity"; S3 API Reference, "Object").
    """

    def __init__(
        self, http: Http, *, endpoint_url: str | None, region: str | None, keys: Keys = _AS_AWS_CLIENTS
    ) -> None:
        self._http, self._endpoint_url, self._region, self._keys = http, endpoint_url, region, keys
        self._relay = _HttpRelay(http.anywhere())
        self._signing_in = threading.Lock()
        self._detached = DetachedThreads(_MOST_LEFT)
        self._signed: _Signed | None = None

    def resolve(self, ref: Ref, cancel_token: CancelToken) -> Manifest:
        """See `Source.resolve`."""
        bucket, _, prefix = ref.location.partition("/")
        with _bucket_errors(ref.base), self._relay.until(cancel_token):
            client = self._signed_in(cancel_token, renew=True).client
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
                with self._relay.until(cancel_token):
                    return self._ask(client, bucket, keys[path], path, digests.get(path))

            with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
                files = tuple(pool.map(ask, sorted(keys.keys() - {checksums.NAME})))
            if self._list(client, bucket, prefix, cancel_token) != listed:
                raise Changed(f"{ref.base}: objects were added, removed or changed while they were listed")
        state = "".join(f"{f.path}\n{f.size}\n{f.validator}\n{f.stated}\n" for f in files)
        return Manifest(ref.base, hashlib.sha256(state.encode()).hexdigest(), files)

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> Response:
        """See `Source.open`."""
        try:
            return self._open(file, extent, cancel_token)
        except Forbidden as error:
            if error.origin_status != 403:
                raise
            return self._open(file, extent, cancel_token, renew=True)

    def anew(self) -> None:
        """See `Source.anew`."""
        self._http.anew()

    def _open(
        self, file: File, extent: Extent, cancel_token: CancelToken, *, renew: bool = False
    ) -> Response:
        with _bucket_errors(file.origin), self._relay.until(cancel_token):
            url = self._signed_in(cancel_token, renew=renew).link(file.origin)
        return self._http.open(Target(url, file.size, validator=file.validator), extent, cancel_token)

    def _signed_in(self, cancel_token: CancelToken, *, renew: bool = False) -> _Signed:
        """A client whose credentials were read within `_SESSION_SECONDS`, or just now with `renew`.

        They are read in a detached thread: they may come from a program that the AWS configuration names, and
        nothing can interrupt the wait for it.
        """
        signed, now = self._signed, time.monotonic()
        if signed and not renew and now - signed.made <= _SESSION_SECONDS:
            return signed
        try:
            with self._detached.one(_SIGN_IN_SECONDS) as thread, cancel_token.reaches(thread):
                return thread.call(self._sign_in, now, cancel_token)
        except TimeoutError as error:
            cancel_token.check()
            raise Unavailable(
                f"the credentials for S3 cannot be read: {error}",
                code="connection_failed",
                hint="check the program or service that the daemon's AWS configuration takes them from",
            ) from error

    def _sign_in(self, since: float, cancel_token: CancelToken) -> _Signed:
        """A client whose credentials were read after `since` (monotonic)."""
        with self._signing_in, self._relay.until(cancel_token):
            if self._signed is None or self._signed.made < since:
                made = time.monotonic()
                client = _session(self._relay, self._keys).create_client(
                    "s3",
                    endpoint_url=self._endpoint_url,
                    region_name=self._region,
                    verify=True,  # else botocore fails on an empty AWS_CA_BUNDLE; `Http` verifies
                    config=botocore.config.Config(
                        signature_version=botocore.UNSIGNED if self._keys.are_none else "s3v4",
                        retries={"total_max_attempts": 1},
                        s3={"addressing_style": "path"} if self._endpoint_url else None,
                    ),
                )
                self._signed = _Signed(client, _links(client), made)
            return self._signed

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
            if number > _MOST_PAGES:
                raise too_large(f"the listing of {shown}", _MOST_PAGES, unit="pages")
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
            self._signed_in(cancel_token).link(shown), cancel_token, at_most=checksums.LONGEST_BYTES
        )
        return checksums.parse(content, shown)

    def _ask(self, client: Any, bucket: str, key: str, path: str, listed: Digest | None) -> File:
        with _bucket_errors(f"s3://{bucket}/{key}"):
            head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
            digest = listed or _full_object_checksum(head)
            return File(path, head["ContentLength"], f"s3://{bucket}/{key}", digest, head["ETag"])


def _links(client: Any) -> Callable[[str], str]:
    """A function that gives the signed URL of an object. It caches them: signing is slower than a request."""

    @lru_cache(maxsize=_MOST_LINKS)
    def link(origin: str) -> str:
        bucket, _, key = origin.removeprefix("s3://").partition("/")
        url: str = client.generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=_LINK_SECONDS
        )
        return url

    return link


class _HttpRelay:
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
        self._here.cancel_token = cancel_token
        try:
            yield
        finally:
            self._here.cancel_token = None

    def __call__(self, request: AWSPreparedRequest, **_: object) -> AWSResponse:
        """The answer to a client's request (botocore's event `before-send`)."""
        headers = {name: _text(value) for name, value in request.headers.items() if name.lower() != "host"}
        body = (request.body or "").encode() if not isinstance(request.body, bytes) else request.body
        # botocore may renew credentials in a thread of its own, which has no token.
        cancel_token: CancelToken = getattr(self._here, "cancel_token", None) or CancelToken()
        answer = self._http.relay(
            request.method, request.url, headers, body, cancel_token, at_most=SMALL.size_bytes
        )
        _check(answer.content, bare(request.url))
        return AWSResponse(request.url, answer.status, dict(answer.headers.items()), _Raw(answer.content))


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


def _spare_metadata() -> None:
    """Add the machine's metadata service to NO_PROXY, as botocore would ask it through a proxy otherwise.

    AWS recommends this (AWS CLI User Guide, "Using an HTTP proxy"). The service does not answer through a
    proxy, and the proxy would see the credentials.
    """
    exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    own = urlsplit(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "")).netloc
    missing = [host for host in (*_METADATA, own) if host and host not in exempt.split(",")]
    if missing and exempt != "*":
        os.environ["no_proxy"] = ",".join(filter(None, (exempt, *missing)))


def _session(relay: _HttpRelay, keys: Keys) -> botocore.session.Session:
    """A session that reads credentials anew but shares parsed service models, which saves 0.1 s of CPU."""
    _spare_metadata()
    session = botocore.session.Session(profile=keys.profile if keys.file is None else None)
    session.register_component("data_loader", _models())
    session.register("before-send", relay)
    if keys.file is not None:
        only = SharedCredentialProvider(str(keys.file), keys.profile or "default", ini_parser=_profiles)
        session.register_component("credential_provider", CredentialResolver([only]))
    elif not keys.instance_role:  # never ask it, not even for `credential_source` of a profile
        session.set_config_variable("metadata_service_num_attempts", 0)
    elif keys.profile is None:
        of_machine = session.get_component("credential_provider").get_provider("iam-role")
        session.register_component("credential_provider", CredentialResolver([of_machine]))
    return session


def _profiles(file: str) -> dict[str, dict[str, str]]:
    """The profiles of a credentials file. Raises ConfigParseError or ConfigNotFound."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(files.content(Path(file), at_most=_LONGEST_KEYS_BYTES).decode())
    except OSError as error:
        raise ConfigNotFound(path=file) from error
    except (configparser.Error, UnicodeDecodeError):
        raise ConfigParseError(path=file) from None  # the cause quotes lines of the file
    return {name: dict(parser.items(name)) for name in parser.sections()}


@cache
def _models() -> botocore.loaders.Loader:
    """The loader of botocore's service models, shared so that each is parsed once."""
    return botocore.loaders.create_loader(botocore.session.get_session().get_config_variable("data_path"))


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


@contextmanager
def _bucket_errors(shown: str) -> Iterator[None]:
    """Turn the exceptions of botocore into cachd's."""
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


def _by_code(shown: str, error: ClientError) -> CachdError:
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
            f"{shown}: {code}: this node's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
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
