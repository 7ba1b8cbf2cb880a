"""The command that pulls a model, by the daemon or in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd import terminal
from cachd.cli.answers import file_or_directory, show
from cachd.cli.arguments import DAY, SERVER, ConfigFile, Form, Output, Root, Server, Timeout, TokenFile
from cachd.cli.ask import ask

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()

Ref = Annotated[
    str,
    typer.Argument(
        help="a model of the Hub as org/model, org/model@revision, org/model/file or an address on"
        " huggingface.co; or s3://bucket/prefix/, https://host/file, https://host/dir/, file:///path"
    ),
]
Name = Annotated[str | None, typer.Option(help="local name; default: derived from the ref")]
Include = Annotated[
    list[str] | None, typer.Option(help="pattern of the files to pull; repeatable; default: all")
]
Exclude = Annotated[list[str] | None, typer.Option(help="pattern of the files to leave out; repeatable")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="form of the weights to pull: all, safetensors, bin, gguf, gguf:Q4_K_M, onnx, …; default: all"
    ),
]
HubId = Annotated[
    str | None,
    typer.Option(help="Hub repository org/model under which a mirror of it appears in the Hub view"),
]
Pin = Annotated[
    bool, typer.Option("--pin", help="pin the model: it is never evicted, and `cachd rm` needs --force")
]
Priority = Annotated[
    int, typer.Option(min=-100, max=100, help="higher priorities are pulled first and evicted last")
]
Refresh = Annotated[bool, typer.Option("--refresh", help="resolve the ref again even if the model is ready")]
Replace = Annotated[
    bool, typer.Option("--replace", help="take over the name even if it is another model's, or pinned")
]
Wait = Annotated[bool, typer.Option("--wait", help="wait until the model is ready")]
Direct = Annotated[bool, typer.Option("--direct", help="pull in this process, without a daemon")]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="with --direct: private network or URL prefix that sources may reach; repeatable"),
]


@commands.command(epilog="Example: cachd pull org/model@main --wait")
def pull(  # over 40 lines: one for each option
    ref: Ref,
    *,
    name: Name = None,
    include: Include = None,
    exclude: Exclude = None,
    weights: Weights = None,
    hub_id: HubId = None,
    pin: Pin = False,
    priority: Priority = 0,
    refresh: Refresh = False,
    replace: Replace = False,
    wait: Wait = False,
    timeout: Timeout = DAY,
    direct: Direct = False,
    root: Root = None,
    config_file: ConfigFile = None,
    allow: Allow = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Pull a model. The last line printed is its path.

    This is the model's directory; with --wait or --direct, and a model of one file, it is the file.
    """
    patterns = {"include": include or [], "exclude": exclude or []}
    spec = {"ref": ref, "name": name, **patterns, "weights": weights, "hub_id": hub_id}
    asked = {**spec, "pin": pin, "priority": priority, "refresh": refresh, "replace": replace}
    if direct:
        from cachd import config
        from cachd.direct import pull_here
        from cachd.model import ModelSpec

        document = pull_here(
            ModelSpec.asked(ref, name, include or (), exclude or (), hub_id=hub_id, weights=weights),
            config.load(root=root, config=config_file, allow=allow),
            seconds=timeout,
            refresh=refresh,
            replace=replace,
            pin=pin,
        )
    elif wait:
        document = ask(server, token_file, lambda client: _pull_until_ready(client, asked, timeout))
    else:
        document = ask(server, token_file, lambda client: client.pull(asked))
    if ready := document["ready"]:
        terminal.warn_of(ready)
    path = file_or_directory(document) if wait or direct else document["path"]
    show(document, output, lambda: terminal.say(path))


async def _pull_until_ready(client: Client, asked: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    from cachd.cli.follow import Pulled, follow

    begun = await client.pull(asked)
    return await follow(client, begun["name"], seconds, Pulled(begun))
