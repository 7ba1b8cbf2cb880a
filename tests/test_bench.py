"""The benchmarks run end to end at small sizes, and judge by what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import bandwidth, cold, goals, models
from tests.ground import nginx

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results and output of the quick questions, on a machine where one peer is missing."""
    if not nginx.available():
        pytest.skip(nginx.MISSING)
    place = tmp_path_factory.mktemp("bench")
    path = place / "bin"
    path.mkdir()
    for directory in ("/usr/sbin", "/usr/bin", "/bin"):
        for program in Path(directory).iterdir():
            if program.name != "curl" and not (path / program.name).exists():
                (path / program.name).symlink_to(program)
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "cold", "models", "--into", place / "results"],
        cwd=PROJECT,
        env={**os.environ, "PATH": str(path), "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert ended.returncode == 0, ended.stderr
    return place / "results", ended.stdout


@pytest.mark.parametrize("question", ["cold", "models"])
def test_a_question_keeps_every_run_and_a_plot(quick: tuple[Path, str], question: str) -> None:
    results = json.loads((quick[0] / f"{question}.json").read_text())
    rows = [row for case in results["cases"] for row in case["rows"]]
    assert all(row["runs"] or row["note"] for row in rows)
    assert all(row["runs"] for row in rows if row["name"].startswith("cachd") or row["form"] == "limit")
    assert all(run["seconds"] > 0 for row in rows for run in row["runs"])
    assert (quick[0] / f"{question}.png").stat().st_size


def test_a_missing_peer_is_named(quick: tuple[Path, str]) -> None:
    rows = json.loads((quick[0] / "cold.json").read_text())["cases"][0]["rows"]
    missing = [row for row in rows if row["name"] == "curl"]
    assert [(row["form"], row["runs"], row["note"]) for row in missing] == [
        ("unverified", [], "not installed"),
        ("verified", [], "not installed"),
    ]
    assert "curl is not installed: apt-get install curl" in quick[1]


def test_a_peer_that_fails_says_why_and_ends_nothing(quick: tuple[Path, str]) -> None:
    results = json.loads((quick[0] / "models.json").read_text())
    notes = {row["note"] for case in results["cases"] for row in case["rows"]}
    assert notes <= {None, "not installed"}


def test_every_goal_is_told_though_its_question_was_not_asked(quick: tuple[Path, str]) -> None:
    assert quick[1].count("not measured") >= 1
    assert len(goals.judged({})) == len(goals.GOALS)
    assert {line[-1] for line in goals.judged({})} == {"not measured"}


def line(name: str, form: str, seconds: float, cpu_seconds: float = 1.0) -> dict[str, Any]:
    spread = [{"seconds": s, "cpu_seconds": cpu_seconds, "anonymous_bytes": 0} for s in (9.0, seconds, 0.1)]
    return {"name": name, "form": form, "note": None, "runs": spread}


def test_the_figures_of_one_file_are_ratios_of_medians() -> None:
    memory = [
        line("cachd", "unverified", 1.0, cpu_seconds=0.5),
        line("cachd", "verified", 2.0),
        line("cachd, s3 with crc64nvme", "verified", 1.25),
        line("aria2c -x16", "unverified", 4.0),
        line("aria2c -x16", "verified", 5.0),
        line("recv_into + pwrite, 4 threads", "limit", 0.9),
        line("sha256, one core", "limit", 1.8),
    ]
    tls = [
        line("cachd", "unverified", 2.0, cpu_seconds=0.8),
        line("cachd", "verified", 2.0),
        line("aria2c -x16", "unverified", 1.5),
        line("aria2c -x16", "verified", 8.0),
    ]
    disk = [line("cachd", "verified", 2.0), line("hf_transfer", "verified", 3.0)]
    cases = [("memory", False, memory), ("memory", True, tls), ("disk", False, disk), ("disk", True, [])]
    results = {
        "size_bytes": 2_000_000_000,
        "cases": [{"sink": sink, "tls": secure, "rows": rows} for sink, secure, rows in cases],
    }
    assert cold.figures(results) == pytest.approx(
        {
            "unverified / raw limit": 0.9,
            "unverified CPU s/GB": 0.25,
            "unverified / aria2c -x16": 4.0,
            "verified / sha256 of one core": 0.9,
            "verified / aria2c --checksum": 2.5,
            "crc64nvme / unverified": 0.8,
            "tls / fastest peer": 0.75,
            "tls CPU / aria2c's": 0.8,
            "durable / hf_transfer": 1.5,
        }
    )


def test_the_figures_of_models_are_of_the_fastest_peer_and_the_worst_sink() -> None:
    shards = [
        line("cachd", "verified", 4.0),
        line("cachd, hf://", "verified", 3.0),
        line("curl --parallel", "verified", 6.0),
        line("s5cmd run", "verified", 9.0),
        line(models.RECEIVED, "limit", 0.2, cpu_seconds=0.3),
        line(models.HASHED, "limit", 1.0, cpu_seconds=5.6),
    ]

    def small(ours: float) -> list[dict[str, Any]]:
        return [
            line("cachd", "verified", ours),
            line(models.CACHD_HUB, "verified", 1.0),
            line("aria2c -j16", "unverified", 2.0),
            line(models.HUB, "unverified", 4.0),
        ]

    sizes = {"size_bytes": 8_000_000_000, "largest_bytes": 1_000_000_000, "sink": "memory"}
    results = {
        "cores": 2,
        "cases": [
            {"model": "shards", "rows": shards, **sizes},
            {"model": "small", "rows": small(1.0), **sizes},
            {"model": "small", "rows": small(2.5), **sizes},
        ],
    }
    assert models.figures(results) == pytest.approx(
        {
            "shards / cores": 1.0,  # 2 cores, 0.3 + 0.7 s of CPU a GB: 2 GB/s
            "shards / fastest peer": 1.5,
            "small / snapshot_download": 4.0,
            "small / aria2c": 0.8,
        }
    )


def test_a_goal_is_met_up_to_its_bound() -> None:
    least, most = goals.Goal("w", "f", "n", least=2.0), goals.Goal("w", "f", "n", most=0.3)
    assert [least.met(value) for value in (1.99, 2.0, 3.0)] == [False, True, True]
    assert [most.met(value) for value in (0.2, 0.3, 0.31)] == [True, True, False]
    judged = {tuple(cells[:2]): cells[3:] for cells in goals.judged({"cold: unverified / aria2c -x16": 4.2})}
    assert judged[goals.UNVERIFIED, "speed / aria2c"] == ["4.2", "met"]
    assert judged[goals.UNVERIFIED, "speed / curl"] == ["", "not measured"]


def test_a_limit_is_judged_only_where_the_machine_would_receive_more() -> None:
    def case(rate: int, name: str, *ratios: float) -> dict[str, Any]:
        return {"rate": rate, "name": name, "ratios": list(ratios)}

    cases = [
        case(10, bandwidth.UNLIMITED, 4.0, 3.9),
        case(10, "one pull", 1.0, 1.01, 1.3),
        case(10, "share", 0.98, 0.97, 0.96),
        case(1000, bandwidth.UNLIMITED, 0.9, 1.3, 0.8),
        case(1000, "one pull", 0.7),
    ]
    assert bandwidth.figures({"cases": cases}) == pytest.approx({"off at most": 0.03})
    assert [line[-1] for line in bandwidth.cells({"cases": cases})] == ["-", "yes", "yes", "-", "-"]
    assert bandwidth.figures({"cases": []}) == {}
