"""The commands about models as people and scripts meet them: lists, several names, watching, resolving."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from cachd.errors import Corrupt, NotFound, error_of
from cachd.terminal.amounts import duration_text, rate_text, size_text
from cachd.terminal.models import HEADINGS, WIDE_HEADINGS
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Status
from tests.ground.program import CACHD, Program, run
from tests.ground.site import MIB, PATIENCE_SECONDS, Ground, names, until

CODE = Path(__file__).parent.parent / "cachd"
Alone = Callable[..., Ground]


def rows(table: str) -> list[list[str]]:
    """The cells of a table, with its headings."""
    return [re.split(" {2,}", line) for line in table.splitlines()]


def row_of(table: str, name: str) -> dict[str, str]:
    headings, *found = rows(table)
    cells = next(row for row in found if row[0] == name)
    return dict(zip(headings, [*cells, *[""] * (len(headings) - len(cells))], strict=True))


@contextmanager
def started(node: Node, *words: str, **how: object) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "CACHD_SERVER": node.url, "COLUMNS": "200", "TERM": "xterm-256color"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    with Program([*CACHD, *words], env=env, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def comes(process: subprocess.Popen[str], beginning: str | tuple[str, ...]) -> bool:
    """Whether the process prints a line that begins so."""
    assert process.stdout is not None
    return any(line.startswith(beginning) for line in iter(process.stdout.readline, ""))


def until_shown(descriptor: int, text: bytes) -> bytes:
    """What a terminal shows up to `text`."""
    shown = b""
    while text not in shown:
        shown += os.read(descriptor, 4096)
    return shown


# --- ls ---


def test_ls_shows_the_progress_the_rate_and_the_end_of_a_pull(ground: Ground) -> None:
    with ground.held("moving.bin"):
        row = row_of(ground.node.cli("ls").stdout, "moving.bin")
        assert (row["STATE"], row["SIZE"]) == ("downloading", "6.3 MB")
        assert 0 < int(row["PROGRESS"].removesuffix("%")) < 100


def test_ls_shows_the_rate_and_the_end_of_a_pull_that_moves(ground: Ground) -> None:
    ref = ground.add("steady.bin", 40 * MIB)
    ground.origin.rate = 1_000_000
    try:
        ground.node.pull(ref)

        def moving() -> dict[str, str] | None:
            row = row_of(ground.node.cli("ls").stdout, "steady.bin")
            return row if row["RATE"] not in ("-", "") else None

        row = until(moving)
        assert re.fullmatch(r"[\d.]+ [kM]B/s", row["RATE"])
        assert re.fullmatch(r"[\d.]+s|\d+m\d\ds", row["ETA"])
    finally:
        ground.origin.rate = None
        ground.node.ask("DELETE", "/v1/models/steady.bin?force=true")


def test_ls_says_why_a_model_failed_and_why_one_waits(alone: Alone) -> None:
    ground = alone(pulls=1)
    ground.node.pull(f"{ground.origin.url}/nothing.bin")
    ground.node.wait_for("pull ended", name="nothing.bin")
    ground.hub.add("org/flaky", {"config.json": b"{}"})
    ground.hub.status(503, times=None)
    ground.node.pull("hf://org/flaky")
    ground.node.wait_for("resolve will be retried", name="org--flaky")
    with ground.held("held.bin"):
        ground.node.pull(ground.add("queued.bin"))
        table = ground.node.cli("ls").stdout
    assert row_of(table, "nothing.bin")["STATE"] == "failed"
    assert "404 Not Found (file_not_found)" in table
    assert "its source failed, and is asked again" in table
    assert "503" in table
    assert row_of(table, "queued.bin")["STATE"] == "queued"
    assert "other pulls run, and it waits for its turn" in table


def test_a_reason_is_red_on_a_terminal(ground: Ground) -> None:
    ground.node.pull(f"{ground.origin.url}/red.bin")
    ground.node.wait_for("pull ended", name="red.bin")
    master, slave = pty.openpty()
    with started(ground.node, "ls", stdout=slave):
        os.close(slave)
        shown = until_shown(master, b"file_not_found")
    os.close(master)
    assert re.search(rb"\x1b\[31m[^\x1b]*404 Not Found", shown)
    assert re.search(rb"\x1b\[31mfailed", shown)


def test_ls_says_who_uses_a_model(ground: Ground) -> None:
    ground.have("used.bin")
    assert row_of(ground.node.cli("ls").stdout, "used.bin")["USED BY"] == "-"
    ground.node.ask("PUT", "/v1/models/used.bin/pin")
    ground.node.ask("POST", "/v1/models/used.bin/leases", {"seconds": 600, "holder": "pod/vllm-0"})
    assert row_of(ground.node.cli("ls").stdout, "used.bin")["USED BY"] == "pod/vllm-0, a pin"


def test_no_name_is_truncated_in_a_pipe(ground: Ground) -> None:
    name, ref = "n" * 96, ground.add("/".join(["f" * 200] * 3), 1000)
    ground.node.pull(ref, name=name)
    assert ground.node.ready(name).status == 200
    shown = ground.node.cli("ls", "-o", "wide", COLUMNS="20").stdout
    assert row_of(shown, name)["REF"] == ref
    assert all(line == line.rstrip() for line in shown.splitlines())


def test_ls_has_a_wide_form_and_a_yaml_form(ground: Ground) -> None:
    ground.have("forms.bin")
    headings, *_ = rows(ground.node.cli("ls", "-o", "wide").stdout)
    assert headings == list(WIDE_HEADINGS)
    assert row_of(ground.node.cli("ls", "-o", "wide").stdout, "forms.bin")["VERIFIED"] == "no"
    found = yaml.safe_load(ground.node.cli("ls", "-o", "yaml").stdout)
    assert found == ground.node.ask("GET", "/v1/models").document
    one = yaml.safe_load(ground.node.cli("show", "forms.bin", "-o", "yaml").stdout)
    assert one == ground.show("forms.bin")


def test_ls_watch_prints_each_change_until_ctrl_c(ground: Ground) -> None:
    with started(ground.node, "ls", "-w") as watching:
        with ground.held("watched.bin"):
            assert comes(watching, ("watched.bin  downloading", "watched.bin  waiting"))
        assert comes(watching, "watched.bin  ready")
        ground.node.ask("DELETE", "/v1/models/watched.bin")
        assert comes(watching, "watched.bin  deleted")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_SECONDS) == 130
        assert "Traceback" not in (watching.stderr.read() if watching.stderr else "")


def test_ls_watch_redraws_its_table_on_a_terminal(ground: Ground) -> None:
    ground.have("before.bin")
    master, slave = pty.openpty()
    with started(ground.node, "ls", "-w", stdout=slave) as watching:
        os.close(slave)
        first = until_shown(master, b"before.bin")
        assert HEADINGS[0].encode() in first
        ground.have("after.bin")
        until_shown(master, b"after.bin")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_SECONDS) == 130
    os.close(master)


# --- several names ---


def test_what_fails_for_one_name_is_still_done_for_the_others(ground: Ground) -> None:
    for name in ("one.bin", "two.bin"):
        ground.have(name)
    ended = ground.node.cli("pin", "one.bin", "nobody", "two.bin")
    assert (ended.returncode, ended.stdout) == (3, "one.bin: pinned\ntwo.bin: pinned\n")
    assert ended.stderr.splitlines()[-1] == "  code: no_such_model"
    assert ground.node.cli("unpin", "one.bin", "two.bin").returncode == 0
    waited = ground.node.cli("wait", "two.bin", "one.bin")
    paths = [f"{ground.node.root}/models/{name}/{name}" for name in ("two.bin", "one.bin")]
    assert waited.stdout.splitlines() == paths
    shown = json.loads(ground.node.cli("show", "one.bin", "two.bin", "-o", "json").stdout)
    assert [model["name"] for model in shown["models"]] == ["one.bin", "two.bin"]
    verified = json.loads(ground.node.cli("verify", "one.bin", "two.bin", "-o", "json").stdout)
    assert [each["name"] for each in verified["models"]] == ["one.bin", "two.bin"]
    removed = ground.node.cli("rm", "one.bin", "nobody", "two.bin", "-o", "json")
    assert removed.returncode == 3
    assert [each["name"] for each in json.loads(removed.stdout)["models"]] == ["one.bin", "two.bin"]
    assert json.loads(removed.stderr)["code"] == "no_such_model"
    assert not {"one.bin", "two.bin"} & set(names(ground))


def test_a_wait_for_several_models_ends_with_the_first_failure_when_all_have_ended(ground: Ground) -> None:
    ground.have("well.bin")
    ground.node.pull(f"{ground.origin.url}/ill.bin")
    ended = ground.node.cli("wait", "ill.bin", "well.bin")
    assert (ended.returncode, ended.stdout) == (3, f"{ground.node.root}/models/well.bin/well.bin\n")
    assert "code: file_not_found" in ended.stderr


def test_several_models_are_waited_for_in_the_mount(ground: Ground) -> None:
    for name in ("mount-1.bin", "mount-2.bin"):
        ground.have(name)
    cache = ("--cache", str(ground.node.root))
    ended = ground.node.cli("wait", "mount-2.bin", "mount-1.bin", *cache)
    paths = [f"{ground.node.root}/models/{name}/{name}" for name in ("mount-2.bin", "mount-1.bin")]
    assert (ended.returncode, ended.stdout.splitlines()) == (0, paths)
    late = ground.node.cli("wait", "mount-1.bin", "absent.bin", *cache, "--timeout", "0.1")
    assert (late.returncode, late.stdout) == (11, "")


# --- show ---


def test_show_lists_a_few_files_and_all_of_them_when_asked(ground: Ground) -> None:
    ground.hub.add("org/many", {f"part-{number:02}.bin": noise(100, number) for number in range(25)})
    ground.node.pull("hf://org/many")
    assert ground.node.ready("org--many").status == 200
    shown = ground.node.cli("show", "org--many").stdout
    assert shown.count("part-") == 20
    assert shown.endswith("and 5 more files; cachd show org--many --files shows all\n")
    assert ground.node.cli("show", "org--many", "--files").stdout.count("sha256:") == 25
    document = json.loads(ground.node.cli("show", "org--many", "--files", "-o", "json").stdout)
    listed = ground.node.ask("GET", "/v1/models/org--many/files").document
    assert (document["files"], document["file_count"]) == (listed["files"], 25)


def test_show_says_how_fast_a_pull_was_in_the_last_seconds(ground: Ground) -> None:
    with ground.held("rate.bin"):
        shown = ground.node.cli("show", "rate.bin").stdout
        assert re.search(r"\nrate +[\d.]+ (bytes|[kMG]?B)/s in the last seconds", shown)
        assert re.search(r"\nverified +-\n", shown), "it says nothing before every byte is here"


# --- pull, watch, cancel ---


def test_pull_takes_names_of_files_as_hf_download_does(ground: Ground) -> None:
    files = {"config.json": b"{}", "a.safetensors": noise(100), "b.safetensors": noise(100, 2), "c.bin": b"c"}
    ground.hub.add("org/files", files)
    words = ("pull", "org/files", "config.json", "*.safetensors", "--exclude", "b.*", "--name", "files")
    assert ground.node.cli(*words, "--wait").returncode == 0
    assert sorted(os.listdir(ground.node.root / "models/files")) == ["a.safetensors", "config.json"]


def test_watch_ends_when_all_pulls_have_ended_with_the_code_of_a_failure(ground: Ground) -> None:
    ground.node.pull(f"{ground.origin.url}/broken.bin")
    with ground.held("good.bin") as hold, started(ground.node, "watch", "good.bin", "broken.bin") as watching:
        assert comes(watching, "good.bin  downloading")
        hold.release()
        stdout, stderr = watching.communicate(timeout=PATIENCE_SECONDS)
    assert watching.returncode == 3
    assert "good.bin  ready  100% of 6.3 MB\n" in stdout
    assert "code: file_not_found" in stderr


def test_watch_without_names_watches_what_is_being_pulled(ground: Ground) -> None:
    ground.have("done.bin")
    with ground.held("running.bin") as hold, started(ground.node, "watch", "-o", "name") as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == "running.bin\n"
        hold.release()
        stdout, _ = watching.communicate(timeout=PATIENCE_SECONDS)
    assert (watching.returncode, set(stdout.split())) == (0, {"running.bin"})
    idle = ground.node.cli("watch")
    assert (idle.returncode, idle.stdout, idle.stderr) == (0, "", "nothing is being pulled\n")


def test_watch_draws_a_bar_for_each_pull_on_a_terminal_up_to_its_end(ground: Ground) -> None:
    master, slave = pty.openpty()
    with ground.held("bar.bin") as hold, started(ground.node, "watch", "bar.bin", stderr=slave):
        os.close(slave)
        until_shown(master, b"/6.3 MB")
        hold.release()
        until_shown(master, b"6.3/6.3 MB")
    os.close(master)


def test_a_long_reason_takes_neither_a_name_nor_a_figure_from_a_bar() -> None:
    master, slave = pty.openpty()
    script = """
