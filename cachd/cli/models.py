"""The commands about the models of this node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from cachd import terminal
from cachd.cli.answers import file_or_directory, show
from cachd.cli.arguments import SERVER, Form, Output, Server, TokenFile
from cachd.cli.ask import ask
from cachd.cli.exits import EXIT_BY_ERROR
from cachd.errors import Corrupt, error_of

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()


@commands.command("ls", epilog="Example: cachd ls -o json")
def list_models(server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text) -> None:
    """List the models of this node."""
    found = ask(server, token_file, lambda client: client.models())
    if output is Output.name:
        for model in found:
            terminal.say(model["name"])
        return
    rows = [terminal.model_row(model) for model in found]
    show({"models": found}, output, lambda: terminal.show_table(terminal.MODEL_HEADINGS, rows))


@commands.command("show", epilog="Example: cachd show org--model")
def show_model(
    name: str, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Show one model: state, path, revision, size, progress, errors, and what protects it."""
    document = ask(server, token_file, lambda client: client.model(name))
    show(document, output, lambda: terminal.show_model(document))


@commands.command(epilog="Example: cachd pin org--model")
def pin(name: str, server: Server = SERVER, token_file: TokenFile = None) -> None:
    """Pin a model: it is not evicted, and `cachd rm` refuses to delete it without --force."""
    ask(server, token_file, lambda client: client.pin(name))


@commands.command(epilog="Example: cachd unpin org--model")
def unpin(name: str, server: Server = SERVER, token_file: TokenFile = None) -> None:
    """Unpin a model: it may be evicted and deleted again."""
    ask(server, token_file, lambda client: client.unpin(name))


@commands.command(epilog="Example: cachd rm org--model")
def rm(
    name: str,
    *,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="delete the model even if it is pinned, in use or listed in the configuration"
        ),
    ] = False,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Delete a model: cancel its pull, unpublish it and free its disk space."""
    document = ask(server, token_file, lambda client: client.delete(name, force=force))
    text = f"{name}: {decimal(document['freed_bytes'])} freed"
    if document["configured"]:
        text += "; the configuration lists it, so it comes back at the next start or change of the file"
    show(document, output, lambda: terminal.say(text))


@commands.command(epilog="Example: cachd rollback org--model")
def rollback(
    name: str, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Point a name back to its previous snapshot, at once. The last line printed is the path."""
    document = ask(server, token_file, lambda client: client.rollback(name))
    ready = document["ready"]
    text = f"{name} {ready['ref']} {ready['revision']}\n{file_or_directory(document)}"
    show(document, output, lambda: terminal.say(text))


@commands.command(epilog="Example: cachd verify org--model -o json")
def verify(
    name: str, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Re-read and verify every byte of a model. Exit code 8 if a file is damaged.

    A damaged model is no longer ready, and the daemon repairs it at once: `cachd wait` waits for that.
    """
    document = ask(server, token_file, lambda client: _verified(client, name))
    show({"name": name, **document}, output, lambda: terminal.show_verification(name, document))
    if document["state"] != "intact":
        raise typer.Exit(EXIT_BY_ERROR[Corrupt] if document["state"] == "damaged" else 1)


@commands.command(epilog="Example: cachd warm org--model")
def warm(
    name: str, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Read a model into free memory, so that the next pod loads it from there."""
    document = ask(server, token_file, lambda client: _warmed(client, name))
    loaded, total = document["bytes"]["loaded"], document["bytes"]["total"]
    text = f"{name} {document['state']}: {decimal(loaded)} of {decimal(total)} read"
    show({"name": name, **document}, output, lambda: terminal.say(text))


async def _verified(client: Client, name: str) -> dict[str, Any]:
    """The document of the verification once it has ended."""
    from cachd.cli.follow import until_ended

    return await until_ended(client, name, "verification", await client.verify(name))


async def _warmed(client: Client, name: str) -> dict[str, Any]:
    """The document of the warming once it has ended. Raises the error that it failed with."""
    from cachd.cli.follow import until_ended

    warming = await until_ended(client, name, "warming", await client.warm(name))
    if warming["error"]:
        raise error_of(warming["error"])
    return warming
