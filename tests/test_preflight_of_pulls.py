"""The preflight of a pull: its findings stay with the snapshot, or fail the pull."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import Invalid
from cachd.report.outcomes import outcome_of
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.site import Ground
from tests.ground.weights import safetensors, torch_archive
from tests.test_preflight import TEXT

Engines = Callable[..., Engine]
BAD = {**TEXT, "model.safetensors": safetensors(100) + b"more"}


def ready(root: Path, name: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((root / "ready" / f"{name}.json").read_text())["preflight"]
    return found


def test_findings_are_kept_with_the_snapshot_over_a_restart_and_a_rollback(
    hub: Hub, root: Path, engine: Engines
) -> None:
    hub.tag("org/m", "bad", hub.add("org/m", BAD))
    hub.tag("org/m", "good", hub.add("org/m", dict(TEXT)))
    opened = engine(hf_endpoint=hub.url, keep_previous=1)
    (finding,) = opened.pull("hf://org/m@bad", name="m").findings
    assert (finding.code, finding.level, finding.file) == ("safetensors", "refused", "model.safetensors")
    assert ready(root, "m") == [finding.as_document()]
    assert opened.pull("hf://org/m@good", name="m", replace=True).findings == ()
    assert ready(root, "m") == []
    assert opened.store.rollback("m", now=3.0).findings == (finding,)
    assert ready(root, "m") == [finding.as_document()]


def test_strict_refuses_what_an_engine_would_for_good_and_takes_the_rest(hub: Hub, engine: Engines) -> None:
    hub.add("org/bad", BAD)
    hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": torch_archive()})
    opened = engine(hf_endpoint=hub.url, preflight="strict")
    with pytest.raises(Invalid) as refusal:
        opened.pull("hf://org/bad")
    assert refusal.value.code == "preflight_refused"
    assert "model.safetensors: its tensors take 100 bytes, and 104 follow the header" in refusal.value.detail
    assert outcome_of(refusal.value).is_final
    assert opened.store.names.all() == []
    assert [each.code for each in opened.pull("hf://org/pickled").findings] == ["pickle"]


def test_off_examines_nothing(hub: Hub, engine: Engines) -> None:
    hub.add("org/bad", BAD)
    assert engine(hf_endpoint=hub.url, preflight="off").pull("hf://org/bad").findings == ()


def test_a_repair_keeps_the_findings(hub: Hub, engine: Engines) -> None:
    hub.add("org/bad", BAD)
    opened = engine(hf_endpoint=hub.url)
    first = opened.pull("hf://org/bad")
    manifest = opened.store.manifests.of(first)
    lost = next(file for file in manifest.files if file.path == "config.json")
    opened.store.content.path(lost.blob).unlink()
    assert opened.store.check(first.name, now=2.0)
    assert opened.pull("hf://org/bad").findings == first.findings != ()


def test_of_very_many_findings_forty_are_kept_and_the_refused_ones_first(hub: Hub, engine: Engines) -> None:
    weights = {f"{n}.safetensors": noise(100, n) for n in range(60)}
    pickles = {f"{n}/pytorch_model.bin": torch_archive(100) for n in range(3)}
    hub.add("org/many", {**weights, **pickles})
    kept = engine(hf_endpoint=hub.url).pull("hf://org/many").findings
    assert len(kept) <= 40
    assert [each.level for each in kept[:21]] == ["refused"] * 21


def test_findings_are_shown_wherever_a_model_is(ground: Ground) -> None:
    ground.hub.add("org/bad", BAD)
    ended = ground.node.cli("pull", "hf://org/bad", "--wait")
    assert ended.returncode == 0
    assert "preflight: refused: model.safetensors: its tensors take 100 bytes" in ended.stderr
    shown_lines = ground.node.cli("show", "org--bad").stdout.splitlines()
    assert [line.split()[1:3] for line in shown_lines if line.startswith("preflight ")] == [
        ["refused:", "model.safetensors:"]
    ]
    headings, *rows = ground.node.cli("ls", "-o", "wide").stdout.splitlines()
    (row,) = [each for each in rows if each.startswith("org--bad")]
    assert row[headings.index("WARNINGS") :].startswith("1 ")
    (row,) = [each for each in ground.node.cli("ls").stdout.splitlines() if each.startswith("org--bad")]
    assert "preflight: refused: model.safetensors: its tensors take 100 bytes" in row
    assert ground.node.metric("cachd_preflight_models", level="refused") == 1
    assert ground.node.metric("cachd_preflight_models", level="warning") == 0
    events = ground.node.ask("GET", "/v1/events?model=org--bad", headers={"Accept": "application/json"})
    (event,) = [each for each in events.document["events"] if each["kind"] == "preflight_found"]
    assert (event["reason"], event["code"], event["file"]) == ("refused", "safetensors", "model.safetensors")
    (shown,) = ground.show("org--bad")["ready"]["preflight"]
    assert (shown["code"], shown["level"]) == ("safetensors", "refused")
    assert ground.node.ready("org--bad").document["preflight"] == [shown]
