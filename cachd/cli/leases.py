"""The command that takes, renews and releases leases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd import terminal
from cachd.cli.answers import show
from cachd.cli.arguments import SERVER, Form, LeaseTime, Name, Output, Server, TokenFile
from cachd.cli.ask import ask

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()


@commands.command(epilog="Example: cachd lease org--model --seconds 10m; cachd lease org--model --release ID")
def lease(
    name: Name,
    *,
    seconds: LeaseTime = 600.0,
    holder: Annotated[str, typer.Option(help="who holds the lease, for people to read")] = "",
    renew: Annotated[str | None, typer.Option(metavar="ID", help="renew this lease")] = None,
    release: Annotated[str | None, typer.Option(metavar="ID", help="release this lease")] = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Protect a model for some time: until its lease ends, it is not evicted, nor deleted without --force.

    The last line printed is the id of the lease, which renews and releases it. In a pod, `cachd hold`
    protects a model for as long as the pod lives.
    """
    if renew and release:
        raise typer.BadParameter("give either --renew or --release")
    asked = {"seconds": seconds, "holder": holder}

    async def changed(client: Client) -> dict[str, Any]:
        if release:
            await client.release_lease(name, release)
            return {"name": name, "id": release}
        if renew:
            return await client.renew_lease(name, renew, asked)
        return await client.take_lease(name, asked)

    document = ask(server, token_file, changed)
    if release:
        text = f"{name}: released"
    else:
        text = f"{name} is protected until {document['expires_at']}\n{document['id']}"
    show(document, output, lambda: terminal.say(text))
