"""Each ref gets the source of its scheme, made once."""

from __future__ import annotations

import concurrent.futures
import threading
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.model import Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.entries import Entry
from cachd.sources.http import Http
from cachd.sources.s3 import BucketSource
from cachd.sources.schemes import Sources
from cachd.sources.source import Source
from cachd.sources.table import Table
from cachd.sources.trust import Authorities
from tests.fetching import PATIENCE_SECONDS, refused


def sources(hf_endpoint: str = "https://hub.example", s3_endpoint_url: str | None = None) -> Sources:
    return Sources(
        partial(Http, authorities=Authorities()),
        ["127.0.0.0/8"],
        Table(),
        authorities={"": Authorities()},
        stall_seconds=PATIENCE_SECONDS,
        options={"hf": {"endpoint": hf_endpoint}, "s3": {"endpoint": s3_endpoint_url}},
    )


REFS = ("hf://org/model", "s3://bucket/x/", "https://host/x", "http://host/x", "file:///share/x")


@pytest.mark.parametrize("ref", REFS)
def test_a_source_is_made_once_however_many_pulls_ask_at_once(ref: str) -> None:
    asked, together = sources(), threading.Barrier(8)

    def ask(_: int) -> Source:
        together.wait(PATIENCE_SECONDS)
        return asked.of(Ref.parse(ref))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1


@pytest.mark.parametrize("endpoints", [{"hf_endpoint": "nowhere://u@h"}, {"s3_endpoint_url": "http://u@h"}])
def test_an_endpoint_that_is_none_is_refused_before_the_first_pull(endpoints: dict[str, str]) -> None:
    refused(lambda: sources(**endpoints), "bad_option")


def test_the_table_and_the_addresses_in_force_are_those_of_the_last_change() -> None:
    held, table, url = sources(), Table(), urlsplit("http://host/x")
    before = held.of(Ref.parse("https://host/x"))
    held.address_policy.check_addresses(url, ["127.0.0.1"])
    held.change(["10.0.0.0/8"], table)
    assert held.table is table
    held.address_policy.check_addresses(url, ["10.0.0.1"])
    refused(lambda: held.address_policy.check_addresses(url, ["127.0.0.1"]), "private_address")
    assert held.of(Ref.parse("https://host/x")) is not before


def test_the_endpoint_of_an_entry_never_gets_the_credentials_of_the_daemon(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("[default]\naws_access_key_id = AKID\naws_secret_access_key = x\n")
    entry = Entry.model_validate({"prefix": "s3://other/", "endpoint": "https://s3.example"})
    held = Sources(
        partial(Http, authorities=Authorities()),
        (),
        Table([entry]),
        authorities={"": Authorities()},
        stall_seconds=PATIENCE_SECONDS,
        options={"s3": {"credentials": keys}},
    )
    found = {}
    for bucket in ("own", "other"):
        source = held.of(Ref.parse(f"s3://{bucket}/x/"))
        assert isinstance(source, BucketSource)
        found[bucket] = source.buckets.credentials_from(CancelToken())
    assert found == {"own": "shared-credentials-file", "other": None}