from cachd.terminal.models import Status
from cachd.terminal.progress import progress_bars
with progress_bars() as update:
    update(Status("the-name-of-a-model", "waiting", 1_000_000, 9_000_000, reason="x" * 500 + "the end"))
"""
    env = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color"}
    with subprocess.Popen([sys.executable, "-c", script], env=env, stderr=slave) as drawing:
        os.close(slave)
        shown = until_shown(master, b"xxx")
        drawing.wait(PATIENCE_SECONDS)
    os.close(master)
    assert b"the-name-of-a-model waiting" in shown
    assert b"1.0/9.0 MB" in shown
    assert b"the end" not in shown


def test_cancel_ends_a_pull_and_says_what_is_here(ground: Ground) -> None:
    with ground.held("ended.bin"):
        ended = ground.node.cli("cancel", "ended.bin")
    assert ended.returncode == 0
    assert re.fullmatch(
        r"ended\.bin: cancelled; it is cancelled, and [\d.]+ MB of 6\.3 MB is here\n", ended.stdout
    )
    again = ground.node.cli("cancel", "ended.bin", "-o", "json")
    assert (again.returncode, json.loads(again.stderr)["code"]) == (3, "no_pull")


def test_an_interrupted_watch_says_that_the_pulls_go_on(ground: Ground) -> None:
    with ground.held("goes-on.bin"), started(ground.node, "watch", "goes-on.bin") as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, stderr = watching.communicate(timeout=PATIENCE_SECONDS)
    assert (watching.returncode, stderr) == (130, "the pulls go on; cachd cancel NAME ends one\n")
    assert ground.node.ready("goes-on.bin").status == 200


# --- lease ---


def test_a_lease_is_taken_renewed_and_released(ground: Ground) -> None:
    ground.have("leased.bin")
    taken = ground.node.cli("lease", "leased.bin", "--seconds", "10m", "--holder", "job/x")
    assert taken.returncode == 0, taken.stderr
    lease = taken.stdout.splitlines()[-1]
    assert [each["holder"] for each in ground.show("leased.bin")["leases"]] == ["job/x"]
    assert ground.node.cli("rm", "leased.bin").returncode == 9
    renewed = json.loads(ground.node.cli("lease", "leased.bin", "--renew", lease, "-o", "json").stdout)
    assert renewed["id"] == lease
    for wrong in ("..", "../..", "a/b"):
        assert ground.node.cli("lease", "leased.bin", "--release", wrong).returncode == 2
    assert ground.node.cli("lease", "leased.bin", "--release", lease).stdout == "leased.bin: released\n"
    assert ground.show("leased.bin")["leases"] == []
    assert ground.node.cli("lease", "leased.bin", "--renew", lease).returncode == 3


# --- resolve ---


def test_resolve_shows_files_and_what_would_be_fetched_and_evicted(alone: Alone) -> None:
    ground = alone(limit_bytes="20MiB")
    ground.have("old.bin", 12 * MIB)
    ground.hub.add("org/new", {"model.safetensors": noise(10 * MIB), "config.json": b"{}", "README.md": b"x"})
    ended = ground.node.cli("resolve", "org/new", "*.safetensors", "config.json")
    assert ended.returncode == 0, ended.stderr
    assert rows(ended.stdout)[2][:3] == ["model.safetensors", "10.5 MB", "no"]
    assert "sha256:" in ended.stdout
    assert re.search(r"\nto fetch +10\.5 MB\n", ended.stdout)
    assert re.search(r"\ndigests +for 2 of 2 files \(git-sha1: 1, sha256: 1\)\n", ended.stdout)
    assert re.search(r"a pull would evict:\nNAME +FREES +WHY\nold\.bin ", ended.stdout)
    assert names(ground) == ["old.bin"]
    document = json.loads(ground.node.cli("resolve", "org/new", "-o", "json").stdout)
    answer = ground.node.ask("POST", "/v1/resolve", {"ref": "org/new"}).document
    plan = document.pop("space"), answer.pop("space")  # it says how long ago a model was used
    assert document == answer
    assert plan[0].keys() == plan[1].keys()
    failed = ground.node.cli("resolve", f"{ground.origin.url}/nothing.bin")
    assert (failed.returncode, failed.stdout) == (3, "")


def test_resolve_needs_neither_a_daemon_nor_a_cache(origin: Origin, tmp_path: Path) -> None:
    ref = origin.add("/it.bin", noise(MIB))
    env = {**os.environ, "CACHD_ROOT": str(tmp_path / "absent"), "CACHD_LOG_LEVEL": "error"}
    words = [*CACHD, "resolve", ref, "--direct", "--allow", "127.0.0.0/8"]
    ended = run([*words, "-o", "json"], env=env, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [(file["path"], file["bytes"]) for file in found["files"]] == [("it.bin", MIB)]
    assert (found["fetch_bytes"], found["space"]) == (MIB, None)
    assert run(words, env=env, timeout=PATIENCE_SECONDS).returncode == 0
    origin.fault("/it.bin", Status(404), methods=("GET", "HEAD"))
    assert run(words, env=env, timeout=PATIENCE_SECONDS).returncode == 3


# --- forms ---


def test_errors_are_json_where_json_was_asked_for(ground: Ground) -> None:
    for words, code, status in (
        (("show", "nobody", "-o", "json"), "no_such_model", 3),
        (("ls", "--server", "http://127.0.0.1:1", "--output=json"), "daemon_unreachable", 6),
        (("pull", "-o", "json"), "usage", 2),
        (("ls", "-ojson", "--nonsense"), "usage", 2),
    ):
        ended = ground.node.cli(*words)
        error = json.loads(ended.stderr)
        assert (ended.stdout, error["code"], error["exit_code"]) == ("", code, status), words
        assert ended.returncode == status
        assert error["detail"]


def test_an_error_keeps_its_facts_on_its_way_through_the_command_line() -> None:
    error = Corrupt("it is wrong", file="a.bin", expected="sha256:1", got="sha256:2", origin_status=200)
    assert error_of(error.as_document()).as_document() == error.as_document()
    strange = {**NotFound("x").as_document(), "detail": 7, "origin_status": "many", "hint": None}
    assert error_of(strange).detail == "7"


def test_sizes_are_spelled_in_one_place() -> None:
    """The columns of rich's bars would write 3.1/6.3 MB."""
    assert (size_text(6 * MIB), rate_text(1_500_000)) == ("6.3 MB", "1.5 MB/s")
    others = [
        path.relative_to(CODE).as_posix()
        for part in ("cli", "terminal")
        for path in (CODE / part).glob("*.py")
        if re.search(r"DownloadColumn|TransferSpeedColumn|FileSizeColumn|1024", path.read_text())
    ]
    assert others == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.6, "1m00s"), (3600, "1h00m"), (90_000, "1d01h")],
)
def test_a_duration_is_shown_in_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
