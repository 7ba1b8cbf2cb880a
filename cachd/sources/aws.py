"""Signs in to S3: makes botocore's clients and signed URLs, with fresh credentials."""

from __future__ import annotations

import configparser
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore
import botocore.config
import botocore.loaders
import botocore.session
from botocore.credentials import CredentialResolver, SharedCredentialProvider
from botocore.exceptions import ConfigNotFound, ConfigParseError

from cachd import files
from cachd.errors import Unavailable
from cachd.sources.aws_relay import HttpRelay
from cachd.sources.cancel import CancelToken
from cachd.sources.detached import DetachedThreads
from cachd.sources.http import Http

_METADATA = ("169.254.169.254", "[fd00:ec2::254]")  # EC2's metadata service (EC2 User Guide)
_LONGEST_KEYS_BYTES = 64 << 10
_LINK_SECONDS = 3600  # how long a signed URL is valid
_SESSION_SECONDS = 300.0  # how long credentials are used before they are read again
_SIGN_IN_SECONDS = 60.0
_MAX_LEFT = 64
_MAX_LINKS = 10_000
# An endpoint of AWS that serves one region (AWS General Reference, "Amazon S3 endpoints").
_AWS_ENDPOINT = re.compile(
    r"(?P<scheme>https?://)s3[.-](?P<kind>dualstack\.)?((?P<region>[a-z]{2}(-[a-z]+)+-[0-9]+)\.)?"
    r"(?P<domain>amazonaws\.com(\.cn)?)/?"
)


@dataclass(frozen=True, slots=True)
class Keys:
    """Where the credentials of a bucket come from. If no field is set, from wherever AWS clients look.

    `file`: a file in the format of ~/.aws/credentials. `profile`: a profile of that file or, without one, of
    the node's AWS files. `instance_role`: the machine's metadata service, which is never asked otherwise.
    `are_none`: requests are not signed.
    """

    file: Path | None = None
    profile: str | None = None
    instance_role: bool = False
    are_none: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """The region of a bucket, and how requests for it are written.

    `region`: None for that of the AWS configuration. `style`: `path` (https://host/bucket/key), `virtual`
    (https://bucket.host/key), or `auto`, the choice of AWS clients. `signature`: the version of signatures;
    None for the default of this kind of bucket.
    """

    region: str | None = None
    style: str = "auto"
    signature: str | None = "s3v4"


class Signed:
    """Clients and signed URLs for all places, with credentials that were read once. Thread-safe.

    `made` is when (monotonic) the credentials were read.
    """

    def __init__(
        self, session: botocore.session.Session, endpoint_url: str | None, *, is_anonymous: bool, made: float
    ) -> None:
        self._session, self._endpoint_url, self._is_anonymous = session, endpoint_url, is_anonymous
        self.made = made
        self._lock = threading.Lock()
        self._clients: dict[Place, Any] = {}
        # Signing is slower than a request, and a file has many parts.
        self.link = lru_cache(maxsize=_MAX_LINKS)(self._link)

    @property
    def credentials_from(self) -> str | None:
        """Where botocore found the credentials, in its word, such as `env`; None when it signs nothing."""
        found = None if self._is_anonymous else self._session.get_credentials()
        return str(found.method) if found else None

    def client(self, place: Place) -> Any:
        """The client for a place. Raises what botocore raises."""
        with self._lock:
            if place not in self._clients:
                self._clients[place] = self._session.create_client(
                    "s3",
                    endpoint_url=endpoint_in(self._endpoint_url, place.region),
                    region_name=place.region,
                    verify=True,  # else botocore fails on an empty AWS_CA_BUNDLE; `Http` verifies
                    config=botocore.config.Config(
                        signature_version=botocore.UNSIGNED if self._is_anonymous else place.signature,
                        retries={"total_max_attempts": 1},
                        # Some servers refuse to be asked for checksums; only `BucketSource` asks for them.
                        response_checksum_validation="when_required",
                        s3={"addressing_style": place.style},
                    ),
                )
            return self._clients[place]

    def _link(self, place: Place, params: tuple[tuple[str, str], ...]) -> str:
        """The signed URL for GetObject with these parameters."""
        url: str = self.client(place).generate_presigned_url(
            "get_object", Params=dict(params), ExpiresIn=_LINK_SECONDS
        )
        return url


