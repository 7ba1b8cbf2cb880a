"""Plays an operator's first hour at real terminals: `play` yields what stands on the screen at each step.

The daemon is real. It pulls from a Hub of the tests, which is on this machine and has small models under
names of well-known ones. Each command is typed, and the next step waits for what it prints.
"""

from __future__ import annotations

import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachd.kernel import durable
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.terminal import Terminal
from tests.ground.weights import safetensors

PROJECT = Path(__file__).parent.parent
MIB = 1 << 20
SIZE, LOG_SIZE = (80, 45), (132, 45)
ROOT, CONFIG, HUB, LISTEN = (
    "/var/lib/cachd",
    "/etc/cachd/config.yaml",
    "http://127.0.0.1:8080",
    "127.0.0.1:8470",
)
QWEN, GATED, PINNED = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "BAAI/bge-m3",
)
STREAMS, HELD_AT = 8, 3 * MIB
LEAST_FREE = 0.25  # of the disk: a fuller one gets a daemon that reserves no space, and warns of it


@dataclass(frozen=True, slots=True)
class Screen:
    """What stands on a terminal: with its colours, and as text. `commands` were typed there."""

    name: str
    commands: tuple[str, ...]
    colours: str

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self.colours)


class Machine:
    """A directory for the cache, a configuration file, a Hub, and what shows them as on any node."""

    def __init__(self, root: Path, config: Path, hub: Hub) -> None:
        self.root, self.config, self.hub = root, config, hub
        self.listen = f"127.0.0.1:{_free_port()}"

    def configure(self, *lines: str) -> None:
        """Write the configuration file, `lines` first."""
        usage = shutil.disk_usage(self.root)
        reserve = [] if usage.free > LEAST_FREE * usage.total else ["reserve_free: 0"]
        own = [
            f"root: {self.root}",
            f"hf_endpoint: {self.hub.url}",
            "allow: [127.0.0.0/8]",
            f"streams: {STREAMS}",
        ]
        self.config.write_text("\n".join([*lines, *own, *reserve, ""]))

    def shown(self, text: str) -> str:
        """The text with paths, addresses, times and rates that are always the same."""
        same = {str(self.root): ROOT, str(self.config): CONFIG, self.hub.url: HUB, self.listen: LISTEN}
        port = self.listen.rpartition(":")[2]
        same |= {f"port={port}": "port=8470", f"\x1b[35m{port}\x1b": "\x1b[35m8470\x1b"}
        for here, there in same.items():
            text = text.replace(here, there)
        for pattern, fixed in ALWAYS:
            text = re.sub(pattern, fixed, text)
        return text


BAR = "\x1b[38;5;197m━━━━━━━━━━╸\x1b[38;5;237m━━━━━━━━━\x1b[39m"
# What differs from run to run, and what is shown in its place.
ALWAYS = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", "2026-01-02T03:04:05.000000Z"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "2026-01-02 03:04:05"),
    (r"in [\d.]+s \([\d.]+ [kM]B/s\)", "in 0.7s (30.0 MB/s)"),
    (r"(59\.8 MB fetched, )in [\d.sm]+", r"\1in 14s"),
    (r"(21\.0 MB fetched, )in [\d.]+s", r"\1in 0.7s"),
    (r"(in all, )in [\d.]+s", r"\1in 0.1s"),
    (r"(resident +)[\d.]+ .?B", r"\g<1>59.8 MB"),
    (r"keeps [\d.]+ GB free", "keeps 380.0 GB free"),
    (r"(downloading )[^/\n]*/59\.8 MB  [\d.]+ MB/s  [\d.]+s", rf"\1{BAR} 32.5/59.8 MB  30.0 MB/s  0.9s"),
    (r"(downloading +59\.8 MB +)\d\d%", r"\g<1>54%"),
    (r"(answers \(\d+\)) in \d+\.\d\ds", r"\1 in 0.01s"),
    (r"[\d.]+ [GT]B of [\d.]+ [GT]B free", "1.2 TB of 1.9 TB free"),
    (r" on (\w+), [\d.]+ [GT]B", r" on \1, 1.9 TB"),
    (r"\d+ inodes free, \d+ of", "118000000 inodes free, 6000000 of"),
)


def play() -> Iterator[Screen]:
    """The screens, in order. Everything that was started or written is gone at the end."""
    with _machine() as machine, ExitStack() as stack:
        env = _environment(stack, machine)
        operator = stack.enter_context(Terminal(PROJECT, SIZE, env))
        yield _screen(machine, "check-config", operator, _check_config(machine, operator))
        daemon = stack.enter_context(Terminal(PROJECT, LOG_SIZE, env))
        daemon.type("cachd serve")
        daemon.wait_for(r"listening .*version=")
        yield _screen(machine, "serve", daemon, ("cachd serve",))
        yield from _pulls(machine, operator)
        yield from _looks(machine, operator)
        daemon.press("C-c")
        daemon.wait_for_prompt()


