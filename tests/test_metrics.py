"""Every metric that docs/metrics.md lists is exposed, and changes when what it measures changes."""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

import pytest

from cachd.metrics import EVICTION_REASONS, MODEL_STATES, Metrics
from cachd.metrics.labels import CALLERS, VERDICTS
from cachd.report.values import ModelState
from cachd.transfer.progress import State as PullState
from tests.ground.hub import EVERY_METHOD
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Flip, Reset, Status
from tests.ground.site import MIB, Ground, mapped, names, until

PROJECT = Path(__file__).parent.parent
TABLE = (PROJECT / "docs/metrics.md").read_text().split("<!-- metrics -->")[1].split("<!-- /metrics -->")[0]
LISTED = set(re.findall(r"^\| `(cachd_\w+)` \|", TABLE, flags=re.MULTILINE))
OF_OPTIONS = {name for name in LISTED if name.startswith(("cachd_tls_", "cachd_node_signals_"))}
# Metrics that test_every_metric_moves leaves as they are, each with the module that tests it. The first two
# never change.
ELSEWHERE = {
    "cachd_build_info": "tests/test_metrics.py",
    "cachd_fs_size_bytes": "tests/test_metrics.py",
    "cachd_cache_limit_bytes": "tests/test_space_api.py",
    "cachd_config_in_force": "tests/test_options.py",
    "cachd_config_last_reload_successful": "tests/test_last_good.py",
    "cachd_config_waiting_options": "tests/test_last_good.py",
    "cachd_disk_failures_total": "tests/faults/test_disks.py",
    "cachd_hedged_bytes_total": "tests/test_hedging.py",
    "cachd_hub_connections": "tests/attacks/test_hub_endpoint.py",
    "cachd_hub_refused_connections_total": "tests/attacks/test_hub_endpoint.py",
    "cachd_hub_requests_in_progress": "tests/attacks/test_hub_endpoint.py",
    "cachd_hub_requests_total": "tests/attacks/test_hub_endpoint.py",
    "cachd_hub_sent_bytes_total": "tests/attacks/test_hub_endpoint.py",
    "cachd_hub_token_checks_total": "tests/attacks/test_hub_endpoint.py",
    "cachd_hub_waiting": "tests/attacks/test_hub_endpoint.py",
    "cachd_kubelet_threshold_ratio": "tests/test_kubelet.py",
    "cachd_no_space_total": "tests/test_monitoring.py",
    "cachd_node_signal_failures_total": "tests/test_node_signals.py",
    "cachd_node_signal_writes_total": "tests/test_node_signals.py",
    "cachd_node_signals_written": "tests/test_node_signals.py",
    "cachd_required_models_not_ready": "tests/test_monitoring.py",
    "cachd_pull_eta_seconds": "tests/test_pull_metrics.py",
    "cachd_reserve_free_bytes": "tests/test_monitoring.py",
    "cachd_streams": "tests/test_streams.py",
    "cachd_swept_bytes_total": "tests/test_sweep.py",
    "cachd_tls_certificate_expiry_timestamp_seconds": "tests/attacks/test_listeners.py",
    "cachd_tls_in_force": "tests/attacks/test_listeners.py",
    "cachd_tokens_in_force": "tests/attacks/test_roles.py",
    "cachd_view_unwatched": "tests/test_watch.py",
    "cachd_warmed_bytes_total": "tests/test_warm.py",
}

Samples = dict[str, float]


def scraped(node: Node) -> Samples:
    text = node.ask("GET", "/metrics").document.decode()
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def family(sample: str) -> str:
    """The metric of a sample: `cachd_x_seconds` for `cachd_x_seconds_bucket{le="1.0"}`."""
    name = sample.partition("{")[0]
    return next((n for n in (name, re.sub(r"_(bucket|sum|count)$", "", name)) if n in LISTED), name)


def test_every_metric_of_the_page_is_exposed_and_no_other(ground: Ground) -> None:
    text = ground.node.ask("GET", "/metrics").document.decode()
    assert set(re.findall(r"^# TYPE (\w+) ", text, flags=re.MULTILINE)) == LISTED - OF_OPTIONS
    assert {family(sample) for sample in scraped(ground.node)} <= LISTED