def endpoint_in(endpoint_url: str | None, region: str | None) -> str | None:
    """The endpoint of AWS for a region; any other endpoint as it is."""
    found = _AWS_ENDPOINT.fullmatch(endpoint_url or "")
    if not found or not region or found["region"] == region:
        return endpoint_url
    return f"{found['scheme']}s3.{found['kind'] or ''}{region}.{found['domain']}"


class SignIn:
    """Signs in to one S3 endpoint with one set of credentials. Thread-safe."""

    def __init__(
        self,
        http: Http,
        keys: Keys,
        *,
        endpoint_url: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._relay, self._keys = HttpRelay(http.anywhere()), keys
        self._endpoint_url, self._clock = endpoint_url, clock
        self._signing_in = threading.Lock()
        self._detached = DetachedThreads(_MAX_LEFT)
        self._signed: Signed | None = None

    @contextmanager
    def until(self, cancel_token: CancelToken) -> Iterator[None]:
        """A context in which a cancel ends the requests of the clients that this thread uses."""
        with self._relay.until(cancel_token):
            yield

    def kept(self, cancel_token: CancelToken) -> Signed:
        """Clients whose credentials were read within `_SESSION_SECONDS`. Raises as `fresh`."""
        signed = self._signed
        if signed and self._clock() - signed.made <= _SESSION_SECONDS:
            return signed
        return self.fresh(cancel_token)

    def fresh(self, cancel_token: CancelToken) -> Signed:
        """Clients whose credentials are read now.

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

    def anonymous(self) -> Signed:
        """Clients that sign nothing."""
        session = _plain_session(self._relay)
        return Signed(session, self._endpoint_url, is_anonymous=True, made=self._clock())

    def _sign_in(self, since: float, cancel_token: CancelToken) -> Signed:
        """Clients whose credentials were read after `since` (monotonic)."""
        with self._signing_in, self._relay.until(cancel_token):
            if self._signed is None or self._signed.made < since:
                made, keys = self._clock(), self._keys
                session = _session(self._relay, keys)
                if not keys.are_none:
                    session.get_credentials()  # kept by the session, for the clients of all places
                self._signed = Signed(session, self._endpoint_url, is_anonymous=keys.are_none, made=made)
            return self._signed


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


def _session(relay: HttpRelay, keys: Keys) -> botocore.session.Session:
    """A session that reads credentials anew but shares parsed service models, which saves 0.1 s of CPU."""
    _spare_metadata()
    session = _plain_session(relay, keys.profile if keys.file is None else None)
    if keys.file is not None:
        only = SharedCredentialProvider(str(keys.file), keys.profile or "default", ini_parser=_profiles)
        session.register_component("credential_provider", CredentialResolver([only]))
    elif not keys.instance_role:  # never ask it, not even for `credential_source` of a profile
        session.set_config_variable("metadata_service_num_attempts", 0)
    elif keys.profile is None:
        of_machine = session.get_component("credential_provider").get_provider("iam-role")
        session.register_component("credential_provider", CredentialResolver([of_machine]))
    return session


def _plain_session(relay: HttpRelay, profile: str | None = None) -> botocore.session.Session:
    session = botocore.session.Session(profile=profile)
    session.register_component("data_loader", _models())
    session.register("before-send", relay)
    session.register("before-call.s3", _leave_redirects)
    return session


def _leave_redirects(context: dict[str, Any], **_: object) -> None:
    """Keep botocore from following a bucket to its region: its signed URLs would be for another one."""
    context.get("s3_redirect", {})["redirected"] = True


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
