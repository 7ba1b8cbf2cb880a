"""The main job, live: pull a real model, kill the daemon half-way, resume, load it as a pod does.

Everything runs on this machine: a Hub server with a CDN behind it stands in for the internet, at the pace
of a fair one. The commands are those a user types; what is printed was measured in this run.

    KEEP=1   leave the daemon running, and say what to try next
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cachd.cli.exits import exit_code
from cachd.errors import Busy
from cachd.kernel import durable
from cachd.policy.parts import unkept_bytes
from tests.ground import pod
from tests.ground.hub import LFS_SUFFIXES, Hub
from tests.ground.models import digests, minilm

REPO = "sentence-transformers/all-MiniLM-L6-v2"
NAME = REPO.replace("/", "--")
STREAMS = 4
BYTES_PER_SECOND = 8_000_000
PROJECT = Path(__file__).parent.parent
PLACE = PROJECT / ".demo"
PORT = 8470
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.05
TAIL = 2000

console = Console(highlight=False, width=int(os.environ.get("COLUMNS", "120")))


class Failed(Exception):
    """A step of the demonstration did not end as it should. The message says which, and why."""


class Daemon:
    """`cachd serve` in a session of its own, its log in a file: it can outlive this process."""

    def __init__(self, place: Path, **options: object) -> None:
        self.root, self.config, self.log = place / "cache", place / "cachd.yaml", place / "cachd.log"
        self.root.mkdir(mode=0o755)
        self.url, self._options, self._logged = "", options, 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the daemon that runs."""
        assert self._process
        return self._process.pid

    def start(self, port: int | None = None) -> None:
        """Start it and wait until it answers. Raises Failed with the end of its log.

        `port`: where it listens, unless somebody else does; default: `free_port`.
        """
        words = ("serve", "--root", shown(self.root), "--config", shown(self.config))
        show_command("cachd", *words, "&")
        self._listen_at(free_port() if port is None else port, words)
        self._wait_until_it_listens()
        if self._process and self._process.poll() == exit_code(Busy("the port is taken")):
            self._listen_at(0, words)
            self._wait_until_it_listens()
        wait_for(self._answers, "the daemon to answer")
        say("daemon", f"pid {self.pid} on {self.url}; log in {shown(self.log)}")

    def _listen_at(self, port: int, words: Sequence[str]) -> None:
        self.config.write_text(yaml.safe_dump({**self._options, "listen": f"127.0.0.1:{port}"}))
        self._logged = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log, uninterrupted():
            command = [sys.executable, "-m", "cachd", *words]
            self._process = subprocess.Popen(
                command, cwd=PROJECT, stdout=log, stderr=log, start_new_session=True
            )

    def _wait_until_it_listens(self) -> None:
        """Or until it has ended."""
        assert self._process
        process = self._process
        wait_for(lambda: self._port() or process.poll() is not None, "the daemon to listen")
        self.url = f"http://127.0.0.1:{self._port()}"

    def _port(self) -> int | None:
        """Where it says that it listens, since it was started last."""
        said = self.log.read_bytes()[self._logged :].decode(errors="replace")
        found = re.search(r'"port": (\d+), .*"event": "listening"', said)
        return int(found[1]) if found else None

    def kill(self) -> None:
        """By SIGKILL."""
        assert self._process
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill it if it runs."""
        if self._process and self._process.poll() is None:
            self.kill()

    def moved(self) -> dict[str, int]:
        """Bytes in all, done, fetched and resumed, as the API tells them."""
        document = json.loads(urllib.request.urlopen(f"{self.url}/v1/models/{NAME}", timeout=10).read())
        moved: dict[str, int] = document["pull"]["bytes"]
        return moved

    def _answers(self) -> bool:
        assert self._process
        if self._process.poll() is not None:
            raise Failed(f"cachd serve ended with {self._process.returncode}:\n{tail(self.log)}")
        try:
            urllib.request.urlopen(f"{self.url}/readyz", timeout=5).close()
        except OSError:
            return False
        return True


def main() -> None:
    """Run the demonstration; any step that fails ends it with an error."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        demonstrate(keep=os.environ.get("KEEP", "") not in ("", "0"))
    except KeyboardInterrupt:
        sys.exit(130)
    except (Failed, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"make demo failed: {error}")


