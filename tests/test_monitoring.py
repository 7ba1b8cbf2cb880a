"""The alerts: each names metrics that exist, fires when it should, has a section in the runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachd.metrics.metrics import table
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import MIB, assert_problem, until

PROJECT = Path(__file__).parent.parent
RULES = PROJECT / "daemonset/monitoring/rules.yaml"
RUNBOOK = (PROJECT / "docs/runbook.md").read_text()
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
}
COMMANDS = set(re.findall(r"^### cachd ([a-z-]+)", (PROJECT / "docs/commands.md").read_text(), re.MULTILINE))
Nodes = Callable[..., Node]
Series = dict[str, str]
PATIENCE_SECONDS = 120

WEEK = 7 * 24 * 3600
INTERVAL_MINUTES = {"CachdScrubBehind": 60}  # else 1; promtool's time begins at 0, and it takes five weeks
# Of each alert, series with which it fires at their end, and series with which it does not, in promtool's
# notation: a value for each interval.
FIRING: dict[str, tuple[Series, Series]] = {
    "CachdAway": ({"up": "0x120"}, {"up": "1x120"}),
    "CachdRequiredModelNotReady": (
        {"cachd_required_models_not_ready": "1x120"},
        {"cachd_required_models_not_ready": "1x100 0x20"},
    ),
    "CachdPullStalled": (
        {"cachd_pulls_in_progress": "1x120", 'cachd_download_bytes_total{source="hf"}': "7x120"},
        {
            "cachd_pulls_in_progress": "2x120",
            'cachd_download_bytes_total{source="hf"}': "7x120",
            'cachd_download_bytes_total{source="s3"}': "0+1000x120",
        },
    ),
    "CachdPullsFailing": (
        {'cachd_models{state="failed"}': "2x120"},
        {'cachd_models{state="failed"}': "0x120", 'cachd_models{state="cancelled"}': "2x120"},
    ),
    "CachdModelDamaged": (
        {'cachd_models{state="damaged"}': "1x120"},
        {'cachd_models{state="damaged"}': "0x110 1x10"},
    ),
    "CachdCorruption": (
        {'cachd_verify_failures_total{stage="pull"}': "0x100 1 2 3 4x17"},
        {'cachd_verify_failures_total{stage="pull"}': "0x100 1x20"},
    ),
    "CachdRateLimited": (
        {'cachd_origin_retries_total{reason="rate_limited"}': "0+1x120"},
        {'cachd_origin_retries_total{reason="stalled"}': "0+1x120"},
    ),
    "CachdNoSpace": ({"cachd_no_space_total": "0x100 1x20"}, {"cachd_no_space_total": "1x120"}),
    "CachdDiskBelowReserve": (
        {"cachd_fs_free_bytes": "9x120", "cachd_reserve_free_bytes": "10x120"},
        {"cachd_fs_free_bytes": "10x120", "cachd_reserve_free_bytes": "10x120"},
    ),
    "CachdDiskBelowKubeletThreshold": (
        {
            "cachd_fs_free_bytes": "9x120",
            "cachd_fs_size_bytes": "100x120",
            'cachd_kubelet_threshold_ratio{from="defaults"}': "0.1x120",
        },
        {
            "cachd_fs_free_bytes": "11x120",
            "cachd_fs_size_bytes": "100x120",
            'cachd_kubelet_threshold_ratio{from="defaults"}': "0.1x120",
        },
    ),
    "CachdDiskFailing": ({"cachd_disk_failures_total": "0x100 1x20"}, {"cachd_disk_failures_total": "1x120"}),
    "CachdConfigRefused": (
        {"cachd_config_last_reload_successful": "0x120"},
        {"cachd_config_last_reload_successful": "1x120"},
    ),
    "CachdConfigWaiting": (
        {"cachd_config_waiting_options": "1x120"},
        {"cachd_config_waiting_options": "0x120"},
    ),
    "CachdScrubBehind": (
        {"cachd_scrub_oldest_timestamp_seconds": f"60x{5 * WEEK // 3600}"},
        {"cachd_scrub_oldest_timestamp_seconds": f"0x{5 * WEEK // 3600}"},
    ),
    "CachdCertificateExpires": (
        {"cachd_tls_certificate_expiry_timestamp_seconds": f"{WEEK}x120"},
        {"cachd_tls_certificate_expiry_timestamp_seconds": f"{2 * WEEK}x120"},
    ),
    "CachdTokensRefused": ({"cachd_tokens_in_force": "0x120"}, {"cachd_tokens_in_force": "1x120"}),
    "CachdNodeSignalsOutdated": (
        {"cachd_node_signals_written": "0x120"},
        {"cachd_node_signals_written": "1x120"},
    ),
}


def sample(series: str) -> str:
    """The series of one node, as Prometheus scrapes it."""
    name, _, labels = series.rstrip("}").partition("{")
    of_node = 'instance="gpu-1", job="cachd"'
    return f"{name}{{{', '.join(filter(None, (labels, of_node)))}}}"


def case(alert: str, series: Series, *, fires: bool) -> dict[str, Any]:
    """A test of promtool: whether an alert fires at the end of its series."""
    every = INTERVAL_MINUTES.get(alert, 1)
    values = [sum(int(part.partition("x")[2] or 0) + 1 for part in each.split()) for each in series.values()]
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)'
    return {
        "interval": f"{every}m",
        "input_series": [{"series": sample(name), "values": each} for name, each in series.items()],
        "promql_expr_test": [
            {
                "expr": firing,
                "eval_time": f"{every * (max(values) - 1)}m",
                "exp_samples": [{"labels": "{}", "value": int(fires)}],
            }
        ],
    }


def test_every_metric_in_a_rule_is_one_of_cachd() -> None:
    known = {name for name, _ in table()}
    for name, rule in ALERTS.items():
        named = set(re.findall(r"\bcachd_\w+", rule["expr"]))
        assert named or name == "CachdAway", name
        assert named <= known | {f"{histogram}_count" for histogram in known}, name


def test_every_alert_says_how_bad_it_is_and_has_a_section_of_the_runbook() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)
    assert sections == list(ALERTS), "in the same order"
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_every_section_of_the_runbook_has_three_commands_that_exist() -> None:
    for section in RUNBOOK.split("\n## ")[1:]:
        block = section.split("```sh\n")[1].split("```")[0].splitlines()
        assert len(block) == 3, section.partition("\n")[0]
        used = {line.split()[1] for line in block if line.startswith("c ")}
        assert used <= COMMANDS, used


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("every", [1, 60], ids="{} min".format)
@pytest.mark.parametrize("fires", [True, False], ids=["firing", "not firing"])
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path, *, fires: bool, every: int) -> None:
    assert FIRING.keys() == ALERTS.keys()
    tests = [
        case(name, series[0 if fires else 1], fires=fires)
        for name, series in FIRING.items()
        if INTERVAL_MINUTES.get(name, 1) == every
    ]
    file = tmp_path / "tests.yaml"
    told = {"rule_files": [str(RULES)], "evaluation_interval": f"{every}m", "tests": tests}
    file.write_text(yaml.safe_dump(told))
    promtool("test", "rules", str(file))


@pytest.mark.needs("promtool")
def test_promtool_finds_nothing_wrong_with_rules_and_metrics(node: Nodes) -> None:
    promtool("check", "rules", str(RULES))
    assert promtool("check", "metrics", given=node().ask("GET", "/metrics").document) == ""


def promtool(*words: str, given: bytes = b"") -> str:
    """What it prints. It finds nothing wrong."""
    command = [str(shutil.which("promtool")), *words]
    ended = subprocess.run(command, input=given, capture_output=True, timeout=PATIENCE_SECONDS)
    said = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 0, said
    return said


def test_required_models_that_are_not_ready_and_the_reserve_are_counted(origin: Origin, node: Nodes) -> None:
    models = [
        {"ref": origin.add("/here", noise(1000)), "name": "here", "required": True},
        {"ref": f"{origin.url}/nowhere", "name": "nowhere", "required": True},
        {"ref": f"{origin.url}/nothing", "name": "nothing"},
    ]
    running = node(models=models, retries=0, reserve_free="1MB")
    assert running.ready("here").status == 200
    running.wait_for("pull ended", name="nowhere")
    assert running.metric("cachd_required_models_not_ready") == 1
    assert running.metric("cachd_reserve_free_bytes") == 1_000_000
    running.configure(**{**running.options, "models": models[:1]})
    until(lambda: running.metric("cachd_required_models_not_ready") == 0)


def test_pulls_that_find_no_space_are_counted(origin: Origin, node: Nodes) -> None:
    running = node(limit_bytes=4 * MIB)
    running.pull(origin.add("/large", noise(5 * MIB)))
    assert_problem(running.ready("large"), 413, "too_big")
    assert running.metric("cachd_no_space_total") == 1