def _check_config(machine: Machine, operator: Terminal) -> tuple[str, ...]:
    command = f"cachd check-config {machine.config}"
    machine.configure("limit_bytes_per_second: fast", "stream: 8")
    operator.run(command)
    machine.configure()
    operator.run(command)
    return (command,)


def _pulls(machine: Machine, operator: Terminal) -> Iterator[Screen]:
    """The screens of the pulls: the first is interrupted and watched, the second ends, the third fails."""
    yield _screen(machine, "resolve", operator, _run(operator, f"cachd resolve {QWEN}"))
    large = machine.hub.cdn_path(QWEN, "model.safetensors")
    holds = [machine.hub.cdn.hold(large, after=HELD_AT)]
    pull = f"cachd pull {QWEN} --name qwen --wait"
    operator.type(pull)
    operator.wait_for(r"qwen downloading .*/.* MB  [\d.]+ MB/s  [\d.]+s")
    operator.press("C-c")
    operator.wait_for_prompt()
    yield _screen(machine, "interrupt", operator, (pull,))
    holds.append(machine.hub.cdn.hold(large, after=0))  # no other connection may help out
    operator.type("cachd ls -w")
    operator.wait_for(r"NAME +STATE +SIZE +PROGRESS +REASON *\nqwen +downloading .*its source hardly sends")
    operator.press("C-c")
    operator.wait_for_prompt()
    yield _screen(machine, "ls-w", operator, ("cachd ls -w",))
    operator.type("cachd watch")
    operator.wait_for("qwen downloading")
    for hold in holds:
        hold.release()
    operator.wait_for_prompt()
    yield _screen(machine, "watch", operator, ("cachd watch", *_run(operator, pull)))
    pinned = f"cachd pull {PINNED} --name embeddings --pin --wait"
    yield _screen(machine, "pull", operator, _run(operator, pinned, f"cachd pull {GATED} --wait", "cachd ls"))


def _looks(machine: Machine, operator: Terminal) -> Iterator[Screen]:
    """The screens of the commands that look at what is there, and of those that protect it."""
    yield _screen(machine, "show", operator, _run(operator, "cachd show qwen"))
    yield _screen(machine, "rm", operator, _run(operator, "cachd pin qwen", "cachd rm qwen"))
    yield _screen(machine, "events", operator, _run(operator, "cachd events"))
    yield _screen(machine, "doctor", operator, _run(operator, "cachd doctor"))


def _run(operator: Terminal, *commands: str) -> tuple[str, ...]:
    for command in commands:
        operator.run(command)
    return commands


def _screen(machine: Machine, name: str, terminal: Terminal, commands: tuple[str, ...]) -> Screen:
    """What stands on the terminal. An empty screen follows if a prompt is there."""
    colours = machine.shown(terminal.colours()).rstrip()
    if commands != ("cachd serve",):
        terminal.clear()
    return Screen(name, tuple(map(machine.shown, commands)), colours)


# --- the machine ---


@contextmanager
def _machine() -> Iterator[Machine]:
    """Its paths are as long as those that stand for them, so that lines and columns are as on any node."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(_directory("c")))
        beside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="", dir="/tmp")))
        config = beside / "cfg.yaml"
        assert (len(str(root)), len(str(config))) == (len(ROOT), len(CONFIG))
        hub = stack.enter_context(Hub())
        tokenizer = noise(7 * MIB, seed=4)
        hub.add(
            QWEN,
            {
                "config.json": b"{}",
                "model.safetensors": safetensors(50 * MIB),
                "tokenizer.json": tokenizer,
            },
        )
        hub.add(PINNED, {"config.json": b"{}", "model.safetensors": safetensors(20 * MIB)})
        hub.add(GATED, {"config.json": b"{}", "model.safetensors": safetensors(16 * MIB)}, gated=True)
        yield Machine(root, config, hub)


@contextmanager
def _directory(prefix: str) -> Iterator[str]:
    path = tempfile.mkdtemp(prefix=prefix, dir="/tmp")
    Path(path).chmod(0o755)
    try:
        yield path
    finally:
        durable.remove_tree(Path(path))  # published directories are read-only, for their owner, too


def _environment(stack: ExitStack, machine: Machine) -> dict[str, str]:
    """A shell in which `cachd` is this project's, and asks the daemon of this session."""
    # A program of the session may still be ending while the directory is removed.
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    cachd = home / "cachd"
    cachd.write_text(f'#!/bin/sh\nPYTHONPATH="{PROJECT}" exec "{sys.executable}" -m cachd "$@"\n')
    cachd.chmod(0o755)
    own = {"CACHD_CONFIG": str(machine.config), "CACHD_LISTEN": machine.listen}
    return {"PATH": f"{home}:/usr/bin:/bin", "HOME": str(home), "TZ": "UTC", **own}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
