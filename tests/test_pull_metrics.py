"""The metrics of models, pulls and origins, by their labels; and the format in which they are answered."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from prometheus_client.openmetrics import parser

from cachd.errors import Forbidden, Unavailable
from cachd.metrics import MAX_MODELS, MAX_ORIGINS, Metrics
from cachd.model import Ref
from cachd.transfer.events import Meters
from tests.conftest import Engine
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Reset, Status
from tests.ground.site import MIB, Ground, said, until

OPENMETRICS = "application/openmetrics-text"
PROMETHEUS = (  # what Prometheus 2 sends
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


def series(metrics: Metrics, name: str) -> dict[str, float]:
    """The samples of a metric, by their labels."""
    found = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", metrics.text().decode(), re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def hosts(count: int) -> list[Ref]:
    return [Ref.parse(f"https://host-{number}.example/model.bin") for number in range(count)]


# --- models and pulls ---


def test_a_ready_model_has_its_size(ground: Ground) -> None:
    ground.have("sized.bin", MIB)
    assert ground.node.metric("cachd_model_size_bytes", model="sized.bin") == MIB
    ground.node.ask("DELETE", "/v1/models/sized.bin")
    assert ground.node.metric("cachd_model_size_bytes", model="sized.bin") == 0


def test_the_newest_models_are_those_with_series(engine: Callable[..., Engine], origin: Origin) -> None:
    running = engine()
    for name in ("b", "c", "a"):
        running.pull(origin.add(f"/{name}", name.encode()))
    assert [snapshot.name for snapshot in running.store.names.newest(2)] == ["a", "c"]
    assert len(running.store.names.newest(MAX_MODELS)) == 3


def test_a_pull_shows_how_far_it_is_until_it_ends(ground: Ground) -> None:
    node = ground.node
    assert node.metric("cachd_pull_done_ratio", model="half.bin") == 0
    with ground.held("half.bin"):
        shown = ground.show("half.bin")["pull"]["bytes"]
        ratio = node.metric("cachd_pull_done_ratio", model="half.bin")
        assert ratio == pytest.approx(shown["done"] / shown["total"], abs=0.01)
        assert 0 < ratio < 1
    assert node.ready("half.bin").status == 200
    assert "cachd_pull_done_ratio{" not in node.ask("GET", "/metrics").document.decode()


def test_a_pull_shows_when_its_last_byte_comes_while_bytes_come(alone: Callable[..., Ground]) -> None:
    ground = alone(limit_bytes_per_second="1MiB")
    ground.node.pull(ground.add("slow.bin", 32 * MIB))
    eta = until(lambda: ground.node.metric("cachd_pull_eta_seconds", model="slow.bin"))
    assert 1 < eta < 3600
    ground.node.ask("DELETE", "/v1/models/slow.bin")
    assert ground.node.metric("cachd_pull_eta_seconds", model="slow.bin") == 0


def test_bytes_that_a_hit_or_a_join_did_not_fetch_are_counted_as_saved(alone: Callable[..., Ground]) -> None:
    ground = alone()
    node, ref = ground.node, ground.have("here.bin", MIB)
    assert node.metric("cachd_saved_bytes_total") == 0
    node.pull(ref)
    assert node.metric("cachd_saved_bytes_total") == MIB
    with ground.held("joined.bin"):
        for _ in range(2):
            node.pull(f"{ground.origin.url}/joined.bin")
        assert node.metric("cachd_saved_bytes_total") == MIB, "nothing is saved before it is ready"
    assert node.ready("joined.bin").status == 200
    assert node.metric("cachd_saved_bytes_total") == MIB + 2 * 6 * MIB
    with ground.held("ended.bin"):
        node.pull(f"{ground.origin.url}/ended.bin")
        node.ask("DELETE", "/v1/models/ended.bin")
    assert node.metric("cachd_saved_bytes_total") == MIB + 2 * 6 * MIB, "a cancelled pull saved nothing"


# --- waiting ---


def waits(node: Node, result: str) -> float:
    return node.metric("cachd_ready_wait_seconds_count", result=result)


def test_the_time_until_a_model_is_ready_begins_with_the_first_question(alone: Callable[..., Ground]) -> None:
    ground = alone()
    node = ground.node
    ground.have("unasked.bin", MIB)
    assert node.ready("unasked.bin", wait=0).status == 200
    with ground.held("asked.bin"):
        before = waits(node, "ready")
        for _ in range(3):
            assert node.ready("asked.bin", wait=0).status == 503
    assert node.ready("asked.bin").status == 200
    assert waits(node, "ready") == before + 1, "one for each pull, however many ask"
    assert node.metric("cachd_ready_wait_seconds_sum", result="ready") > 0


def test_a_wait_ends_with_the_result_of_the_pull(alone: Callable[..., Ground]) -> None:
    ground = alone()
    node = ground.node
    with ground.held("ended.bin"):
        node.ready("ended.bin", wait=0)
        node.ask("DELETE", "/v1/models/ended.bin")
        assert waits(node, "cancelled") == 1
    hold = ground.origin.hold("/lost.bin", after=3 * MIB)
    node.pull(ground.add("lost.bin"))
    assert hold.reached.wait(120)
    assert node.ready("lost.bin", wait=0).status == 503
    ground.origin.stop()
    assert node.ready("lost.bin").status != 200
    assert waits(node, "failed") == 1
    assert node.ready("unknown.bin").status == 404
    assert sum(waits(node, result) for result in ("ready", "failed", "cancelled", "interrupted")) == 2


# --- origins ---


def test_bytes_time_and_failures_are_counted_by_origin(alone: Callable[..., Ground]) -> None:
    ground = alone(retries=2)
    node, origin = ground.node, ground.origin
    host = origin.url.partition("://")[2]
    ground.have("counted.bin", MIB)
    assert node.metric("cachd_origin_download_bytes_total", origin=host) == MIB
    assert node.metric("cachd_origin_receive_seconds_total", origin=host) > 0
    assert node.metric("cachd_origin_answer_seconds_count", origin=host) >= 1
    assert node.metric("cachd_origin_answer_seconds_sum", origin=host) > 0
    assert node.metric("cachd_origin_failures_total", origin=host) == 0
    origin.fault("/none.bin", Status(404))
    node.pull(f"{origin.url}/none.bin")
    assert node.ready("none.bin").status == 404
    assert node.metric("cachd_origin_failures_total", origin=host, code_class="4xx") == 1
    origin.fault("/torn.bin", Reset(at=MIB // 2), times=1, when=lambda asked: asked.method == "GET")
    ground.have("torn.bin", MIB)
    assert node.metric("cachd_origin_failures_total", origin=host, code_class="broken") == 1


def test_an_origin_is_what_a_ref_shows_and_not_who_serves_it(ground: Ground) -> None:
    """Whoever may read the metrics may list the models, and so knows their refs, but no mirror."""
    ground.hub.add("org/mirrored", {"config.json": b"{}", "model.safetensors": noise(MIB)})
    ground.node.pull("hf://org/mirrored")
    assert ground.node.ready("org--mirrored").status == 200
    assert ground.node.metric("cachd_origin_download_bytes_total", origin="hf") >= MIB
    text = ground.node.ask("GET", "/metrics").document.decode()
    assert ground.hub.url.partition("://")[2] not in text
    assert ground.hub.cdn.url.partition("://")[2] not in text


def test_a_bucket_is_an_origin_and_its_keys_are_not() -> None:
    metrics = Metrics()
    Meters(metrics).of(Ref.parse("s3://models/secret/prefix/")).received(5, 1.0)
    assert series(metrics, "cachd_origin_download_bytes_total") == {'{origin="s3://models"}': 5.0}


def test_so_many_origins_have_series_and_the_others_share_one() -> None:
    metrics = Metrics()
    meters = Meters(metrics)
    for ref in (*hosts(MAX_ORIGINS + 5), *hosts(MAX_ORIGINS + 5)):
        meters.of(ref).received(1, 0.5)
    found = series(metrics, "cachd_origin_download_bytes_total")
    assert len(found) == MAX_ORIGINS + 1
    assert found['{origin="host-0.example"}'] == 2
    assert found['{origin="other"}'] == 10
    assert series(metrics, "cachd_download_bytes_total") == {'{source="https"}': 2 * (MAX_ORIGINS + 5)}


def test_a_ref_that_is_forbidden_is_no_failure_of_its_origin() -> None:
    metrics = Metrics()
    meter = Meters(metrics).of(hosts(1)[0])
    meter.failed(Forbidden("the address is private"))
    assert not any(series(metrics, "cachd_origin_failures_total").values())
    meter.failed(Forbidden("401", origin_status=401))
    meter.failed(Unavailable("no route to host"))
    found = series(metrics, "cachd_origin_failures_total")
    failed = [labels for labels, count in found.items() if count]
    assert {re.findall(r'code_class="(\w+)"', labels)[0] for labels in failed} == {"4xx", "broken"}


# --- formats ---


@pytest.mark.parametrize("accept", [OPENMETRICS, PROMETHEUS])
def test_metrics_are_answered_in_openmetrics_where_that_is_asked_for(ground: Ground, accept: str) -> None:
    ground.have("once.bin", MIB)
    answer = ground.node.ask("GET", "/metrics", headers={"Accept": accept})
    assert said(answer, "Content-Type").startswith(f"{OPENMETRICS}; version=1.0.0; charset=utf-8")
    text = answer.document.decode()
    assert text.endswith("# EOF\n")
    plain = ground.node.ask("GET", "/metrics").document.decode()
    types = re.findall(r"^# TYPE (\w+) ", plain, flags=re.MULTILINE)
    families = {family.name for family in parser.text_string_to_metric_families(text)}  # type: ignore[no-untyped-call]
    assert {name.removesuffix("_total") for name in types} == families


@pytest.mark.parametrize("accept", [None, "text/plain", "*/*", "text/html", "application/json", ";;q=,", ""])
def test_metrics_are_answered_as_prometheus_text_otherwise(ground: Ground, accept: str | None) -> None:
    answer = ground.node.ask("GET", "/metrics", headers={} if accept is None else {"Accept": accept})
    assert said(answer, "Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    assert "# EOF" not in answer.document.decode()
