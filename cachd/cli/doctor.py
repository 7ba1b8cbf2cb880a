"""The command that checks a daemon, its disk and its models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.filesize import decimal

from cachd import errors, terminal
from cachd.cli.answers import show
from cachd.cli.arguments import SERVER, Form, Output, Server, TokenFile
from cachd.cli.ask import ask
from cachd.errors import CachdError, Unreachable

if TYPE_CHECKING:
    from cachd.client import Client

Check = dict[str, Any]  # `ok`, and the sentence `what`
_LITTLE_FREE = 0.05  # of the disk

commands = typer.Typer()


@commands.command(epilog="Example: cachd doctor")
def doctor(server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text) -> None:
    """Check the daemon, its disk and its models, and report every problem. Exit code 1 if there is one."""
    checks = ask(server, token_file, _checks)

    def text() -> None:
        for check in checks:
            terminal.say(f"{'ok  ' if check['ok'] else 'FAIL'} {check['what']}")

    show({"findings": checks}, output, text)
    raise typer.Exit(0 if all(check["ok"] for check in checks) else 1)


async def _checks(client: Client) -> list[Check]:
    checks = [
        await _probe(client, "/livez", "the daemon answers"),
        await _probe(client, "/readyz", "its disk is writable"),
        await _probe(client, "/readyz?set=required", "every required model is ready"),
    ]
    capacity = await client.get("/v1/capacity")
    checks += _space(capacity)
    checks += await _configuration(client)
    checks += _views(capacity["views"])
    for model in await client.models():
        checks += _last_pull(model)
    return checks


async def _probe(client: Client, path: str, what: str) -> Check:
    """Whether the daemon answers a probe with success. Raises Unreachable."""
    try:
        await client.get(path)
    except Unreachable:
        raise
    except CachdError as error:
        return _wrong(f"{what}: no: {error.detail}")
    return {"ok": True, "what": what}


def _space(capacity: Mapping[str, Any]) -> list[Check]:
    free, over = capacity["free_bytes"] - capacity["reserved_bytes"], capacity["over_bytes"]
    text = f"{decimal(free)} of {decimal(capacity['total_bytes'])} free"
    text += f", {decimal(over)} over limit_bytes or reserve_free" if over else ""
    checks: list[Check] = [{"ok": free > _LITTLE_FREE * capacity["total_bytes"] and not over, "what": text}]
    if capacity["in_use_reported_by"] != "kernel":
        checks.append(_wrong("the kernel cannot report open files here: only pins and leases protect models"))
    return checks


async def _configuration(client: Client) -> list[Check]:
    """A check for each reason why the configuration file is not in force. Only an admin may read them."""
    try:
        reasons = terminal.not_in_force((await client.get("/v1/options"))["file"])
    except errors.Forbidden:
        text = "its configuration was not checked: that needs an admin's token (--token-file)"
        return [{"ok": True, "what": text}]
    return [_wrong(reason) for reason in reasons]


def _views(views: Mapping[str, Any]) -> list[Check]:
    if not views["unwatched"]:
        return []
    text = f"the kernel does not watch {views['unwatched']} directories of the views: {views['reason']};"
    return [_wrong(f"{text} cachd finds files deleted there only after minutes")]


def _last_pull(model: Mapping[str, Any]) -> list[Check]:
    error = (model["pull"] or {}).get("error")
    if not error:
        return []
    text = f"{model['name']}: {error['detail']} ({error['code']}) {error.get('hint', '')}"
    return [_wrong(text.rstrip())]


def _wrong(what: str) -> Check:
    return {"ok": False, "what": what}
