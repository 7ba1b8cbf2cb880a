"""A bucket is asked where it is, by fresh credentials, and after the pauses that its service wants."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from cachd.errors import CachdError, Unavailable
from cachd.policy.backoff import FIRST_SECONDS
from cachd.sources import s3_trial
from cachd.sources.aws import Keys, Place
from cachd.sources.aws_relay import Elsewhere, Expired, SlowDown
from cachd.sources.buckets import Buckets, Service
from cachd.sources.cancel import CancelToken
from cachd.sources.s3 import BucketSource
from tests.fetching import http

ENDPOINT = "https://s3.example"
TOKEN = CancelToken()


def buckets(keys: Keys | None = None, **service: Any) -> Buckets:
    return Buckets(http(), Service(**{"endpoint_url": ENDPOINT, **service}), keys or Keys(are_none=True))


class Asked:
    """A request that ends in these exceptions, one after the other, and then in an answer."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.clients = list(errors), list[Any]()

    def __call__(self, client: Any) -> str:
        self.clients.append(client)
        if self.errors:
            raise self.errors.pop(0)
        return "answer"

    @property
    def regions(self) -> list[str]:
        return [client.meta.region_name for client in self.clients]

    @property
    def styles(self) -> list[str]:
        return [client.meta.config.s3["addressing_style"] for client in self.clients]


def refused(held: Buckets, asked: Asked) -> CachdError:
    with pytest.raises(CachdError) as refusal:
        held.ask("bucket", TOKEN, asked)
    return refusal.value


@pytest.mark.parametrize(
    ("service", "bucket", "place"),
    [
        ({}, "bucket", Place(None, "path")),
        ({"region": "r"}, "bucket", Place("r", "path")),
        ({"endpoint_url": None}, "bucket", Place(None, "auto")),
        ({"addressing": "virtual"}, "bucket", Place(None, "virtual")),
        ({"addressing": "path", "endpoint_url": None}, "bucket", Place(None, "path")),
        ({"region": "r"}, "m--usw2-az1--x-s3", Place("us-west-2", "virtual", None)),
        ({"region": "r"}, "arn:aws:s3:eu-west-1:123456789012:accesspoint/ap", Place("r", "virtual")),
        ({"region": "r"}, "arn:aws:s3::123456789012:accesspoint/ap.mrap", Place("r", "virtual", None)),
    ],
)
def test_a_bucket_has_a_first_place(service: dict[str, Any], bucket: str, place: Place) -> None:
    assert buckets(**service).place(bucket) == place


def test_a_bucket_that_is_elsewhere_is_asked_there_and_stays_there() -> None:
    held, asked = buckets(region="us-east-1"), Asked(Elsewhere("eu-west-1"), Elsewhere(is_virtual=True))
    assert held.ask("bucket", TOKEN, asked) == "answer"
    assert asked.regions == ["us-east-1", "eu-west-1", "eu-west-1"]
    assert asked.styles == ["path", "path", "virtual"]
    assert held.place("bucket") == Place("eu-west-1", "virtual")
    assert held.place("other") == Place("us-east-1", "path")
    again = Asked()
    held.ask("bucket", TOKEN, again)
    assert again.clients == asked.clients[-1:]


@pytest.mark.parametrize(
    ("service", "errors", "code"),
    [
        ({"region": "r"}, [Elsewhere("r")], "wrong_region"),
        ({"region": "r"}, [Elsewhere("q"), Elsewhere("q")], "wrong_region"),
        ({"addressing": "path", "region": "r"}, [Elsewhere(is_virtual=True)], "wrong_addressing"),
        ({"addressing": "virtual", "region": "r"}, [Elsewhere(is_virtual=True)], "wrong_addressing"),
        ({"region": "r"}, [Elsewhere(is_virtual=True)] * 2, "wrong_addressing"),
        ({"region": "r"}, [Expired(), Expired()], "credentials_expired"),
    ],
)
def test_what_leads_nowhere_is_refused(service: dict[str, Any], errors: list[Exception], code: str) -> None:
    asked = Asked(*errors)
    assert refused(buckets(**service), asked).code == code
    assert asked.errors == []


def test_credentials_that_expired_are_read_again_once() -> None:
    held, asked = buckets(region="r"), Asked(Expired())
    assert held.ask("bucket", TOKEN, asked) == "answer"
    assert asked.clients[0] is not asked.clients[1]


def test_a_bucket_that_moves_on_and_on_is_asked_six_times() -> None:
    moves = [Elsewhere(f"r-{number}") for number in range(9)]
    asked = Asked(*moves)
    error = refused(buckets(region="r"), asked)
    assert (error.code, len(asked.clients)) == ("rate_limited", 6)
    assert isinstance(error, Unavailable)
    assert error.retry_after == 1.0


def test_a_service_that_gets_too_many_requests_is_asked_after_a_pause() -> None:
    held, asked = buckets(region="r"), Asked(SlowDown())
    began = time.monotonic()
    assert held.ask("bucket", TOKEN, asked) == "answer"
    assert time.monotonic() - began >= 0.75 * FIRST_SECONDS
    assert len(asked.clients) == 2


def test_a_busy_service_says_how_long_its_pause_is() -> None:
    held = buckets()
    assert held.busy("s3://bucket/x").retry_after == 1.0
    for _ in range(4):
        error = held.busy("s3://bucket/x", began=1e12)
    assert (error.code, error.origin_status) == ("rate_limited", 503)
    assert (error.retry_after or 0) > 1.0


def test_a_link_names_the_object_its_version_and_who_pays() -> None:
    held = buckets(region="r", is_requester_pays=True)
    url = urlsplit(held.link("bucket", "a/x", "v1", TOKEN))
    assert (url.netloc, url.path) == ("s3.example", "/bucket/a/x")
    assert parse_qs(url.query)["versionId"] == ["v1"]
    assert held.payer == {"RequestPayer": "requester"}
    assert held.headers == {"x-amz-request-payer": "requester"}
    plain = buckets(region="r")
    assert "versionId" not in plain.link("bucket", "a/x", None, TOKEN)
    assert (plain.payer, plain.headers) == ({}, {})


def test_the_credentials_of_a_source_are_tried_where_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = AKID\naws_secret_access_key = x\n")
    source = BucketSource(http(), Service(endpoint_url=ENDPOINT), Keys(tmp_path / "keys"))
    assert s3_trial.credentials_from(source, TOKEN) == "shared-credentials-file"


def test_credentials_come_from_their_file_and_not_to_somebody_anonymous(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = AKID\naws_secret_access_key = x\n")
    held = buckets(Keys(tmp_path / "keys"), region="us-east-1")
    assert held.credentials_from(TOKEN) == "shared-credentials-file"
    assert "AKID" in held.link("bucket", "x", None, TOKEN)
    anonymous = held.anonymously()
    assert anonymous.credentials_from(TOKEN) is None
    assert "AKID" not in anonymous.link("bucket", "x", None, TOKEN)
    assert anonymous.place("bucket") == held.place("bucket")
