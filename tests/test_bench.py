"""The benchmarks run end to end at small sizes, and judge by what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cold, compare, goals, models, results
from tests.ground.needs import require

pytestmark = [
    pytest.mark.timeout(1800),  # five questions take a minute, a busy machine many times that
    pytest.mark.alone("measures, and takes every core for it"),
]
PROJECT = Path(__file__).parent.parent
QUICK = ("cold", "models", "resume", "start", "ready")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results and output of the quick questions, on a machine where one peer is missing."""
    require("nginx")
    place = tmp_path_factory.mktemp("bench")
    path = place / "bin"
    path.mkdir()
    for directory in ("/usr/sbin", "/usr/bin", "/bin"):
        for program in Path(directory).iterdir():
            if program.name != "curl" and not (path / program.name).exists():
                (path / program.name).symlink_to(program)
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", *QUICK, "--into", place / "results"],
        cwd=PROJECT,
        env={**os.environ, "PATH": str(path), "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return place / "results", ended.stdout


@pytest.mark.parametrize("question", ["cold", "models"])
def test_a_benchmark_keeps_every_run(quick: tuple[Path, str], question: str) -> None:
    found = json.loads((quick[0] / f"{question}.json").read_text())
    rows = [row for case in found["cases"] for row in case["rows"]]
    assert all(row["runs"] or row["note"] for row in rows)
    assert all(row["runs"] for row in rows if row["name"].startswith("cachd") or row["form"] == "limit")
    assert all(run["seconds"] > 0 for row in rows for run in row["runs"])


def test_a_start_and_a_probe_under_load_give_figures(quick: tuple[Path, str]) -> None:
    found = json.loads((quick[0] / "ready.json").read_text())
    assert results.figures({"ready": found})["ready: ready p99 ms, saturated"] > 0
    cases = json.loads((quick[0] / "start.json").read_text())["cases"]
    assert all(run["seconds"] > 0 for case in cases for run in case["runs"])


def test_a_killed_daemon_keeps_what_its_journal_holds(quick: tuple[Path, str]) -> None:
    found = json.loads((quick[0] / "resume.json").read_text())
    ours = [run for case in found["cases"] if case["name"] == "cachd" for run in case["runs"]]
    assert ours
    assert all(run["kept"] > 0 and 0 <= run["again"] < found["size_bytes"] / 2 for run in ours)


def test_a_missing_peer_is_named(quick: tuple[Path, str]) -> None:
    rows = json.loads((quick[0] / "cold.json").read_text())["cases"][0]["rows"]
    missing = [row for row in rows if row["name"] == "curl"]
    assert [(row["form"], row["runs"], row["note"]) for row in missing] == [("verified", [], "not installed")]
    assert "curl is not installed: apt-get install curl" in quick[1]


def test_a_peer_that_fails_says_why_and_ends_nothing(quick: tuple[Path, str]) -> None:
    found = json.loads((quick[0] / "models.json").read_text())
    notes = {row["note"] for case in found["cases"] for row in case["rows"]}
    assert notes <= {None, "not installed"}


def test_every_goal_is_judged_though_its_question_was_not_asked() -> None:
    assert len(goals.judged({})) == len(goals.GOALS)
    assert {line[4] for line in goals.judged({})} == {"not measured"}


def test_every_goal_and_its_control_are_figures_of_the_kept_results() -> None:
    found = results.figures(results.kept())
    assert {goal.figure for goal in goals.GOALS} <= found.keys()
    assert {goal.control for goal in goals.GOALS if goal.control} <= found.keys()


def line(name: str, form: str, seconds: float, cpu_seconds: float = 1.0) -> dict[str, Any]:
    spread = [{"seconds": s, "cpu_seconds": cpu_seconds, "anonymous_bytes": 0} for s in (9.0, seconds, 0.1)]
    return {"name": name, "form": form, "note": None, "runs": spread}


def test_the_figures_of_one_file_are_ratios_of_medians() -> None:
    def case(sink: str, *rows: dict[str, Any], tls: bool = False) -> dict[str, Any]:
        return {"sink": sink, "tls": tls, "rows": rows}

    memory = case(
        "memory",
        line("cachd", "verified", 2.0),
        line("cachd", "unverified", 1.0),
        line(cold.CRC, "verified", 1.25),
        line("aria2c -x16", "verified", 5.0),
        line(cold.SHA256, "limit", 1.8),
    )
    disk = case(
        "disk",
        line("cachd", "verified", 2.5),
        line("hf_transfer", "verified", 5.0),
        line("curl", "verified", 4.0),
        tls=True,
    )
    assert cold.figures({"size_bytes": 2_000_000_000, "cases": [memory, disk]}) == pytest.approx(
        {
            "memory, plaintext / aria2c -x16": 2.5,
            "memory, plaintext / fastest peer": 2.5,
            "memory, plaintext / sha256 of one core": 0.9,
            "memory, plaintext, GB/s": 1.0,
            "crc64nvme / unverified": 0.8,
            "disk, TLS / hf_transfer": 2.0,
            "disk, TLS / curl": 1.6,
            "disk, TLS / fastest peer": 1.6,
            "disk, TLS, GB/s": 0.8,
        }
    )


def test_the_figures_of_models_compare_what_the_hub_s_client_fetches_with_a_pull_from_the_hub() -> None:
    rows = [
        line("cachd", "verified", 4.0),
        line(models.CACHD_HUB, "verified", 3.0),
        line("curl --parallel", "verified", 6.0),
        line(models.HUB, "verified", 9.0),
    ]
    assert models.figures({"cases": [{"model": "small", "rows": rows}]}) == pytest.approx(
        {
            "small / curl --parallel": 1.5,
            f"small / {models.HUB}": 3.0,
            "small / fastest peer": 1.5,
            "small, seconds": 4.0,
        }
    )


def test_a_goal_is_met_up_to_its_bound() -> None:
    least, most = goals.Goal("w", "f", "n", least=2.0), goals.Goal("w", "f", "n", most=0.3)
    assert [least.met(value) for value in (1.99, 2.0, 3.0)] == [False, True, True]
    assert [most.met(value) for value in (0.2, 0.3, 0.31)] == [True, True, False]
    work, what = "/ready while a pull takes every core", "p99, ms"
    judged = {
        tuple(cells[:2]): cells[3:]
        for cells in goals.judged(
            {"ready: ready p99 ms, saturated": 24.0, "ready: control p99 ms, saturated": 9}
        )
    }
    assert judged[work, what] == ["24", "met", "9"]
    assert judged["kill -9", "MB fetched again"] == ["", "not measured", ""]


def test_a_checkout_is_slower_when_the_whole_interval_of_the_ratio_lies_below_the_bound() -> None:
    noisy = [0.7, 1.3, 0.8, 1.2, 0.9, 1.1, 1.0, 0.85, 1.15, 0.95, 1.05, 0.75, 1.25, 1.0, 1.0]
    low, high = compare.interval(noisy)
    assert low < 1 < high
    assert high > compare.SLOWER
    low, high = compare.interval([ratio * 0.7 for ratio in noisy])
    assert high < compare.SLOWER
    assert 0.6 < low < high < 0.8