def demonstrate(*, keep: bool) -> None:
    """All steps in turn."""
    began = time.monotonic()
    stop_what_was_kept()
    durable.remove_tree(PLACE)  # published directories are read-only, for their owner, too
    PLACE.mkdir()
    model = minilm()
    expected = digests(model)
    with Hub() as hub:
        commit = hub.add(REPO, {path: model / path for path in expected})
        hub.cdn.rate = BYTES_PER_SECOND
        say(
            "origin",
            f"a Hub at {hub.url} serves {REPO} ({len(expected)} files,"
            f" {decimal(sum((model / p).stat().st_size for p in expected))}),"
            f" {decimal(BYTES_PER_SECOND)}/s a connection",
        )
        daemon = Daemon(PLACE, hf_endpoint=hub.url, allow=["127.0.0.0/8"], streams=STREAMS, reserve_free=0)
        try:
            daemon.start()
            pull_and_kill(daemon)
            resume(daemon, hub)
            verify(daemon, expected)
            load(daemon.root, model, commit)
            second_pull(daemon, hub)
            cachd(daemon, "ls")
            say("done", f"{time.monotonic() - began:.1f} s in all")
            if keep:
                leave_running(daemon)
            else:
                daemon.close()
        except BaseException:
            daemon.close()
            raise


def pull_and_kill(daemon: Daemon) -> None:
    """Pull by several streams, and kill -9 in mid-air."""
    cachd(daemon, "pull", f"hf://{REPO}")
    moved = watch(daemon, "pulling", lambda moved: moved["done"] > 0.55 * moved["total"] > 0)
    show_command("kill", "-9", str(daemon.pid))
    daemon.kill()
    say("killed", f"at {decimal(moved['done'])} of {decimal(moved['total'])}")


def resume(daemon: Daemon, hub: Hub) -> None:
    """Start the daemon again: it goes on by itself. What the kill cost, as the origin counted it."""
    daemon.start()
    watch(daemon, "resuming", lambda moved: moved["done"] == moved["total"] > 0)
    cachd(daemon, "wait", NAME)
    moved = daemon.moved()
    large = [path for path in minilm().rglob("*") if path.suffix in LFS_SUFFIXES]
    twice = hub.cdn.bytes_sent() - sum(path.stat().st_size for path in large)
    say(
        "resumed",
        f"{decimal(moved['resumed'])} were on disk, hashed again and believed;"
        f" {decimal(moved['fetched'])} fetched",
    )
    say(
        "cost",
        f"{decimal(max(twice, 0))} were sent twice: at the kill they were on their way, or received and not"
        f" yet recorded on disk, as is done after every {decimal(unkept_bytes(STREAMS))} of a stream",
    )


def verify(daemon: Daemon, expected: dict[str, str]) -> None:
    """Hash what was published, in both views, with a second implementation."""
    ready = json.loads((daemon.root / "ready" / f"{NAME}.json").read_bytes())
    hub_view = daemon.root / "hub" / f"models--{NAME}" / "snapshots" / ready["hub"]["commit"]
    for view in (daemon.root / "models" / NAME, hub_view):
        if digests(view) != expected:
            raise Failed(f"{view} holds other bytes than the origin")
    links = (hub_view / "model.safetensors").stat().st_nlink
    say("digests", f"{len(expected)} files right in both views; one copy on disk, {links} links")
    say("", f"model.safetensors sha256:{expected['model.safetensors']}")


def load(root: Path, model: Path, commit: str) -> None:
    """Load it as a pod: read-only mount, another user, offline; from the directory and by repository id."""
    wanted = pod.read_model(str(model))
    if not pod.available():
        found = pod.read_model(str(root / "models" / NAME))
        say("loaded", "in this process: the machine permits no mount namespace (unshare -m)")
    else:
        ways = {
            "directory": (pod.LOAD_DIRECTORY, {"MODEL_DIR": f"models/{NAME}"}),
            "repository": (pod.LOAD_HUB, {"REPO": REPO}),
        }
        for way, (script, env) in ways.items():
            ended = pod.run_in_pod(root, script, env=env)
            if ended.returncode:
                raise Failed(f"the pod failed:\n{ended.stderr}")
            found = json.loads(ended.stdout.splitlines()[-1])
            say(
                "loaded",
                f"by {way}, read-only, offline: {found['tensors']} tensors, {decimal(found['bytes'])},"
                f" tokens {found['tokens'][:6]}",
            )
    if found["digest"] != wanted["digest"]:
        raise Failed("the pod read other tensors than the origin holds")
    say("", f"commit {commit}")


