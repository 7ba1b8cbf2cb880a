"""The command that shows what a pull would do."""

from __future__ import annotations

from typing import Annotated

import typer

from cachd.cli.answers import show
from cachd.cli.arguments import (
    SERVER,
    Allow,
    ConfigFile,
    Exclude,
    Files,
    Form,
    Formats,
    Include,
    Output,
    Ref,
    RefName,
    Root,
    Server,
    Timeout,
    TokenFile,
    Weights,
)
from cachd.cli.ask import ask
from cachd.terminal.space import show_resolved

commands = typer.Typer()
_SECONDS = 60.0


@commands.command(
    epilog="Example: cachd resolve org/model; cachd resolve org/model '*.gguf' --direct -o json"
)
def resolve(
    ref: Ref,
    files: Files = None,
    *,
    name: RefName = None,
    include: Include = None,
    exclude: Exclude = None,
    weights: Weights = None,
    formats: Formats = None,
    timeout: Timeout = _SECONDS,
    direct: Annotated[bool, typer.Option("--direct", help="ask the source from this process")] = False,
    root: Root = None,
    config_file: ConfigFile = None,
    allow: Allow = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Show what a pull would do: files, sizes, digests, what would be fetched and what evicted.

    Nothing is pulled. With --direct it needs neither a daemon nor a cache, and says nothing about what is on
    this node.
    """
    include, exclude = [*(include or []), *(files or [])], exclude or []
    if direct:
        from cachd import config
        from cachd.direct import resolve_here
        from cachd.model import ModelSpec

        spec = ModelSpec.asked(ref, name, include, exclude, weights=weights, formats=formats)
        options = config.load(root=root, config=config_file, allow=allow)
        document = resolve_here(spec, options, seconds=timeout)
    else:
        asked = {"ref": ref, "name": name, "include": include, "exclude": exclude}
        asked |= {"weights": weights, "formats": formats}
        document = ask(server, token_file, lambda client: client.resolve({**asked, "seconds": timeout}))
    show(document, output, lambda: show_resolved(document))
