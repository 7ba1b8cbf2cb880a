"""The commands about disk space."""

from __future__ import annotations

from typing import Annotated

import typer

from cachd import terminal
from cachd.cli.answers import show
from cachd.cli.arguments import SERVER, Form, Output, Server, TokenFile
from cachd.cli.ask import ask
from cachd.terminal import space as printed
from cachd.terminal.amounts import size_text

commands = typer.Typer()


@commands.command(epilog="Example: cachd capacity -o json")
def capacity(server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text) -> None:
    """Show the disk space that models use and may use, and each snapshot with its size and protection."""
    document = ask(server, token_file, lambda client: client.get("/v1/capacity"))
    show(document, output, lambda: printed.show_capacity(document))


@commands.command("gc", epilog="Example: cachd gc 40GB --dry-run")
@commands.command(epilog="Example: cachd evict 40GB --dry-run; cachd evict hf://org/model")
def evict(
    space: Annotated[
        str,
        typer.Argument(
            help="bytes that must be available, such as 40GB, or the ref of a model that must fit"
        ),
    ],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what would be evicted and why, and evict nothing")
    ] = False,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Evict the models with the lowest score until the given space is available. `cachd gc` is the same."""
    asked = {"bytes" if _is_size(space) else "ref": space}
    document = ask(server, token_file, lambda client: client.make_space(asked, dry_run=dry_run))
    show(document, output, lambda: printed.show_evictions(document))


def _is_size(space: str) -> bool:
    """Whether it is a size and not a ref: the owner of a model may begin with a digit, too."""
    return space.strip()[:1].isdigit() and "/" not in space


@commands.command(epilog="Example: cachd evictions")
def evictions(server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text) -> None:
    """List the evictions since the daemon started, the newest first, with the reason of each."""
    document = ask(server, token_file, lambda client: client.get("/v1/evictions"))
    show(document, output, lambda: printed.show_evictions(document))


@commands.command(epilog="Example: cachd sweep --dry-run")
def sweep(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what would be removed, and remove nothing")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option("--everything", help="also remove what ended pulls left within keep_unfinished_seconds"),
    ] = False,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Remove what no model and no pull needs: replaced snapshots, unused blobs and partial downloads."""
    asked = {"dry_run": dry_run, "everything": everything}
    document = ask(server, token_file, lambda client: client.sweep(asked))
    rows = [(each["kind"], each["name"], size_text(each["freed_bytes"])) for each in document["swept"]]
    headings = ("KIND", "NAME", "FREED")
    show(document, output, lambda: terminal.show_table_or("there is nothing to remove", headings, rows))