def second_pull(daemon: Daemon, hub: Hub) -> None:
    """What every replica after the first one costs."""
    before = len(hub.requests) + len(hub.cdn.requests)
    began = time.monotonic()
    cachd(daemon, "pull", f"hf://{REPO}", "--wait")
    seconds = time.monotonic() - began
    asked = len(hub.requests) + len(hub.cdn.requests) - before
    say("again", f"ready in {seconds:.1f} s with the start of the command, {asked} requests to the origin")


def leave_running(daemon: Daemon) -> None:
    """Say what can be done with the daemon that stays."""
    (PLACE / "pid").write_text(str(daemon.pid))
    command = shlex.quote(shown(Path(sys.executable).with_name("cachd")))
    command = command if daemon.url.endswith(f":{PORT}") else f"CACHD_SERVER={daemon.url} {command}"
    note(f"the daemon runs on, pid {daemon.pid}; try next:")
    for words in (f"show {NAME}", f"verify {NAME}", "capacity"):
        show_command(command, *words.split())
    note(f"stop it with: kill {daemon.pid}; what it holds is in {shown(PLACE)}")


def stop_what_was_kept() -> None:
    """End the daemon that an earlier demonstration left, if it still is that one."""
    try:
        pid = int((PLACE / "pid").read_text())
        process = Path(f"/proc/{pid}")
        is_ours = (process / "cwd").samefile(PROJECT) and b"cachd.yaml" in (process / "cmdline").read_bytes()
    except (OSError, ValueError):
        return
    if is_ours:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: has_ended(process), f"pid {pid} to end, which an earlier demonstration left")
        note(f"stopped pid {pid}, which an earlier demonstration left")


def has_ended(process: Path) -> bool:
    """Whether nothing runs there, reaped or not."""
    try:
        return not (process / "cmdline").read_bytes()
    except OSError:
        return True


def cachd(daemon: Daemon, *words: str) -> None:
    """Run a command as a user would and show what it prints. Raises Failed."""
    show_command("cachd", *words)
    ended = subprocess.run(
        [sys.executable, "-m", "cachd", *words],
        cwd=PROJECT,
        env={**os.environ, "CACHD_SERVER": daemon.url},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    for line in ended.stdout.splitlines():
        note(line.rstrip())
    if ended.returncode:
        raise Failed(f"cachd {words[0]} ended with {ended.returncode}:\n{ended.stderr}")


def watch(daemon: Daemon, what: str, is_over: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """Show a bar until the pull is so far; its bytes then. Raises Failed."""
    columns = (TextColumn(f"[bold cyan]{what:>8}"), BarColumn(40), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, refresh_per_second=20) as progress:
        task = progress.add_task(what, total=None)

        def looked() -> dict[str, int]:
            moved: dict[str, int] = daemon.moved()
            progress.update(task, completed=moved["done"], total=moved["total"] or None)
            return moved if is_over(moved) else {}

        reached: dict[str, int] = wait_for(looked, "the pull to go on")
        return reached


def wait_for(look: Callable[[], Any], what: str) -> Any:
    """The first true answer. Raises Failed when there is none in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := look()):
        if time.monotonic() > deadline:
            raise Failed(f"waited {PATIENCE_SECONDS:.0f} s for {what}")
        time.sleep(LOOK_SECONDS)
    return found


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back: a process that has begun must be known before we end."""
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda told, _: held.append(told))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def free_port() -> int:
    """The daemon's own port; 0, which lets the system choose one, when something listens there."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", PORT))
        except OSError:
            return 0
    return PORT


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-TAIL:]


def shown(text: object) -> str:
    """A path as seen from the project."""
    return str(text).replace(f"{PROJECT}/", "")


def show_command(*words: str) -> None:
    """Print a command as a user types it."""
    console.print(f"[bold green]       $[/]  [bold]{escape(' '.join(words))}[/]", soft_wrap=True)


def note(text: str) -> None:
    """Print a line below a step."""
    console.print(f"          {shown(text)}", markup=False, soft_wrap=True)


def say(what: str, how: str) -> None:
    """Print a step: one word, and what was measured."""
    console.print(f"[bold cyan]{what:>8}[/]  {escape(shown(how))}", soft_wrap=True)


if __name__ == "__main__":
    main()
