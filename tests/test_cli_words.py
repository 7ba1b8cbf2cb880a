"""What commands say to people: each thing once, in words, with sizes in units, and what to do next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import Corrupt, NoSpace
from cachd.model import count_text
from cachd.report.values import as_document, error_report
from cachd.terminal.amounts import size_text
from cachd.terminal.models import show_model, waits_text
from cachd.terminal.space import show_evictions
from tests.ground.node import Node
from tests.ground.origin import Status
from tests.ground.program import CACHD, run
from tests.ground.site import PATIENCE_SECONDS, Ground, assert_problem, mapped

Nodes = Callable[..., Node]


def test_one_thing_is_no_plural() -> None:
    assert [count_text(n, "model") for n in (0, 1, 2)] == ["0 models", "1 model", "2 models"]
    assert [count_text(n, "address", "addresses") for n in (1, 2)] == ["1 address", "2 addresses"]


def test_a_size_below_zero_has_a_unit_too() -> None:
    assert size_text(-151100800) == "-151.1 MB"


def test_a_wait_that_is_over_names_no_time() -> None:
    assert waits_text("origin", 100.0, None, lambda: 100.0) == waits_text("origin", None, None)


def test_a_list_of_nothing_is_said_in_words(node: Nodes) -> None:
    running = node()
    said = {
        ("ls",): "no model is here yet",
        ("sweep", "--dry-run"): "nothing is to be removed",
        ("events", "nobody"): "no event",
        ("sources",): "the option sources has no entry",
        ("evictions",): "nothing was evicted",
    }
    for words, text in said.items():
        ended = running.cli(*words)
        assert (ended.returncode, ended.stdout) == (0, ""), words
        assert ended.stderr.startswith(text), words


def test_what_is_not_evicted_has_no_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    pinned = {"names": ["qwen"], "manifest": "1", "protected_by": "pinned"}
    show_evictions({"evictions": [], "protected": [pinned]})
    assert capsys.readouterr().out == "PROTECTED  BY\nqwen       pinned\n"


def test_the_usage_names_arguments_as_the_documentation_does(ground: Ground) -> None:
    for words, usage, missing in (
        (("verify",), "{NAME}...", "'NAME'"),
        (("pull",), "{REF} [FILE]...", "'REF'"),
        (("hold",), "{NAME} [COMMAND]...", "'NAME'"),
    ):
        ended = ground.node.cli(*words)
        assert usage in ended.stderr, ended.stderr
        assert f"Missing argument {missing}" in ended.stderr or words == ("hold",)


def test_show_says_whether_a_failed_pull_is_tried_again(ground: Ground) -> None:
    ground.add("flaky.bin")
    ground.origin.fault("/flaky.bin", Status(500))
    for name in ("flaky.bin", "nothing.bin"):
        ground.node.pull(f"{ground.origin.url}/{name}")
        ground.node.wait_for("pull ended", name=name)
    lost = ground.node.cli("show", "nothing.bin").stdout
    assert "no, it is final: the same pull would fail again" in lost
    assert lost.count("404 Not Found") == 1
    flaky = ground.node.cli("show", "flaky.bin").stdout
    assert "is final" not in flaky
    assert "tries again" in flaky or "by cachd itself, in " in flaky


def test_show_prints_the_facts_of_an_error_for_people(
    ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    ground.have("facts.bin")
    model = ground.show("facts.bin")
    held_by = ["qwen (pinned)", "other files (5.0 GB)"]
    error = NoSpace("too little", need=2_000_000, free=-151100800, held_by=held_by, bytes_done=7)
    report = as_document(error_report(error))
    show_model({**model, "pull": {**model["pull"], "state": "failed", "error": report}}, [], 0)
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {key: value.strip() for key, value in shown.items()}
    assert (facts["error need"], facts["error free"]) == ("2.0 MB", "-151.1 MB")
    assert facts["error held_by"] == "qwen (pinned); other files (5.0 GB)"
    assert not {"error bytes_done", "error detail", "error code"} & facts.keys()


def test_who_uses_a_model_has_the_same_words_everywhere(ground: Ground) -> None:
    ground.have("busy.bin")
    with mapped(Path(ground.show("busy.bin")["file"])):
        words = "open in a process on this node"
        assert ground.show("busy.bin")["in_use_by"] == words
        assert words in ground.node.cli("show", "busy.bin").stdout
        assert words in ground.node.cli("capacity").stdout
        refused = ground.node.cli("rm", "busy.bin")
        assert words in refused.stderr
        assert "force it (--force, force=true)" in refused.stderr


def test_a_refused_delete_names_the_flag(ground: Ground) -> None:
    ground.have("kept.bin")
    ground.node.ask("POST", "/v1/models/kept.bin/leases", {"seconds": 600})
    assert "(--force, force=true)" in ground.node.cli("rm", "kept.bin").stderr
    ground.node.ask("PUT", "/v1/models/kept.bin/pin")
    said = ground.node.cli("rm", "kept.bin").stderr
    assert "hint: unpin it (cachd unpin kept.bin), or force it (--force, force=true)" in said


def test_an_unknown_name_is_looked_for_in_the_list(ground: Ground) -> None:
    for word in ("show", "pin", "unpin", "wait", "rm", "verify", "warm", "cancel", "lease", "path"):
        ended = ground.node.cli(word, "nobody")
        assert ended.returncode == 3
        assert "hint: cachd ls lists the models (GET /v1/models)" in ended.stderr, word


def test_a_body_without_its_content_type_is_refused_with_the_reason(ground: Ground) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = ground.node.ask("POST", "/v1/models", b'{"ref": "x/y"}', headers=headers)
    assert_problem(answer, 422, "invalid_request")
    assert "send the header Content-Type: application/json" in answer.document["detail"]
    assert "/openapi.json" in answer.document["hint"]
    answer = ground.node.ask("POST", "/v1/models", [])
    assert "Content-Type" not in answer.document["detail"]


def test_warm_says_how_much_is_in_memory(ground: Ground) -> None:
    ground.have("warm.bin")
    said = ground.node.cli("warm", "warm.bin").stdout
    assert said.startswith("warm.bin: 1.0 MB in memory; "), said


def test_an_allowed_ref_says_why_it_is_allowed(ground: Ground) -> None:
    said = ground.node.cli("sources", "https://example.com/x").stdout.splitlines()[0]
    assert "is allowed: no entry of sources refuses it, and a public address" in said


def test_a_bundle_says_how_many_files_it_has(ground: Ground, tmp_path: Path) -> None:
    ended = ground.node.cli("bundle", str(tmp_path / "b.tar.gz"))
    assert "files: read them before you publish it" in ended.stderr
    assert "options.json" not in ended.stderr


def test_wrong_options_say_where_those_in_force_are(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("streams: many\n")
    command = [*CACHD, "options", "--effective", "--config", str(tmp_path / "wrong.yaml")]
    ended = run(command, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 2
    assert "with --url ADDRESS, see what a running daemon uses" in ended.stderr


def test_a_second_daemon_is_told_what_it_can_do(ground: Ground) -> None:
    command = [*CACHD, "serve", "--no-wait", "--root", str(ground.node.root), "--listen", "127.0.0.1:0"]
    ended = run(command, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 9
    assert "hint: stop that process, or use another root (--root)" in ended.stderr


def test_a_reload_that_changes_nothing_and_one_that_is_refused_have_a_detail(node: Nodes) -> None:
    running = node()
    running.configure(**{**running.options, "limit_bytes": "much"})
    running.wait_for("configuration file not taken over")
    running.configure(**{key: value for key, value in running.options.items() if key != "limit_bytes"})
    running.wait_for("configuration file taken over")
    rows = {
        line.split()[3]: line
        for line in running.cli("events", "-o", "wide").stdout.splitlines()
        if "config" in line
    }
    assert "bad_option; limit_bytes; cachd doctor says why" in rows["config_refused"]
    assert rows["config_in_force"].endswith("no option changed")


def test_corrupt_is_in_the_table_of_symptoms() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"| `{Corrupt.code}` |" in readme
