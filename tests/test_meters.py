"""Which metric each event of a download moves, by its origin."""

from __future__ import annotations

import pytest

from cachd.errors import CachdError, Cancelled, Forbidden, Unavailable
from cachd.metrics import MAX_ORIGINS, OTHER_ORIGINS, Metrics
from cachd.model import Ref
from cachd.transfer.events import Meters
from tests.test_pull_metrics import hosts, series


@pytest.mark.parametrize(
    ("ref", "scheme", "origin"),
    [
        ("https://host:8443/a/b", "https", "host:8443"),
        ("http://host/a", "http", "host"),
        ("s3://bucket/a/b", "s3", "s3://bucket"),
        ("hf://org/m", "hf", "hf"),
    ],
)
def test_what_is_received_counts_for_the_scheme_and_for_the_origin_in_the_ref(
    ref: str, scheme: str, origin: str
) -> None:
    metrics = Metrics()
    meters = Meters(metrics)
    meter = meters.of(Ref.parse(ref))
    assert meters.of(Ref.parse(ref)) is meter
    meter.received(70, 0.5)
    meter.answered(2.0)
    assert series(metrics, "cachd_download_bytes_total")[f'{{source="{scheme}"}}'] == 70
    assert series(metrics, "cachd_origin_download_bytes_total")[f'{{origin="{origin}"}}'] == 70
    assert series(metrics, "cachd_origin_receive_seconds_total")[f'{{origin="{origin}"}}'] == 0.5
    assert series(metrics, "cachd_origin_answer_seconds_sum")[f'{{origin="{origin}"}}'] == 2.0
    assert series(metrics, "cachd_origin_requests_total") == {f'{{code_class="2xx",source="{scheme}"}}': 1}


@pytest.mark.parametrize(
    ("error", "code", "is_failure"),
    [
        (Unavailable("x", code="origin_failed", origin_status=503), "5xx", True),
        (Unavailable("x", code="stalled"), "broken", True),
        (Forbidden("x", code="source_forbidden", origin_status=403), "4xx", True),
        (Forbidden("x", code="private_address"), "broken", False),
        (Cancelled("x"), "broken", False),
    ],
)
def test_a_refusal_counts_by_its_status_and_is_a_failure_of_the_origin_unless_cachd_refused(
    error: CachdError, code: str, is_failure: bool
) -> None:
    metrics = Metrics()
    meter = Meters(metrics).of(Ref.parse("https://host/x"))
    meter.refused(error)
    requests = series(metrics, "cachd_origin_requests_total")
    assert requests == {'{code_class="2xx",source="https"}': 0, f'{{code_class="{code}",source="https"}}': 1}
    failures = series(metrics, "cachd_origin_failures_total")
    assert sum(failures.values()) == is_failure
    assert failures[f'{{code_class="{code}",origin="host"}}'] == is_failure
    meter.retried(error)
    assert list(series(metrics, "cachd_origin_retries_total").values()) == [1]


def test_bytes_that_are_resumed_hedged_or_wrong_are_counted() -> None:
    metrics = Metrics()
    meter = Meters(metrics).of(Ref.parse("https://host/x"))
    meter.resumed(3)
    meter.hedged(4)
    meter.mismatched("disk", 5)
    assert series(metrics, "cachd_resumed_bytes_total") == {"": 3}
    assert series(metrics, "cachd_hedged_bytes_total") == {"": 4}
    assert series(metrics, "cachd_refetched_bytes_total") == {'{reason="disk"}': 5, '{reason="source"}': 0}
    assert series(metrics, "cachd_verify_failures_total")['{stage="pull"}'] == 1


def test_only_so_many_origins_have_meters_of_their_own() -> None:
    metrics = Metrics()
    meters = Meters(metrics)
    own = [meters.of(ref) for ref in hosts(MAX_ORIGINS)]
    others = [meters.of(ref) for ref in hosts(MAX_ORIGINS + 2)[MAX_ORIGINS:]]
    assert len({id(each) for each in own}) == MAX_ORIGINS
    assert others[0] is others[1]
    assert others[0] is not meters.of(Ref.parse("s3://bucket/x"))
    assert meters.of(hosts(1)[0]) is own[0]
    others[0].received(7, 0.0)
    assert series(metrics, "cachd_origin_download_bytes_total")[f'{{origin="{OTHER_ORIGINS}"}}'] == 7
