"""The command line as people and scripts meet it: text, exit codes, signals, and pulls with no daemon."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cachd import __version__, cli, config, errors
from cachd.cli.commands import PANELS
from cachd.cli.exits import EXIT_BY_ERROR, EXIT_CODES
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Seen, Stall, Status
from tests.ground.program import CACHD, Program, run
from tests.ground.site import Ground

MIB = 1 << 20
PATIENCE_SECONDS = 120
CODE = Path(cli.__file__).parent.parent
COMMANDS = sorted(typer.main.get_group(cli.app).commands)
Nodes = Callable[..., Node]
Ended = subprocess.CompletedProcess[str]


# --- asking and waiting ---


def test_pull_returns_at_once_and_prints_where_the_model_will_be(ground: Ground) -> None:
    ref = ground.add("soon.bin")
    hold = ground.origin.hold("/soon.bin", after=MIB)
    ended = ground.node.cli("pull", ref, "--name", "soon.bin")
    assert (ended.returncode, ended.stdout) == (0, f"{ground.node.root}/models/soon.bin\n")
    assert "soon.bin is being pulled\n  watch it: cachd watch soon.bin\n" in ended.stderr
    assert not (ground.node.root / "models/soon.bin").exists()
    hold.release()
    assert ground.node.ready("soon.bin").status == 200


def test_pull_wait_prints_the_path_last_and_draws_nothing_in_a_pipe(ground: Ground) -> None:
    ended = ground.node.cli("pull", ground.add("now.bin"), "--name", "now.bin", "--wait")
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(
        r"now\.bin: 6\.3 MB in 1 file, in \S+ \([\d.]+ [kMG]?B/s\)\n"
        r"  no file is verified, because the source states no digest\n",
        ended.stderr,
    )
    path = Path(ended.stdout.splitlines()[-1])
    assert path == ground.node.root / "models/now.bin/now.bin"
    assert path.read_bytes() == noise(6 * MIB, len("now.bin"))
    again = ground.node.cli("pull", f"{ground.origin.url}/now.bin", "--name", "now.bin", "--wait")
    assert (again.returncode, again.stdout) == (0, ended.stdout)
    assert "here already" in again.stderr
    names = ground.node.cli(
        "pull", f"{ground.origin.url}/now.bin", "--name", "now.bin", "--wait", "-o", "name"
    )
    assert (names.stdout, names.stderr) == ("now.bin\n", "")


def test_wait_ends_when_the_model_is_ready_with_its_path_as_the_last_line(ground: Ground) -> None:
    with ground.held("waited.bin") as hold, started(ground.node, "wait", "waited.bin") as waiting:
        hold.release()
        stdout, stderr = waiting.communicate(timeout=PATIENCE_SECONDS)
    assert (waiting.returncode, stderr) == (0, "")
    assert stdout.splitlines()[-1] == f"{ground.node.root}/models/waited.bin/waited.bin"


def test_what_a_pull_is_told_reaches_the_daemon(ground: Ground) -> None:
    ground.hub.add("org/told", {"config.json": b"{}", "a.bin": noise(1000), "b.bin": noise(1000, 2)})
    patterns = ("--include", "*.json", "--include", "*.bin", "--exclude", "b.*")
    ended = ground.node.cli(
        *("pull", "hf://org/told", "--name", "told", "--pin", "--priority", "7", "--wait", "-o", "json"),
        *patterns,
    )
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document == ground.show("told")
    assert document["pinned"] is True
    assert document["pull"]["priority"] == 7
    assert sorted(os.listdir(document["path"])) == ["a.bin", "config.json"]


def test_a_wait_that_takes_too_long_is_4_and_the_pull_goes_on(ground: Ground) -> None:
    with ground.held("patient.bin"):
        ended = ground.node.cli("wait", "patient.bin", "--timeout", "0.2")
        assert_failed(ended, 4, "wait_timeout")
        assert "of 6.3 MB" in ended.stderr
        assert ground.show("patient.bin")["state"] == "downloading"
    assert ground.node.ready("patient.bin").status == 200


def test_an_interrupted_wait_is_130_and_the_pull_goes_on(ground: Ground) -> None:
    ref = ground.add("interrupted.bin")
    hold = ground.origin.hold("/interrupted.bin", after=MIB)
    with started(ground.node, "pull", ref, "--name", "interrupted.bin", "--wait") as waiting:
        assert hold.reached.wait(PATIENCE_SECONDS)
        waiting.send_signal(signal.SIGINT)
        stdout, stderr = waiting.communicate(timeout=PATIENCE_SECONDS)
    assert (waiting.returncode, stdout) == (130, "")
    known = "the pull goes on\n  watch it: cachd watch interrupted.bin\n"
    assert known in stderr or "the pull may go on\n  see it: cachd ls\n" in stderr, (
        "the daemon was slow to answer"
    )
    assert "Traceback" not in stderr
    hold.release()
    assert ground.node.ready("interrupted.bin").status == 200


def test_a_failed_pull_of_a_name_that_is_ready_is_no_success(ground: Ground) -> None:
    """The name still leads to the old model: a script that goes on would serve the wrong one."""
    ground.have("swap.bin")
    words = ("--name", "swap.bin", "--replace", "--wait")
    ended = ground.node.cli("pull", f"{ground.origin.url}/nothing.bin", *words)
    assert_failed(ended, 3, "file_not_found")
    assert ground.node.ready("swap.bin").document["ref"] == f"{ground.origin.url}/swap.bin"


def test_waiting_for_the_successor_of_a_ready_model_does_not_keep_the_daemon_busy(ground: Ground) -> None:
    ground.have("successor.bin")
    successor = ground.add("successor-2.bin")
    hold = ground.origin.hold("/successor-2.bin", after=MIB)
    before = requests_answered(ground.node)
    words = ("--name", "successor.bin", "--replace", "--wait", "--timeout", "1")
    ended = ground.node.cli("pull", successor, *words)
    assert_failed(ended, 4, "wait_timeout")
    asked = requests_answered(ground.node) - before
    hold.release()
    ground.node.wait_for("pull ended", name="successor.bin", ref=successor)
    assert asked < 20


def test_a_terminal_is_drawn_a_progress_bar(ground: Ground) -> None:
    master, slave = pty.openpty()
    terminal = {"TERM": "xterm-256color", "COLUMNS": "120"}
    with (
        ground.held("bar.bin") as hold,
        started(ground.node, "wait", "bar.bin", stderr=slave, **terminal) as waiting,
    ):
        os.close(slave)
        drawn = read_until(master, b"/6.3 MB")
        hold.release()
        stdout, _ = waiting.communicate(timeout=PATIENCE_SECONDS)
    os.close(master)
    assert b"bar.bin downloading" in drawn
    assert b"\x1b[" in drawn, "it is redrawn in place"
    assert (waiting.returncode, stdout) == (0, f"{ground.node.root}/models/bar.bin/bar.bin\n")


# --- forms of the output ---


def test_ls_shows_one_row_a_model(ground: Ground) -> None:
    ground.have("row.bin")
    ended = ground.node.cli("ls")
    assert (ended.returncode, ended.stderr) == (0, "")
    headings, *rows = ended.stdout.splitlines()
    assert re.split(" {2,}", headings) == [
        *("NAME", "STATE", "SIZE", "PROGRESS", "RATE", "ETA", "USED BY", "REASON")
    ]
    row = next(row for row in rows if row.startswith("row.bin "))
    assert re.split(" {2,}", row) == ["row.bin", "ready", "1.0 MB", "100%", "-", "-", "-"]
    assert len(rows) == len(ground.node.ask("GET", "/v1/models").document["models"])


def test_json_is_what_the_api_says(ground: Ground) -> None:
    ground.have("form.bin")
    listed = json.loads(ground.node.cli("ls", "-o", "json").stdout)
    assert listed == ground.node.ask("GET", "/v1/models").document
    assert json.loads(ground.node.cli("show", "form.bin", "-o", "json").stdout) == ground.show("form.bin")
    waited = json.loads(ground.node.cli("wait", "form.bin", "--output", "json").stdout)
    assert waited["ready"] == ground.node.ready("form.bin").document
    removed = json.loads(ground.node.cli("rm", "form.bin", "-o", "json").stdout)
    assert removed["name"] == "form.bin"
    assert MIB <= removed["freed_bytes"] < MIB + (64 << 10), "blocks of the disk"


def test_output_name_prints_only_the_names(ground: Ground) -> None:
    ref = ground.have("name.bin")
    listed = [model["name"] for model in ground.node.ask("GET", "/v1/models").document["models"]]
    assert ground.node.cli("ls", "-o", "name").stdout.splitlines() == listed
    pulled = ("pull", ref, "--name", "name.bin")
    for words in (pulled, ("wait", "name.bin"), ("show", "name.bin"), ("rm", "name.bin")):
        assert ground.node.cli(*words, "-o", "name").stdout == "name.bin\n", words


def test_show_prints_one_fact_a_line(ground: Ground) -> None:
    ref = ground.have("facts.bin")
    shown, _, files = ground.node.cli("show", "facts.bin").stdout.partition("\n\n")
    lines = shown.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert facts["name"] == "facts.bin"
    assert facts["state"] == "ready"
    assert facts["ref"] == ref
    assert facts["path"] == f"{ground.node.root}/models/facts.bin"
    assert facts["verified"] == "no"
    assert facts["verified_by"] == "none (1)"
    assert [re.split(" {2,}", line) for line in files.splitlines()] == [
        ["FILE", "SIZE", "HERE", "DIGEST"],
        ["facts.bin", "1.0 MB", "yes", "none stated"],
    ]


def test_pin_unpin_and_rm_do_what_they_say(ground: Ground) -> None:
    ground.have("pinned.bin")
    assert ground.node.cli("pin", "pinned.bin").returncode == 0
    assert_failed(ground.node.cli("rm", "pinned.bin"), 9, "pinned")
    assert ground.node.cli("unpin", "pinned.bin").returncode == 0
    ended = ground.node.cli("rm", "pinned.bin")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.fullmatch(r"pinned\.bin: 1\.[01] MB freed\n", ended.stdout)
    assert ground.node.ready("pinned.bin").status == 404


def test_a_name_is_never_taken_for_a_path_of_the_api(ground: Ground) -> None:
    ground.have("slash.bin")
    ground.node.ask("PUT", "/v1/models/slash.bin/pin")
    for words in (("rm", "slash.bin/pin"), ("show", "../../livez"), ("show", ""), ("show", "slash.bin?x")):
        assert_failed(ground.node.cli(*words), 2, "bad_name")
    assert ground.show("slash.bin")["pinned"] is True


def test_options_lists_every_option_of_the_daemon(ground: Ground) -> None:
    listed = json.loads(ground.node.cli("options", "-o", "json").stdout)["options"]
    assert [(o["key"], o["env"], o["default"], o["help"]) for o in listed] == list(config.table())
    assert {o["key"] for o in listed} == set(config.Config.model_fields)
    assert all(o["help"] for o in listed)


def test_version_prints_the_version(ground: Ground) -> None:
    for word in ("version", "--version"):
        assert ground.node.cli(word).stdout == f"{__version__}\n"


def test_every_module_with_commands_is_listed_with_all_of_them() -> None:
    told = {module: names for modules in PANELS.values() for module, names in modules.items()}
    found = {}
    for path in sorted(Path(cli.__file__).parent.glob("*.py")):
        commands = getattr(importlib.import_module(f"cachd.cli.{path.stem}"), "commands", None)
        if path.stem != "__init__" and isinstance(commands, typer.Typer):
            found[path.stem] = set(typer.main.get_group(commands).commands)
    assert {module: set(names) for module, names in told.items()} == found


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    assert f"Example: cachd {command}" in shown.output


def words_of(text: str) -> list[str]:
    """The words of a text as a terminal shows it, without the frames of panels."""
    return re.sub(r"[^\x21-\x7e…]+", " ", text).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_every_word_of_an_argument_and_an_option(command: str) -> None:
    """rich takes a bracket for markup, and swallows it: hf://org/model[@rev]."""
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "3000", "TERM": "dumb"})
    parameters = typer.main.get_group(cli.app).commands[command].params
    for text in [str(getattr(each, "help", None) or "").replace("\\[", "[") for each in parameters]:
        assert " ".join(words_of(text)) in " ".join(words_of(shown.output))
    if command in ("pull", "resolve"):
        assert "hf://org/model[@rev]" in shown.output


