"""The command that pulls a model, by the daemon or in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd import terminal
from cachd.cli.answers import note, show
from cachd.cli.arguments import (
    DAY,
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
from cachd.terminal.models import file_or_directory, here_text, pulled_text, warn_of

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()

HubId = Annotated[
    str | None,
    typer.Option(help="Hub repository org/model under which a mirror of it appears in the Hub view"),
]
Copied = Annotated[
    list[str] | None,
    typer.Option(
        "--copy",
        help="pattern of files that the views show as copies, not as hard links; repeatable; default:"
        " external data of ONNX",
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        help="triton: config.pbtxt and 1/FILES, as Triton needs them; default: as the source has them"
    ),
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
Wait = Annotated[bool, typer.Option("--wait", help="wait until the model is ready, and show its progress")]
Shared = Annotated[
    bool | None,
    typer.Option(
        "--shared/--not-shared",
        help="with --direct: whether other nodes use this root, too (RWX); default: as the file system says",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="with --direct, on a shared volume: evict and delete models, though other nodes may use them",
    ),
]
Direct = Annotated[bool, typer.Option("--direct", help="pull in this process, without a daemon")]


@commands.command(
    epilog="Example: cachd pull org/model@main --wait; cachd pull org/model config.json '*.safetensors';"
    " cachd pull org/model --direct --shared --root /mnt/models"
)
def pull(  # over 40 lines: one for each option
    ref: Ref,
    files: Files = None,
    *,
    name: RefName = None,
    include: Include = None,
    exclude: Exclude = None,
    weights: Weights = None,
    formats: Formats = None,
    copy: Copied = None,
    layout: Layout = None,
    hub_id: HubId = None,
    pin: Pin = False,
    priority: Priority = 0,
    refresh: Refresh = False,
    replace: Replace = False,
    wait: Wait = False,
    timeout: Timeout = DAY,
    direct: Direct = False,
    shared: Shared = None,
    force: Force = False,
    root: Root = None,
    config_file: ConfigFile = None,
    allow: Allow = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Pull a model. The last line printed is its path.

    This is the model's directory; with --wait or --direct, and a model of one file, it is the file. Without
    either, the daemon pulls while other commands run: `cachd watch` shows how far it is.
    """
    include, exclude = [*(include or []), *(files or [])], exclude or []
    asked: dict[str, object] = {"ref": ref, "name": name, "include": include, "exclude": exclude}
    asked |= {"weights": weights, "hub_id": hub_id, "pin": pin, "priority": priority}
    asked |= {"refresh": refresh, "replace": replace, "formats": formats, "copy": copy, "layout": layout}
    is_new = False
    if direct:
        from cachd import config
        from cachd.direct import pull_here
        from cachd.model import ModelSpec

        spec = ModelSpec.asked(
            ref,
            name,
            include,
            exclude,
            hub_id=hub_id,
            weights=weights,
            copy=copy,
            formats=formats,
            layout=layout,
        )
        options = config.load(root=root, config=config_file, allow=allow, shared=shared)
        how = {"refresh": refresh, "replace": replace, "pin": pin, "force": force}
        try:
            document = pull_here(spec, options, seconds=timeout, **how)
        except KeyboardInterrupt:
            note(output, "interrupted; run it again: it resumes where it stopped")
            raise
        is_new = document["pull"] is not None
    elif wait:
        begun, document = ask(server, token_file, lambda client: _until_ready(client, asked, timeout, output))
        is_new = _is_running(begun)
    else:
        document = ask(server, token_file, lambda client: client.pull(asked))
    _report(document, output, is_new=is_new)
    path = file_or_directory(document) if wait or direct else document["path"]
    show(document, output, lambda: terminal.say(path))


def _report(document: Mapping[str, Any], output: Output, *, is_new: bool) -> None:
    """Say on standard error how the pull ended, or that it goes on. `is_new`: the model was not ready."""
    name = document["name"]
    if ready := document["ready"]:
        warn_of(ready)
    if _is_running(document):
        note(output, f"{name} is being pulled{_next_commands(name)}")
    elif ready:
        note(output, pulled_text(document) if is_new else here_text(document))


def _next_commands(name: str) -> str:
    """What a person may do about a pull that runs, each command on a line from which it can be copied."""
    return f"\n  watch it: cachd watch {name}\n  end it:   cachd cancel {name}"


def _is_running(document: Mapping[str, Any]) -> bool:
    pull = document["pull"]
    return pull is not None and pull["ended_at"] is None


async def _until_ready(
    client: Client, asked: Mapping[str, Any], seconds: float, output: Output
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's document when the pull was asked for, and once it is ready."""
    import asyncio

    from cachd.cli.follow import Pulled, follow
    from cachd.terminal.progress import progress_bars

    begun: dict[str, Any] | None = None
    try:
        begun = await client.pull(asked)
        with progress_bars() as update:
            return begun, await follow(client, begun["name"], seconds, Pulled(begun), update)
    except asyncio.CancelledError:  # by Ctrl-C
        if begun is None:
            note(output, "interrupted before the daemon answered: the pull may go on\n  see it: cachd ls")
        else:
            note(output, f"the pull goes on{_next_commands(begun['name'])}")
        raise
