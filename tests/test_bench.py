"""The benchmarks run end to end at small sizes, and judge by what they measured."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import bandwidth, cold, compare, gil, goals, growth, models, openssl, slow, tls, upkeep, warm
from tests.ground.needs import require

pytestmark = [
    pytest.mark.timeout(1800),  # ten questions take a minute or two, a busy machine many times that
    pytest.mark.alone("measures, and takes every core for it"),
]
PROJECT = Path(__file__).parent.parent
QUICK = ("cold", "tls", "models", "resume", "upkeep", "warm", "start", "growth", "gil", "slow")


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


@pytest.mark.parametrize("question", ["cold", "tls", "models"])
def test_a_question_keeps_every_run_and_a_plot(quick: tuple[Path, str], question: str) -> None:
    results = json.loads((quick[0] / f"{question}.json").read_text())
    rows = [row for case in results["cases"] for row in case["rows"]]
    assert all(row["runs"] or row["note"] for row in rows)
    assert all(row["runs"] for row in rows if row["name"].startswith("cachd") or row["form"] == "limit")
    assert all(run["seconds"] > 0 for row in rows for run in row["runs"])
    assert (quick[0] / f"{question}.png").stat().st_size


def test_a_start_and_a_probe_under_load_give_the_figures_of_their_goals(
    quick: tuple[Path, str],
) -> None:
    found = {
        name: importlib.import_module(f"bench.{name}").figures(
            json.loads((quick[0] / f"{name}.json").read_text())
        )
        for name in ("start", "warm")
    }
    assert found["warm"]["ready p99 ms, saturated"] > 0
    assert all((quick[0] / f"{name}.png").stat().st_size for name in found)


def test_a_repair_fetches_one_part_and_verifying_leaves_memory_as_it_was(quick: tuple[Path, str]) -> None:
    results = json.loads((quick[0] / "upkeep.json").read_text())
    found = upkeep.figures(results)
    assert 0 < found["repair: MiB fetched"] < results["size_bytes"] / (2 << 20)
    assert found["resident after verify"] == 1
    assert min(found["warm / disk"], found["rollback: seconds"]) > 0
    assert (quick[0] / "upkeep.png").stat().st_size


def test_a_killed_daemon_keeps_what_its_journal_holds(quick: tuple[Path, str]) -> None:
    results = json.loads((quick[0] / "resume.json").read_text())
    ours = [run for case in results["cases"] if case["name"] == "cachd" for run in case["runs"]]
    assert ours
    assert all(run["kept"] > 0 and 0 <= run["again"] < results["size_bytes"] / 2 for run in ours)


def test_a_missing_peer_is_named(quick: tuple[Path, str]) -> None:
    rows = json.loads((quick[0] / "cold.json").read_text())["cases"][0]["rows"]
    missing = [row for row in rows if row["name"] == "curl"]
    assert [(row["form"], row["runs"], row["note"]) for row in missing] == [
        ("unverified", [], "not installed"),
        ("verified", [], "not installed"),
    ]
    assert "curl is not installed: apt-get install curl" in quick[1]
    slow = json.loads((quick[0] / "slow.json").read_text())["cases"]
    assert [row["note"] for case in slow for row in case["rows"] if row["name"] == "curl"] == [
        "not installed"
    ] * 2


def test_an_origin_that_holds_back_is_observed_for_every_run(quick: tuple[Path, str]) -> None:
    cases = json.loads((quick[0] / "slow.json").read_text())["cases"]
    runs = [run for case in cases for row in case["rows"] for run in row["runs"]]
    assert len(runs) >= 2  # cachd in both cases; peers as they are installed
    assert all(max(seen["connections"] for seen in run["observed"]) >= 1 for run in runs)


def test_the_lock_is_found_by_both_methods(quick: tuple[Path, str]) -> None:
    results = json.loads((quick[0] / "gil.json").read_text())
    looks = [case["sampled"] for case in results["cases"]]
    assert all("note" in look for look in looks) or sum(look["held"] for look in looks) > 0
    for case in results["cases"]:
        assert all(0 < run["free_seconds"] < run["cpu_seconds"] for run in case["counted"])
    assert {"gil: GB/s ceiling, plaintext", "gil: GB/s ceiling, TLS"} <= {goal.figure for goal in goals.GOALS}


def test_every_point_of_a_growth_is_measured(quick: tuple[Path, str]) -> None:
    results = json.loads((quick[0] / "growth.json").read_text())
    points = {series["name"]: [point["x"] for point in series["points"]] for series in results["series"]}
    assert {name: tuple(xs) for name, xs in points.items()} == growth.QUICK
    assert all(point["runs"] for series in results["series"] for point in series["points"])


def test_a_peer_that_fails_says_why_and_ends_nothing(quick: tuple[Path, str]) -> None:
    results = json.loads((quick[0] / "models.json").read_text())
    notes = {row["note"] for case in results["cases"] for row in case["rows"]}
    assert notes <= {None, "not installed"}


def test_every_goal_is_told_though_its_question_was_not_asked(quick: tuple[Path, str]) -> None:
    assert quick[1].count("not measured") >= 1
    assert len(goals.judged({})) == len(goals.GOALS)
    assert {line[4] for line in goals.judged({})} == {"not measured"}


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
        line("recv_into + xxh3 + pwrite, 4 threads", "limit", 0.96, cpu_seconds=0.4),
        line("sha256, one core", "limit", 1.8),
        line(cold.RAW_VERIFIED, "limit", 2.5),
    ]
    disk = [
        line("cachd", "verified", 2.0),
        line("hf_transfer", "verified", 3.0),
        line(cold.RAW_DURABLE, "limit", 1.2),
    ]
    cases = [{"sink": "memory", "rows": memory}, {"sink": "disk", "rows": disk}]
    results = {"size_bytes": 2_000_000_000, "cases": cases}
    assert cold.figures(results) == pytest.approx(
        {
            "unverified / raw limit": 0.9,
            "raw limit with parts hashed / raw limit": 0.9375,
            "unverified CPU s/GB": 0.25,
            "raw limit with parts hashed, CPU s/GB": 0.2,
            "unverified / aria2c -x16": 4.0,
            "raw limit with parts hashed / aria2c -x16": 4.0 / 0.96,
            "verified / sha256 of one core": 0.9,
            "verified limit / sha256 of one core": 0.72,
            "verified / aria2c --checksum": 2.5,
            "verified limit / aria2c --checksum": 2.0,
            "crc64nvme / unverified": 0.8,
            "durable / hf_transfer": 1.5,
            "durable limit / hf_transfer": 2.5,
        }
    )


def test_a_python_is_given_the_openssl_of_the_image(tmp_path: Path) -> None:
    told = openssl.version(openssl.given(tmp_path))
    assert [int(number) for number in re.findall(r"\d+", told)[:2]] >= [3, 1], told


def test_the_figures_of_tls_are_of_the_fastest_peer_in_its_better_form() -> None:
    memory = [
        line("cachd", "unverified", 2.0, cpu_seconds=0.8),
        line("cachd", "verified", 2.0),
        line(cold.IMAGE, "unverified", 1.25, cpu_seconds=0.4),
        line(cold.IMAGE, "verified", 8.0),
        line("aria2c -x16", "unverified", 1.5),
        line("aria2c -x16", "verified", 8.0),
        line(cold.RAW_HASHED, "limit", 1.2, cpu_seconds=0.9),
    ]
    cases = [{"sink": "memory", "rows": memory}, {"sink": "disk", "rows": []}]
    assert tls.figures({"size_bytes": 2_000_000_000, "cases": cases}) == pytest.approx(
        {
            "speed / fastest peer": 0.75,
            "raw limit with parts hashed / fastest peer": 1.25,
            "raw limit with parts hashed, CPU / aria2c's": 0.9,
            "CPU / aria2c's": 0.8,
            "speed / fastest peer, OpenSSL of the image": 1.0,
            "CPU / aria2c's, OpenSSL of the image": 0.4,
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
        line(models.SHARD_EACH, "limit", 5.0),
    ]

    def small(ours: float) -> list[dict[str, Any]]:
        return [
            line("cachd", "verified", ours),
            line(models.CACHD_HUB, "verified", 1.0),
            line("aria2c -j16", "unverified", 2.0),
            line("aria2c -j16", "verified", 6.0),
            line("aria2c -j16 --checksum", "verified", 5.0),
            line(models.HUB, "unverified", 4.0),
            line(f"{models.ASKED}, threads: 1", "limit", ours / 2),
            line(f"{models.ASKED}, threads: 4", "limit", ours),
            line(f"{models.LIBRARY}, threads: 4", "limit", ours / 4),
        ]

    sizes = {"size_bytes": 8_000_000_000, "largest_bytes": 1_000_000_000, "sink": "memory"}
    results = {
        "cores": 2,
        "cases": [
            {"model": "shards", "rows": shards, **sizes},
            {"model": "small", "rows": small(1.0), **sizes},
            {"model": "small", "rows": small(2.5), **sizes, "sink": "disk"},
        ],
    }
    assert models.figures(results) == pytest.approx(
        {
            "shards / cores": 1.0,  # 2 cores, 0.3 + 0.7 s of CPU a GB: 2 GB/s
            "shards / fastest peer": 1.5,
            "shards limit / cores": 0.8,
            "shards limit / fastest peer": 1.2,
            "small / snapshot_download": 4.0,
            "small / aria2c": 0.8,
            "small durable / aria2c": 2.0,
            "bare loop / aria2c": 1.6,
            "library loop / aria2c": 3.2,
        }
    )


def test_a_goal_is_met_up_to_its_bound() -> None:
    least, most = goals.Goal("w", "f", "n", least=2.0), goals.Goal("w", "f", "n", most=0.3)
    assert [least.met(value) for value in (1.99, 2.0, 3.0)] == [False, True, True]
    assert [most.met(value) for value in (0.2, 0.3, 0.31)] == [True, True, False]
    measured = {"cold: unverified / aria2c -x16": 4.2, "cold: raw limit with parts hashed / aria2c -x16": 4.5}
    judged = {tuple(cells[:2]): cells[3:] for cells in goals.judged(measured)}
    assert judged[goals.UNVERIFIED, "speed / aria2c"] == ["4.2", "met", f"4.5: {goals.WITH_PARTS}"]
    assert judged[goals.UNVERIFIED, "speed / curl"] == ["", "not measured", ""]


def test_probes_are_judged_apart_where_the_machine_itself_was_on_time() -> None:
    def case(name: str, *runs: tuple[float, float]) -> dict[str, Any]:
        told = [{"milliseconds": {"99.0": late}, "machine": {"100.0": still}} for late, still in runs]
        return {"load": warm.FILE, "name": name, "runs": told}

    still = case(warm.CONTROL, (5.0, 26.0))
    found = warm.figures({"cases": [case(warm.READY, (90.0, 40.0), (12.0, 25.0), (80.0, 30.0)), still]})
    assert found == {
        "ready p99 ms, saturated": 80.0,
        "ready p99 ms, saturated, machine on time": 12.0,
        "control p99 ms, saturated": 5.0,
    }


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


def test_a_share_is_of_the_best_that_any_number_of_connections_gets() -> None:
    def sample(seconds: float, connections: int, sent: float) -> dict[str, float]:
        return {"seconds": seconds, "connections": connections, "sent": sent}

    def row(name: str, seconds: float, *observed: dict[str, float]) -> dict[str, Any]:
        run = {"seconds": seconds, "cpu_seconds": 1.0, "anonymous_bytes": 0, "observed": list(observed)}
        form = "limit" if name in map(slow.fixed, slow.FIXED) else "unverified"
        return {"name": name, "form": form, "note": None, "size_bytes": 800, "runs": [run]}

    ours = row(slow.FRESH, 4.0, sample(0, 2, 0), sample(1, 4, 0), sample(2, 8, 200), sample(4, 10, 700))
    few, many = (
        row(slow.fixed(count), 4.0, sample(0, count, 0), sample(1, count, 400), sample(3, count, sent))
        for count, sent in ((9, 900), (12, 1000))
    )
    results = {"cases": [{"case": "link", "best": 400.0, "rows": [ours, few, many, row("curl", 20.0)]}]}
    assert slow.connections(ours) == [9]
    assert slow.figures(results) == pytest.approx(
        {
            "link: share": 0.5,
            "link: share, settled": 250 / 400,
            "link: share, settled / bare loop": 250 / 300,
            "link: speed / curl": 5.0,
        }
    )


def test_the_ceiling_is_of_the_method_and_form_that_see_most_of_the_lock() -> None:
    def case(transport: str, form: str, held: int, *seconds: float) -> dict[str, Any]:
        counted = [{"cpu_seconds": 1.0, "free_seconds": 1.0 - locked} for locked in seconds]
        return {"transport": transport, "form": form, "sampled": {"held": held}, "counted": counted}

    cases = [
        case("plaintext", "unverified", 200, 0.1, 0.3, 0.2),  # by py-spy 0.2 s a pull
        case("plaintext", "verified", 500, 0.1),  # 0.5 s
        case("TLS", "unverified", 100, 0.8),
        {**case("TLS", "verified", 0, 0.4), "sampled": {"note": "not installed"}},
    ]
    results = {"size_bytes": 2_000_000_000, "runs": 2, "cases": cases}
    assert gil.figures(results) == pytest.approx(
        {
            "share of the CPU time, plaintext, unverified": 0.2,
            "share of the CPU time, plaintext, verified": 0.1,
            "share of the CPU time, TLS, unverified": 0.8,
            "share of the CPU time, TLS, verified": 0.4,
            "GB/s ceiling, plaintext": 4.0,
            "GB/s ceiling, TLS": 2.5,
        }
    )
    assert [cells[-1] for cells in gil.cells(results)] == ["10.0", "4.0", "2.5", "5.0"]


def test_a_growth_is_the_steeper_of_the_fit_and_the_last_step() -> None:
    def series(name: str, cpu: dict[int, float], memory: float) -> dict[str, Any]:
        points = [
            {"x": x, "runs": [{"seconds": 1.0, "cpu_seconds": y, "anonymous_bytes": memory * (1 + x / 1000)}]}
            for x, y in cpu.items()
        ]
        return {"name": name, "points": points}

    results = {
        "quick": False,
        "series": [
            series("size", {1: 2.0, 4: 8.0, 16: 32.0}, 90e6),
            series("files", {1: 1.0, 10: 1.0, 100: 100.0}, 300e6),
            series("streams", {1: 0.5, 32: 0.5}, 95e6),
        ],
    }
    found = growth.figures(results)
    assert found["CPU against size, exponent"] == pytest.approx(1.0)
    assert found["CPU against files, exponent"] == pytest.approx(2.0)
    assert found["CPU against streams, exponent"] == pytest.approx(0.0)
    assert found["anonymous MB, 32 streams"] == pytest.approx(95 * 1.032)
    verdicts = [(cells[0], cells[2], cells[4]) for cells in growth.fits(results)]
    assert verdicts == [
        ("size", "linear", "does not grow"),
        ("files", "worse than linear", "does not grow"),
        ("streams", "does not grow", "does not grow"),
    ]
    assert "anonymous MB, 32 streams" not in growth.figures({**results, "quick": True})


def test_a_checkout_is_slower_when_the_whole_interval_of_the_ratio_lies_below_the_bound() -> None:
    noisy = [0.7, 1.3, 0.8, 1.2, 0.9, 1.1, 1.0, 0.85, 1.15, 0.95, 1.05, 0.75, 1.25, 1.0, 1.0]
    low, high = compare.interval(noisy)
    assert low < 1 < high
    assert high > compare.SLOWER
    low, high = compare.interval([ratio * 0.7 for ratio in noisy])
    assert high < compare.SLOWER
    assert 0.6 < low < high < 0.8
