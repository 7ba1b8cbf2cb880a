"""The command that checks this node and its daemon, whether the daemon runs or not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cachd import terminal
from cachd.cli.answers import show
from cachd.cli.arguments import SERVER, ConfigFile, Deadline, Form, Output, Root, Server, TokenFile
from cachd.cli.ask import ask
from cachd.cli.node import found_daemon
from cachd.errors import CachdError, Forbidden, Unauthorized, Unreachable
from cachd.model.units import count_text

if TYPE_CHECKING:
    from cachd.client import Client
    from cachd.config import Examined
    from cachd.doctor.running import Reported

commands = typer.Typer()

_COLORS = {"ok": "green", "warning": "yellow", "wrong": "red"}
_STATE_WIDTH = max(map(len, _COLORS))
_ALL_ANSWERS = 6  # so many times the timeout of one: a node may have very many models
_PROBES = ("/livez", "/readyz", "/readyz?set=required")


@commands.command(epilog="Example: cachd doctor; cachd doctor --config /etc/cachd/config.yaml -o json")
def doctor(
    *,
    root: Root = None,
    config_file: ConfigFile = None,
    timeout: Deadline = 10.0,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Check this node and its daemon, also while no daemon runs, and say what to do about each problem.

    Exit code 1 if something is wrong now; a warning is no reason. Run it with the daemon's environment, as
    root or as the daemon's user. Of a daemon on another node, only what it reports is checked.
    """
    from cachd.daemon.logs import configure_logs  # these load libraries that no other command needs
    from cachd.doctor.examine import Node, examine
    from cachd.doctor.this_node import is_here

    configure_logs("error", "text")
    address = server or found_daemon(config_file).server
    answer = _answer(server, address, token_file, timeout, config_file)
    examined = _options_here(config_file, root, answer) if is_here(address) else None
    node = Node(examined, address, is_named=server is not None, answer=answer)
    findings = [finding.as_document() for finding in examine(node, timeout)]
    show({"findings": findings}, output, lambda: _say(findings))
    raise typer.Exit(1 if any(finding["state"] == "wrong" for finding in findings) else 0)


def _options_here(config_file: Path | None, root: Path | None, answer: Reported | Unreachable) -> Examined:
    """The options of this node, read as the daemon's user reads them.

    What neither flags nor the environment say about file and root, the daemon says, if it runs.
    """
    from cachd import config
    from cachd.doctor.root import owner_of
    from cachd.doctor.running import Reported
    from cachd.doctor.this_node import become, can_become

    reported = answer if isinstance(answer, Reported) else None
    named = reported.file.get("path") if reported else None
    if config_file is None and not os.environ.get("CACHD_CONFIG") and named and Path(str(named)).is_file():
        config_file = Path(str(named))
    examined = config.examine(config=config_file, root=root)
    if reported and "root" not in examined.loaded.given.settings and reported.option("root"):
        root = Path(str(reported.option("root")))
        examined = config.examine(config=config_file, root=root)
    owner = owner_of(examined.loaded.config)
    if owner is not None and can_become(owner.uid, owner.gid):
        become(owner.uid, owner.gid)
        examined = config.examine(config=config_file, root=root)
    return examined


# --- what the daemon says ---


def _answer(
    server: str | None, address: str, token_file: Path | None, seconds: float, config_file: Path | None
) -> Reported | Unreachable:
    """Ask the daemon at `address` for its report. Returns the report, or the error if it does not answer.

    The address may come from this node's configuration. If a file of that configuration, such as the
    certificate, cannot be used, the daemon counts as unreachable. Other checks report the file.
    """
    try:
        call = partial(_asked_in_time, server=address, seconds=seconds)
        return ask(server, token_file, call, config_file=config_file)
    except Unreachable as error:
        return error
    except CachdError as error:
        if server is not None or token_file is not None:
            raise
        return Unreachable(error.detail, hint=error.hint)


async def _asked_in_time(client: Client, server: str, seconds: float) -> Reported:
    """As `_asked`. A daemon that is stopped, or whose disk hangs, accepts connections and never answers."""
    import asyncio

    try:
        async with asyncio.timeout(seconds):
            await _refusal(client, "/livez")
        async with asyncio.timeout(_ALL_ANSWERS * seconds):
            return await _asked(client, server)
    except TimeoutError as error:
        raise Unreachable(
            f"the daemon at {server} did not answer within {seconds:g} s",
            hint="see its log, the load of the node, and whether its disk answers",
        ) from error


async def _asked(client: Client, server: str) -> Reported:
    """Raises Unreachable."""
    from cachd.doctor.running import Reported

    probes = {path: error for path in _PROBES if (error := await _refusal(client, path))}
    try:
        capacity, models = await client.get("/v1/capacity"), await client.models()
    except Unreachable:
        raise
    except CachdError as error:
        return Reported(server, probes=probes, refused=error)
    try:
        options = await client.get("/v1/options")
    except Unauthorized as error:
        # Without a token, a node that lets everybody read answers all of the above.
        refused = error if client.has_token else None
        return Reported(server, capacity, None, models, probes, refused)
    except Forbidden:
        return Reported(server, capacity, None, models, probes)
    return Reported(server, capacity, options, models, probes)


async def _refusal(client: Client, path: str) -> CachdError | None:
    """Why the daemon answers a probe without success. Raises Unreachable."""
    try:
        await client.get(path)
    except Unreachable:
        raise
    except CachdError as error:
        return error
    return None


# --- for people ---


def _say(findings: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each finding, its hint below it unless it is right, and then how many there are."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    width = max((len(finding["code"]) for finding in findings), default=0)
    for finding in findings:
        state = finding["state"]
        console.print(f"{state:<{_STATE_WIDTH}}", style=_COLORS[state], end="")  # in colour on a terminal
        terminal.say_beside(f"  {finding['code']:<{width}}  ", finding["what"], at=_STATE_WIDTH)
        if state != "ok" and finding.get("hint"):
            terminal.say_beside(" " * (_STATE_WIDTH + 4 + width), f"hint: {finding['hint']}")
    counted = Counter(finding["state"] for finding in findings)
    warnings = count_text(counted["warning"], "warning")
    terminal.say(f"{counted['wrong']} wrong, {warnings}, {counted['ok']} ok")