def test_the_help_tells_every_command_and_every_exit_code() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "1000", "TERM": "dumb"})
    for command in COMMANDS:
        assert f" {command} " in shown.output
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in shown.output


COLLECTS = """
import atexit, gc, sys
atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 0))
sys.argv[0] = "cachd"
from cachd.cli import main
main()
"""


@pytest.mark.parametrize(
    ("words", "collects"),
    [
        (("version",), "True False"),
        (("options",), "True False"),
        (("path", "m", "--cache", "/nowhere"), "True False"),
        (("wait", "m", "--cache", "/nowhere", "--timeout", "0"), "True False"),
        (("ls", "--server", "http://127.0.0.1:1"), "True False"),
        (("serve", "--listen", "nowhere"), "True True"),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else "",
)
def test_only_serve_starts_without_garbage_collections(words: tuple[str, ...], collects: str) -> None:
    """A collection during the imports of `serve` would delay its start. Other commands end sooner."""
    ended = subprocess.run([sys.executable, "-c", COLLECTS, *words], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == collects, ended.stderr
    disabling = [path.name for path in CODE.rglob("*.py") if "gc.disable()" in path.read_text()]
    assert disabling == ["serve.py"]


def test_a_shell_can_complete_commands(ground: Ground) -> None:
    program = Path(sys.executable).with_name("cachd")
    if not program.exists():
        pytest.skip("cachd is not installed as a program beside this Python")
    asked = {"_CACHD_COMPLETE": "complete_bash", "COMP_WORDS": "cachd p", "COMP_CWORD": "1"}
    ended = subprocess.run([program], env={**os.environ, **asked}, capture_output=True, text=True)
    assert sorted(ended.stdout.split()) == ["path", "pin", "preflight", "pull"]
    if shutil.which("bash"):
        script = f"'{program}' --show-completion; true"
        shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert "_CACHD_COMPLETE=complete_bash" in shown.stdout


# --- exit codes ---

FAILURES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "an unknown scheme": (("pull", "gopher://there/it"), 2, "unknown_scheme"),
    "a name that climbs": (("pull", "hf://org/model", "--name", ".."), 2, "bad_name"),
    "an unknown model": (("show", "nobody"), 3, "no_such_model"),
    "an unknown model to wait for": (("wait", "nobody"), 3, "no_such_model"),
    "an unknown model to remove": (("rm", "nobody"), 3, "no_such_model"),
    "a missing file": (("pull", "{origin}/nothing.bin", "--wait"), 3, "file_not_found"),
    "a missing revision": (("pull", "hf://org/known@absent", "--wait"), 3, "revision_not_found"),
    "a private address": (("pull", "https://10.0.0.1:1/it", "--wait"), 5, "private_address"),
    "a path that is not allowed": (("pull", "file:///etc/shadow", "--wait"), 5, "path_refused"),
    "a private repository": (("pull", "hf://org/private", "--wait"), 5, "source_unauthorized"),
    "no daemon": (("ls", "--server", "http://127.0.0.1:1"), 6, "daemon_unreachable"),
    "an address that is none": (("ls", "--server", "nowhere"), 2, "bad_url"),
    "wrong bytes": (("pull", "{origin}/wrong.bin#sha256=" + 64 * "0", "--wait"), 8, "corrupt"),
    "an origin that fails": (("pull", "{origin}/failing.bin", "--wait"), 10, "origin_failed"),
}


@pytest.mark.parametrize(("words", "status", "code"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_has_its_exit_code_and_is_told_on_standard_error(
    ground: Ground, words: tuple[str, ...], status: int, code: str
) -> None:
    ground.hub.add("org/known", {"config.json": b"{}"})
    ground.hub.add("org/private", {"config.json": b"{}"}, private=True)
    for name in ("wrong.bin", "failing.bin"):
        ground.add(name, MIB)
    ground.origin.fault("/failing.bin", Status(500))
    ended = ground.node.cli(*(word.replace("{origin}", ground.origin.url) for word in words))
    assert_failed(ended, status, code)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("frobnicate",), "No such command"),
        (("pull",), "Missing argument"),
        (("pull", "hf://a/b", "--priority", "101"), "--priority"),
        (("ls", "-o", "xml"), "xml"),
    ],
)
def test_a_wrong_command_line_ends_with_exit_code_2(
    ground: Ground, words: tuple[str, ...], told: str
) -> None:
    ended = ground.node.cli(*words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert told in ended.stderr


def test_authorities_that_cannot_be_read_are_refused_before_the_first_pull(
    origin: Origin, root: Path, tmp_path: Path
) -> None:
    ref = origin.add("/it.bin", noise(MIB))
    for name, content in (("absent.pem", None), ("garbage.pem", b"garbage")):
        path = tmp_path / name
        if content:
            path.write_bytes(content)
        assert_failed(direct(ref, root, CACHD_CA_FILE=str(path)), 2, "bad_option")
    assert origin.requests == []


def test_a_lack_of_space_ends_with_exit_code_7(origin: Origin, root: Path) -> None:
    ref = origin.add("/it.bin", noise(MIB))
    assert_failed(direct(ref, root, CACHD_RESERVE_FREE="100000TiB"), 7, "too_big")


def test_every_error_has_an_exit_code_that_the_help_explains() -> None:
    assert set(EXIT_BY_ERROR.values()) <= set(EXIT_CODES)
    said_by_class = {errors.Unauthorized, errors.UnsafeRoot, errors.Cancelled, errors.DiskFailed}
    said_by_class |= {errors.DaemonDied, errors.CachdError}
    kinds = {k for _, k in inspect.getmembers(errors, inspect.isclass) if issubclass(k, errors.CachdError)}
    assert kinds - set(EXIT_BY_ERROR) <= said_by_class, "a class that says what to do has its own code"


def test_a_write_without_the_token_is_5_and_with_it_is_done(
    node: Nodes, tmp_path: Path, origin: Origin
) -> None:
    token = tmp_path / "token"
    token.write_text("canary-bearer\n")
    running = node(token_file=str(token))
    ref = origin.add("/it.bin", noise(1000))
    named = ("pull", ref, "--name", "it.bin")
    refused = running.cli(*named)
    assert_failed(refused, 5, "unauthorized")
    assert_failed(running.cli(*named, CACHD_TOKEN="wrong"), 5, "unauthorized")
    assert running.cli("ls", "-o", "name").stdout == ""
    assert running.cli(*named, "--wait", "--token-file", str(token)).returncode == 0
    assert running.cli("pin", "it.bin", CACHD_TOKEN_FILE=str(token)).returncode == 0
    assert running.cli("unpin", "it.bin", CACHD_TOKEN="canary-bearer").returncode == 0
    assert_failed(running.cli("rm", "it.bin", "--token-file", str(tmp_path / "nothing")), 2, "bad_secret")
    assert running.ready("it.bin").status == 200


def test_a_token_with_too_low_a_role_is_5_and_told_which_role_is_needed(node: Nodes, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("canary-reader")
    listed = {"tokens": [{"name": "grafana", "role": "read", "token": "canary-reader"}]}
    (tmp_path / "tokens").write_text(yaml.safe_dump(listed))
    running = node(token_file=str(tmp_path / "tokens"), anonymous_reads=False)
    for words in (("ls",), ("capacity",), ("evictions",), ("show", "it"), ("wait", "it"), ("path", "it")):
        assert_failed(running.cli(*words), 5, "unauthorized")
        with_token = running.cli(*words, "--token-file", str(token))
        assert with_token.returncode == (3 if "it" in words else 0), with_token.stderr
        assert with_token.returncode == running.cli(*words, CACHD_TOKEN="canary-reader").returncode
    refused = running.cli("sweep", CACHD_TOKEN_FILE=str(token))
    assert_failed(refused, 5, "role_too_low")
    assert "needs the role admin, and grafana has read" in refused.stderr
    assert_failed(running.cli("options", "--effective", CACHD_TOKEN="canary-reader"), 5, "role_too_low")
    examined = running.cli("doctor", "--token-file", str(token))
    assert "an admin's token" in examined.stdout
    assert "canary" not in refused.stderr + examined.stdout + running.output


# --- with no daemon ---


def test_a_direct_pull_needs_no_daemon(origin: Origin, root: Path) -> None:
    ref = origin.add("/it.bin", noise(6 * MIB))
    ended = direct(ref, root, "--name", "it.bin")
    assert (ended.returncode, ended.stdout) == (0, f"{root}/models/it.bin/it.bin\n")
    assert ended.stderr.startswith("it.bin: 6.3 MB in 1 file, in ")
    assert (root / "models/it.bin/it.bin").read_bytes() == noise(6 * MIB)
    assert json.loads((root / "ready/it.bin.json").read_text())["ref"] == ref
    origin.forget()
    again = direct(ref, root, "--name", "it.bin", "-o", "json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["state"] == "ready"
    assert origin.requests == []


def test_a_direct_pull_logs_as_much_as_it_is_told_to(origin: Origin, root: Path) -> None:
    ended = direct(origin.add("/it.bin", noise(MIB)), root, CACHD_LOG_LEVEL="info")
    assert ended.returncode == 0
    assert '"event": "pull ended"' in ended.stderr


def test_a_direct_pull_fails_as_one_through_a_daemon_does(origin: Origin, root: Path) -> None:
    assert_failed(direct(f"{origin.url}/nothing.bin", root), 3, "file_not_found")
    assert_failed(direct(f"{origin.url}/nothing.bin", root, "--name", "../x"), 2, "bad_name")
    assert_failed(direct("hf://a/" + "b" * 3000, root), 2, "bad_ref")
    assert_failed(direct(f"{origin.url}/nothing.bin", root / "nowhere"), 2, "bad_root")


def test_a_direct_pull_into_the_root_of_a_daemon_is_refused(ground: Ground) -> None:
    ended = direct(ground.add("locked.bin"), ground.node.root)
    assert_failed(ended, 9, "root_locked")
    assert f"pid {ground.node.pid}" in ended.stderr
    assert ground.node.ready("locked.bin").status == 404


def test_a_killed_direct_pull_fetches_again_only_what_its_journal_lacks(
    origin: Origin, root: Path, tmp_path: Path
) -> None:
    ref = origin.add("/big.bin", noise(64 * MIB))
    options = tmp_path / "options.yaml"
    options.write_text(yaml.safe_dump({"streams": 1, "allow": ["127.0.0.0/8"], "reserve_free": 0}))
    second_part = threading.Event()

    def is_beyond_the_first_part(seen: Seen) -> bool:
        if seen.extent is None or seen.extent[0] == 0:
            return False
        second_part.set()  # one stream: it has made the first part durable
        return True

    origin.fault("/big.bin", Stall(at=MIB), when=is_beyond_the_first_part)
    command = [*CACHD, "pull", ref, "--name", "big.bin", "--direct", "--root", str(root)]
    command += ["--config", str(options)]
    with Program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as killed:
        assert second_part.wait(PATIENCE_SECONDS)
        killed.kill()
    journal = next((root / ".cachd/ingest").glob("*/journal")).read_text().splitlines()
    kept = [(int(start), int(stop)) for start, stop, _ in (line.split() for line in journal)]
    assert [start for start, _ in kept] == [0]
    assert list((root / "ready").iterdir()) == []
    origin.clear()
    origin.forget()
    ended = direct(ref, root, "--config", str(options), "--name", "big.bin")
    assert ended.returncode == 0, ended.stderr
    asked = [seen.extent for seen in origin.requests if seen.extent]
    began = min(start for start, _ in asked)
    assert kept[0][1] <= began <= kept[0][1] + MIB, "what came before the kill may be here, too"
    assert origin.bytes_sent() == 64 * MIB - began
    assert (root / "models/big.bin/big.bin").read_bytes() == noise(64 * MIB)


def test_a_direct_pull_that_takes_too_long_is_4_and_goes_on_when_run_again(
    origin: Origin, root: Path
) -> None:
    ref = origin.add("/slow.bin", noise(6 * MIB))
    hold = origin.hold("/slow.bin", after=3 * MIB)  # in the first part of 4 MiB, not in the second of 2
    for seconds in (1, 5, 25, 125):
        ended = direct(ref, root, "--timeout", str(seconds))
        assert_failed(ended, 4, "wait_timeout")
        assert "run it again" in ended.stderr
        assert list((root / "ready").iterdir()) == []
        if origin.bytes_sent() >= 5 * MIB:  # else this machine is slow, and it had received less
            break
    hold.release()
    origin.forget()
    assert direct(ref, root).returncode == 0
    assert origin.bytes_sent() == MIB


def test_an_interrupted_direct_pull_is_130_and_publishes_nothing(origin: Origin, root: Path) -> None:
    ref = origin.add("/it.bin", noise(6 * MIB))
    hold = origin.hold("/it.bin", after=MIB)
    command = [*CACHD, "pull", ref, "--direct", "--root", str(root), "--allow", "127.0.0.0/8"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Program(command, env={**os.environ, "CACHD_RESERVE_FREE": "0"}, **pipes) as running:
        assert hold.reached.wait(PATIENCE_SECONDS)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=PATIENCE_SECONDS)
    assert (running.returncode, stdout) == (130, "")
    assert stderr.endswith("interrupted; run it again: it resumes where it stopped\n")
    assert "Traceback" not in stderr
    assert sorted(os.listdir(root / "models")) == [".holds", ".trees"]
    assert list((root / "ready").iterdir()) == list((root / "models/.trees").iterdir()) == []
    hold.release()
    assert direct(ref, root).returncode == 0, "the root was given back"


# --- small things of the tests ---


def direct(ref: str, root: Path, *options: str, **env: str) -> Ended:
    """One pull with no daemon."""
    command = [*CACHD, "pull", ref, "--direct", "--root", str(root), "--allow", "127.0.0.0/8", *options]
    told = {**os.environ, "CACHD_RESERVE_FREE": "0", "CACHD_LOG_LEVEL": "error", **env}
    return run(command, env=told, timeout=2 * PATIENCE_SECONDS)


def started(node: Node, *words: str, stderr: int = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
    """A command that runs against the node."""
    told = {**os.environ, "CACHD_SERVER": node.url, **env}
    return Program([*CACHD, *words], env=told, stdout=subprocess.PIPE, stderr=stderr)


def assert_failed(ended: Ended, status: int, code: str) -> None:
    """The command ended with this exit code and told the error, with its code, on standard error alone."""
    assert (ended.returncode, ended.stdout) == (status, ""), ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.splitlines()[-1] == f"  code: {code}"
    assert "Traceback" not in ended.stderr


def requests_answered(node: Node) -> float:
    return node.metric("cachd_requests_total")


def read_until(terminal: int, text: bytes) -> bytes:
    """What a terminal shows up to `text`."""
    shown = b""
    while text not in shown:
        shown += os.read(terminal, 4096)
    return shown
