"""The commands of pods, which need a ready model. Those with --cache or --link need no daemon."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd import errors, terminal
from cachd.cli.answers import note, show
from cachd.cli.arguments import (
    DAY,
    SERVER,
    Form,
    Name,
    Names,
    Output,
    Server,
    Timeout,
    TokenFile,
    UnknownTimeout,
)
from cachd.cli.ask import ask
from cachd.cli.failures import report
from cachd.cli.several import print_each
from cachd.errors import CachdError
from cachd.terminal.models import file_or_directory

if TYPE_CHECKING:
    from cachd.client import Client
    from cachd.pod.mount import Mount
    from cachd.pod.wait import Patience

commands = typer.Typer()

Cache = Annotated[
    Path | None,
    typer.Option(envvar="CACHD_CACHE", help="read the cache mounted here, and ask no daemon"),
]


@commands.command(epilog="Example: cachd wait org--model --timeout 600; cachd wait org--model --cache /cache")
def wait(
    names: Names,
    timeout: Timeout = DAY,
    cache: Cache = None,
    unknown_timeout: UnknownTimeout = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Wait until models are ready, and show their progress.

    The last line printed is what `cachd path` prints; of several models, each has a line, in their order.
    With --cache it needs only the mounted cache, as in a pod.
    """
    if cache is None:
        try:
            models = ask(server, token_file, lambda client: _ready_in_time(client, names, timeout))
        except KeyboardInterrupt:
            note(output, f"the pull goes on\n  watch it: cachd watch {' '.join(names)}")
            raise
    else:
        models = _ready_in_mount(cache, names, timeout, unknown_timeout)
    print_each(models, output, lambda model: terminal.say(file_or_directory(model)))
    if codes := [report(model) for model in models if isinstance(model, CachdError)]:
        raise typer.Exit(codes[0])


@commands.command("path", epilog="Example: cachd path org--model; llama-server -m $(cachd path org--model)")
def print_path(
    name: Name,
    *,
    file: Annotated[bool, typer.Option("--file", help="fail if the model has more than one file")] = False,
    cache: Cache = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Print the path of a ready model: its file if it has just one, else its directory.

    A GGUF that is split into shards counts as one file: its first shard, which is what engines take.
    """
    if cache:
        from cachd.pod.ready import ready_model

        model = ready_model(cache, name)
    else:
        model = ask(server, token_file, lambda client: _ready_now(client, name))
    if file and not model["file"]:
        raise errors.NotFound(
            f"{name} has several files", code="several_files", hint=f"its directory is {model['path']}"
        )
    show(model, output, lambda: terminal.say(file_or_directory(model)))


@commands.command(epilog="Example: cachd hold org--model --link /model -- vllm serve /model/org--model")
def hold(
    name: Name,
    link: Annotated[
        Path, typer.Option(help="writable directory of the pod, in which cachd makes the link NAME")
    ],
    command: Annotated[
        list[str] | None,
        typer.Argument(help="command to run in place of cachd; default: hold until SIGTERM"),
    ] = None,
    cache: Annotated[
        Path, typer.Option(envvar="CACHD_CACHE", help="directory at which the cache is mounted in this pod")
    ] = Path("/cache"),
    timeout: Timeout = DAY,
    unknown_timeout: UnknownTimeout = None,
) -> None:
    """Protect one snapshot of a model for as long as the pod lives, and make LINK/NAME a link to it.

    It needs only the mounted cache. When it starts again, it holds the same snapshot.
    """
    from cachd.pod.hold import Holder
    from cachd.pod.mount import Mount

    _end_at_sigterm()
    mount = Mount(cache)
    holder = Holder(mount, name, link, report=_report)
    holder.become(holder.hold(_patience(mount, name, timeout, unknown_timeout)), command or [])


async def _ready_now(client: Client, name: str) -> dict[str, Any]:
    """The document of a ready model. Raises NotFound, or WaitTimeout when it is not ready."""
    from cachd.cli.follow import is_ready

    model = await client.model(name)
    if not is_ready(model):
        raise errors.WaitTimeout(f"{name} is {model['state']}", code="not_ready", hint=f"cachd wait {name}")
    return model


async def _ready_in_time(
    client: Client, names: Sequence[str], seconds: float
) -> list[Mapping[str, Any] | CachdError]:
    """The documents of the models once they are ready, or the errors that keep them from it."""
    import asyncio

    from cachd.cli.follow import follow, is_ready
    from cachd.terminal.progress import progress_bars

    async def ready(name: str) -> Mapping[str, Any] | CachdError:
        try:
            return await follow(client, name, seconds, is_ready, update)
        except CachdError as error:
            return error

    with progress_bars() as update:
        return await asyncio.gather(*map(ready, dict.fromkeys(names)))


def _ready_in_mount(
    cache: Path,
    names: Sequence[str],
    seconds: float,
    unknown_seconds: float | None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> list[Mapping[str, Any] | CachdError]:
    """The documents of the models once they are ready in the mount. Raises as Patience.pause."""
    from cachd.pod.mount import Mount
    from cachd.pod.wait import wait_until_ready

    _end_at_sigterm()
    mount = Mount(cache)
    deadline = clock() + seconds
    for name in names:
        left = max(deadline - clock(), 0.0)
        wait_until_ready(mount, name, _patience(mount, name, left, unknown_seconds))
    from cachd.pod.ready import ready_model  # takes longer to load than all that the wait needs

    return [ready_model(cache.absolute(), name) for name in names]


def _patience(mount: Mount, name: str, seconds: float, unknown_seconds: float | None) -> Patience:
    from cachd.pod.wait import Patience

    unknown_seconds = seconds if unknown_seconds is None else unknown_seconds
    return Patience(mount, name, seconds=seconds, unknown_seconds=unknown_seconds, report=_report)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _end_at_sigterm() -> None:
    """End at SIGTERM. Process 1 of a container gets only signals that it handles (pid_namespaces(7))."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
