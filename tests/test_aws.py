"""Credentials of S3 are read again in time."""

from __future__ import annotations

from cachd.policy.address_policy import AddressPolicy
from cachd.sources.aws import Keys, SignIn
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http
from cachd.sources.trust import Authorities


def test_credentials_are_used_for_five_minutes_and_then_read_again() -> None:
    now = 1000.0
    http = Http(AddressPolicy([]), authorities=Authorities())
    keys, endpoint = Keys(are_none=True), "https://s3.example"
    sign_in = SignIn(http, keys, endpoint_url=endpoint, clock=lambda: now)
    first = sign_in.kept(CancelToken())
    now += 300
    assert sign_in.kept(CancelToken()) is first
    now += 1
    assert sign_in.kept(CancelToken()) is not first
    before = sign_in.kept(CancelToken())
    now += 1
    assert sign_in.fresh(CancelToken()) is not before
