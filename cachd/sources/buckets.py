"""Asks for buckets: follows each to its region, pauses when S3 wants it, and renews credentials."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cachd.bounded import Bounded
from cachd.errors import Forbidden, Invalid, Unavailable
from cachd.model.bucket import is_arn, is_directory_bucket, is_global, region_of_directory_bucket
from cachd.sources.aws import Keys, Place, SignIn
from cachd.sources.aws_relay import Elsewhere, Expired, SlowDown
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http
from cachd.sources.throttle import Throttle

T = TypeVar("T")

_MAX_TRIES = 6  # a bucket that moves, credentials that expire and a few pauses
_MAX_PLACES = 10_000


@dataclass(frozen=True, slots=True)
class Service:
    """One S3 service, as the settings of a ref describe it.

    `addressing`: `path`, `virtual`, or `auto`: as the server wants it. `is_requester_pays`: whoever asks pays
    for the request and the bytes.
    """

    endpoint_url: str | None = None
    region: str | None = None
    addressing: str = "auto"
    is_requester_pays: bool = False


class Buckets:
    """The buckets of one service, with one set of credentials. Thread-safe.

    `payer` are the parameters of every operation, and `headers` the headers of every signed URL.
    """

    def __init__(self, http: Http, service: Service, keys: Keys) -> None:
        self._http = http
        self._sign_in = SignIn(http, keys, endpoint_url=service.endpoint_url)
        self._service = service
        self._places = Bounded[str, Place](_MAX_PLACES)
        self._throttle = Throttle()
        self.payer = {"RequestPayer": "requester"} if service.is_requester_pays else {}
        self.headers = {"x-amz-request-payer": "requester"} if service.is_requester_pays else {}

    def until(self, cancel_token: CancelToken) -> AbstractContextManager[None]:
        """See `SignIn.until`."""
        return self._sign_in.until(cancel_token)

    def renew(self, cancel_token: CancelToken) -> None:
        """Read the credentials again. Raises as `SignIn.fresh`."""
        self._sign_in.fresh(cancel_token)

    def credentials_from(self, cancel_token: CancelToken) -> str | None:
        """See `Signed.credentials_from`; they are read now. Raises as `SignIn.fresh`."""
        return self._sign_in.fresh(cancel_token).credentials_from

    def ask(self, bucket: str, cancel_token: CancelToken, request: Callable[[Any], T]) -> T:
        """What `request` returns for a client that is right for the bucket.

        It is called again when the bucket turns out to be elsewhere, when credentials expired, and after a
        pause that S3 wants. Raises what botocore raises, Invalid, Unavailable or Cancelled.
        """
        is_renewed = False
        for _ in range(_MAX_TRIES):
            began = self._throttle.wait(cancel_token)
            place = self.place(bucket)
            try:
                with self.until(cancel_token):
                    answer = request(self._sign_in.kept(cancel_token).client(place))
            except Elsewhere as found:
                self._move(bucket, place, found)
            except SlowDown:
                self._throttle.refused(began)
            except Expired:
                if is_renewed:
                    raise _expired(bucket) from None
                is_renewed = True
                self.renew(cancel_token)
            else:
                self._throttle.answered()
                return answer
        raise self.busy(f"s3://{bucket}")

    def anonymously(self) -> Buckets:
        """The same buckets for somebody without credentials."""
        return Buckets(self._http, self._service, Keys(are_none=True))

    def place(self, bucket: str) -> Place:
        """Where the bucket is, as far as it is known."""
        return self._places.get(bucket) or self._first_place(bucket)

    def link(self, bucket: str, key: str, version: str | None, cancel_token: CancelToken) -> str:
        """The signed URL of an object. Raises as `ask`: a bucket of S3 Express is asked for a session."""
        params = {"Bucket": bucket, "Key": key, **self.payer, **({"VersionId": version} if version else {})}

        def sign(_client: object) -> str:
            return self._sign_in.kept(cancel_token).link(self.place(bucket), tuple(params.items()))

        return self.ask(bucket, cancel_token, sign)

    def wait(self, cancel_token: CancelToken) -> float:
        """See `Throttle.wait`: every request waits for it, also that of a signed URL."""
        return self._throttle.wait(cancel_token)

    def busy(self, shown: str, began: float | None = None) -> Unavailable:
        """The error for a service that gets too many requests. `began` is when the refused one was sent."""
        if began is not None:
            self._throttle.refused(began)
        return Unavailable(
            f"{shown}: S3 gets too many requests (SlowDown)",
            code="rate_limited",
            retry_after=max(self._throttle.seconds_left, 1.0),
            origin_status=503,
        )

    def _first_place(self, bucket: str) -> Place:
        service = self._service
        if is_arn(bucket) or is_directory_bucket(bucket):  # neither has a path style
            signature = None if is_directory_bucket(bucket) or is_global(bucket) else "s3v4"
            return Place(region_of_directory_bucket(bucket) or service.region, "virtual", signature)
        style = "auto" if service.endpoint_url is None else "path"
        return Place(service.region, service.addressing if service.addressing != "auto" else style)

    def _move(self, bucket: str, place: Place, found: Elsewhere) -> None:
        """Remember where the bucket is. Raises Invalid when it was asked for there already."""
        service, shown = self._service, f"s3://{bucket}"
        if found.is_virtual and (service.addressing == "path" or place.style == "virtual"):
            raise Invalid(
                f"{shown}: the server refuses the {place.style} style of addresses",
                code="wrong_addressing",
                hint="set addressing to auto or virtual in its entry of `sources`",
            )
        if found.region and found.region == place.region:
            raise Invalid(
                f"{shown} is in the region {found.region}, and {service.endpoint_url or 'AWS'} serves others",
                code="wrong_region",
                hint="set endpoint in its entry of `sources` to the S3 service of that region",
            )
        self._places[bucket] = replace(
            place,
            region=found.region or place.region,
            style="virtual" if found.is_virtual else place.style,
        )


def _expired(bucket: str) -> Forbidden:
    return Forbidden(
        f"s3://{bucket}: its credentials have expired, and reading them again gave no newer ones",
        code="credentials_expired",
        hint="renew them where the daemon reads them: the file, the profile, or `aws sso login`",
        origin_status=400,
    )
