"""The commands about the models of this node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd import terminal
from cachd.cli.answers import show
from cachd.cli.arguments import SERVER, Form, Name, Names, Output, Server, TokenFile
from cachd.cli.ask import ask
from cachd.cli.exits import EXIT_BY_ERROR
from cachd.cli.several import ask_each
from cachd.errors import CachdError, Corrupt, error_of
from cachd.terminal import models as printed
from cachd.terminal.amounts import size_text

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()


@commands.command("ls", epilog="Example: cachd ls; cachd ls -w; cachd ls -o json")
def list_models(
    *,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="keep watching: show changes until Ctrl-C")
    ] = False,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """List the models of this node: state, progress, rate, who uses them, and why one failed or waits."""
    if watch:
        from cachd.cli.watching import watch_models

        ask(server, token_file, lambda client: watch_models(client, output))
        return
    found = ask(server, token_file, lambda client: client.models())
    if output is Output.name:
        for model in found:
            terminal.say(model["name"])
        return
    headings, rows = printed.table(found, is_wide=output is Output.wide)
    none = "no model is here yet; cachd pull REF pulls one"
    show({"models": found}, output, lambda: terminal.show_table(headings, rows, none=none))


@commands.command("show", epilog="Example: cachd show org--model; cachd show org--model --files -o json")
def show_model(
    names: Names,
    *,
    files: Annotated[bool, typer.Option("--files", help="show every file, also in JSON and YAML")] = False,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Show models: state, path, revision, size, progress, errors, what protects them, files and digests."""
    is_text = output in (Output.text, Output.wide)

    async def described(client: Client, name: str) -> dict[str, Any]:
        model = await client.model(name)
        if files or is_text:
            found, total = await _files(client, name, most=None if files else printed.FEW_FILES)
            model |= {"files": found, "file_count": total}
        return model

    def text(model: Mapping[str, Any]) -> None:
        if model["name"] != names[0]:
            terminal.say("")
        printed.show_model(model, model["files"], model["file_count"])

    ask_each(server, token_file, names, described, output=output, text=text)


async def _files(client: Client, name: str, *, most: int | None) -> tuple[list[dict[str, Any]], int]:
    """The files of a model, and how many there are; none while they are not known."""
    try:
        return await client.files(name, most=most)
    except CachdError as error:
        if error.code not in ("not_resolved", "no_such_model"):
            raise
        return [], 0


@commands.command(epilog="Example: cachd pin org--model")
def pin(
    names: Names, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Pin models: they are not evicted, and `cachd rm` refuses to delete them without --force."""
    ask_each(
        server, token_file, names, lambda client, name: client.pin(name), output=output, text=_say_pinned
    )


@commands.command(epilog="Example: cachd unpin org--model")
def unpin(
    names: Names, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Unpin models: they may be evicted and deleted again."""
    ask_each(
        server, token_file, names, lambda client, name: client.unpin(name), output=output, text=_say_pinned
    )


def _say_pinned(document: Mapping[str, Any]) -> None:
    terminal.say(f"{document['name']}: {'pinned' if document['pinned'] else 'no longer pinned'}")


@commands.command(epilog="Example: cachd rm org--model other--model")
def rm(
    names: Names,
    *,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="delete the models even if they are pinned, in use or listed in the configuration"
        ),
    ] = False,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Delete models: cancel their pulls, unpublish them and free their disk space."""

    def text(deleted: Mapping[str, Any]) -> None:
        back = "; the configuration lists it, so it comes back at the next start or change of the file"
        freed = f"{deleted['name']}: {size_text(deleted['freed_bytes'])} freed"
        terminal.say(freed + (back if deleted["configured"] else ""))

    ask_each(
        server,
        token_file,
        names,
        lambda client, name: client.delete(name, force=force),
        output=output,
        text=text,
    )


@commands.command(epilog="Example: cachd cancel org--model")
def cancel(
    names: Names, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Cancel running pulls. Nothing is deleted: a later pull resumes from the bytes that were received.

    A model that is ready stays ready. One that the configuration lists is pulled again at the next start or
    change of the file.
    """

    def text(model: Mapping[str, Any]) -> None:
        status = printed.status_of(model)
        done = f"{size_text(status.done)} of {size_text(status.total)}" if status.total else "nothing"
        pull = model["pull"]
        ended = "cancelled" if pull and pull["state"] == "cancelled" else "it had ended already"
        terminal.say(f"{model['name']}: {ended}; it is {model['state']}, and {done} is here")

    ask_each(server, token_file, names, lambda client, name: client.cancel(name), output=output, text=text)


@commands.command(epilog="Example: cachd rollback org--model")
def rollback(
    name: Name, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Point a name back to its previous snapshot, at once. The last line printed is the path."""
    document = ask(server, token_file, lambda client: client.rollback(name))
    ready = document["ready"]
    text = f"{name} {ready['ref']} {ready['revision']}\n{printed.file_or_directory(document)}"
    show(document, output, lambda: terminal.say(text))


@commands.command(epilog="Example: cachd verify org--model -o json")
def verify(
    names: Names, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Re-read and verify every byte of models. Exit code 8 if a file is damaged, or is being repaired.

    A damaged model is no longer ready, and the daemon repairs it at once: `cachd wait` waits for that.
    """

    def status(verification: Mapping[str, Any]) -> int:
        return {"intact": 0, "damaged": EXIT_BY_ERROR[Corrupt]}.get(verification["state"], 1)

    ask_each(
        server,
        token_file,
        names,
        _verified,
        output=output,
        text=lambda document: printed.show_verification(document["name"], document),
        status=status,
    )


@commands.command(epilog="Example: cachd warm org--model")
def warm(
    names: Names, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Read models into free memory, so that the next pod loads them from there."""

    def text(warming: Mapping[str, Any]) -> None:
        loaded, total = warming["bytes"]["loaded"], warming["bytes"]["total"]
        read = f"{size_text(loaded)} of them were read from the disk" if loaded else "they were there already"
        state = "in memory" if warming["state"] == "warm" else warming["state"]
        terminal.say(f"{warming['name']}: {size_text(total)} {state}; {read}")

    ask_each(server, token_file, names, _warmed, output=output, text=text)


async def _verified(client: Client, name: str) -> dict[str, Any]:
    """The document of the verification once it has ended. Raises Corrupt while the model is repaired."""
    from cachd.cli.follow import until_ended

    try:
        begun = await client.verify(name)
    except CachdError as error:
        if error.code != "damaged":
            raise
        hint = f"cachd wait {name} waits for the repair, and cachd show {name} says how far it is"
        raise Corrupt(error.detail, code=error.code, hint=hint) from None
    return {"name": name, **await until_ended(client, name, "verification", begun)}


async def _warmed(client: Client, name: str) -> dict[str, Any]:
    """The document of the warming once it has ended. Raises the error that it failed with."""
    from cachd.cli.follow import until_ended

    warming = await until_ended(client, name, "warming", await client.warm(name))
    if warming["error"]:
        raise error_of(warming["error"])
    return {"name": name, **warming}