def test_what_can_be_told_apart_has_its_series_from_the_start(alone: Callable[..., Ground]) -> None:
    """A rate over a series that begins with its first event misses that event."""
    samples = scraped(alone().node)
    for reason in EVICTION_REASONS:
        assert samples[f'cachd_evictions_total{{reason="{reason}"}}'] == 0
    for state in MODEL_STATES:
        assert samples[f'cachd_models{{state="{state}"}}'] == 0
    for role, verdict in itertools.product(CALLERS, VERDICTS):
        assert samples[f'cachd_writes_total{{role="{role}",verdict="{verdict}"}}'] == 0
    for reason in ("disk", "source"):
        assert samples[f'cachd_refetched_bytes_total{{reason="{reason}"}}'] == 0
    for stage in ("pull", "scrub"):
        assert samples[f'cachd_verify_failures_total{{stage="{stage}"}}'] == 0


def test_the_metrics_of_one_object_are_not_those_of_another() -> None:
    first, second = Metrics(), Metrics()
    first.hits.inc()
    assert b"cachd_hits_total 1.0" in first.text()
    assert b"cachd_hits_total 0.0" in second.text()


def test_every_metric_moves(alone: Callable[..., Ground]) -> None:
    ground = alone(pulls=1, retries=3, evict=False, limit_bytes="1GiB")
    node, origin, seen = ground.node, ground.origin, list[Samples]()

    def agreed() -> Samples | None:
        """What is scraped, if the states of the models are those that the API lists afterwards."""
        found = scraped(node)
        states = Counter(model["state"] for model in node.ask("GET", "/v1/models").document["models"])
        return found if {s: int(found[f'cachd_models{{state="{s}"}}']) for s in states} == states else None

    def look() -> None:
        seen.append(until(agreed))  # a model may change its state between the two questions

    def evicted() -> float:
        """Ask for more space than there is; meanwhile, what was held may have become free."""
        space = node.ask("GET", "/v1/capacity").document["available_bytes"]
        node.ask("POST", "/v1/evictions", {"bytes": space + MIB // 4})
        return node.metric("cachd_evictions_total")

    look()
    ground.have("a.bin")
    node.pull(ground.add("a.bin"))
    with ground.held("held.bin"):
        node.pull(ground.add("held.bin"))
        node.pull(ground.add("later.bin", MIB))
        look()
        node.kill()
    node.start()
    for name in ("held.bin", "later.bin"):
        assert node.ready(name).status == 200
    content = noise(MIB, seed=50)
    origin.fault("/wrong.bin", Flip(5), times=1)
    node.pull(f"{origin.add('/wrong.bin', content)}#sha256={hashlib.sha256(content).hexdigest()}")
    assert node.ready("wrong.bin").status == 200
    origin.fault("/again.bin", Reset(at=0), times=1, when=lambda asked: asked.method == "GET")
    ground.have("again.bin")
    node.pull(origin.add("/gone.bin", b"x"), name="gone")
    origin.fault("/none.bin", Status(404), methods=EVERY_METHOD)
    node.pull(f"{origin.url}/none.bin", name="none")
    assert node.ready("none").status == 404
    node.ask("PUT", "/v1/limits", {"bytes_per_second": 4 * MIB})
    ground.have("slow.bin", 3 * MIB)
    look()
    node.ask("PUT", "/v1/limits", {})
    node.ask("POST", "/v1/models/a.bin/leases", {"seconds": 60})
    node.ask("POST", "/v1/models/a.bin/verify")
    node.wait_for("verified", name="a.bin")
    until(lambda: node.metric("cachd_view_watches") and node.metric("cachd_views_changed_total"))
    until(lambda: node.metric("cachd_scrub_oldest_timestamp_seconds"))
    with mapped(node.root / "models/later.bin/later.bin"):
        assert node.ask("DELETE", "/v1/models/later.bin?force=true").status == 200
        look()
    until(evicted)
    look()
    first, *others = seen
    moved = {
        family(sample)
        for later in others
        for sample in {*first, *later}
        if first.get(sample, 0.0) != later.get(sample, 0.0)
    }
    by_chance = {"cachd_streams", "cachd_pull_eta_seconds"}
    assert LISTED - moved == set(ELSEWHERE) - (moved & by_chance)
    assert "a.bin" in names(ground)


@pytest.mark.parametrize(("metric", "module"), ELSEWHERE.items(), ids=ELSEWHERE)
def test_a_metric_that_moves_elsewhere_is_tested_there(metric: str, module: str) -> None:
    text = (PROJECT / module).read_text()
    assert metric in text or metric.removeprefix("cachd_") in text


def test_every_state_that_a_model_can_have_is_one_of_the_metric() -> None:
    assert {*PullState, "damaged", "refused"} == set(ModelState) == set(MODEL_STATES)


def is_text(value: ast.expr | None) -> TypeGuard[ast.Constant]:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
