"""Signs in to AWS: botocore's clients with fresh credentials, whose requests go over `Http`."""

from __future__ import annotations

import configparser
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from botocore.exceptions import ConfigNotFound, ConfigParseError

from cachd import files
from cachd.errors import Unavailable
from cachd.foreign import SMALL, check_json, check_xml
from cachd.sources.cancel import CancelToken
from cachd.sources.detached import DetachedThreads
from cachd.sources.failures import bare
from cachd.sources.http import Http, parsed
from cachd.sources.http1 import Request

_METADATA = ("169.254.169.254", "[fd00:ec2::254]")  # EC2's metadata service (EC2 User Guide)
_LONGEST_KEYS_BYTES = 64 << 10
_LINK_SECONDS = 3600  # how long a signed URL is valid
_SESSION_SECONDS = 300.0  # how long credentials are used before they are read again
_SIGN_IN_SECONDS = 60.0
_MAX_LEFT = 64
_MAX_LINKS = 10_000


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


class Signed(NamedTuple):
    """A client, a function from an object's origin to its signed URL, and when (monotonic) it was made."""

    client: Any
    link: Callable[[str], str]
    made: float


class SignIn:
    """Signs in to one S3 endpoint with one set of credentials. Thread-safe."""

    def __init__(
        self,
        http: Http,
        keys: Keys,
        *,
        endpoint_url: str | None,
        region: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._relay, self._keys = _HttpRelay(http.anywhere()), keys
        self._endpoint_url, self._region, self._clock = endpoint_url, region, clock
        self._signing_in = threading.Lock()
        self._detached = DetachedThreads(_MAX_LEFT)
        self._signed: Signed | None = None

    @contextmanager
    def until(self, cancel_token: CancelToken) -> Iterator[None]:
        """A context in which a cancel ends the requests of the clients that this thread uses."""
        with self._relay.until(cancel_token):
            yield

    def kept(self, cancel_token: CancelToken) -> Signed:
        """A client whose credentials were read within `_SESSION_SECONDS`. Raises as `fresh`."""
        signed = self._signed
        if signed and self._clock() - signed.made <= _SESSION_SECONDS:
            return signed
        return self.fresh(cancel_token)

    def fresh(self, cancel_token: CancelToken) -> Signed:
        """A client whose credentials are read now.

        They are read in a detached thread: they may come from a program that the AWS configuration names, and
        nothing can interrupt the wait for it. Raises what botocore raises, Unavailable or Cancelled.
        """
        now = self._clock()
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

    def _sign_in(self, since: float, cancel_token: CancelToken) -> Signed:
        """A client whose credentials were read after `since` (monotonic)."""
        with self._signing_in, self._relay.until(cancel_token):
            if self._signed is None or self._signed.made < since:
                made = self._clock()
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
                self._signed = Signed(client, _links(client), made)
            return self._signed


def _links(client: Any) -> Callable[[str], str]:
    """A function that gives the signed URL of an object. It caches them: signing is slower than a request."""

    @lru_cache(maxsize=_MAX_LINKS)
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
        sent = Request(request.method, parsed(request.url), headers, body)
        with self._http.relay(sent, cancel_token) as response:
            content = response.content(cancel_token, at_most=SMALL.size_bytes)
        _check(content, bare(request.url))
        return AWSResponse(request.url, response.status, dict(response.headers.items()), _Raw(content))


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
