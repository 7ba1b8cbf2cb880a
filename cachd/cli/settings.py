"""The commands about what is in force: options, entries of `sources`, and bandwidth limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer

from cachd import errors, terminal
from cachd.cli.answers import show
from cachd.cli.arguments import SERVER, ConfigFile, Form, Output, Server, TokenFile
from cachd.cli.ask import ask
from cachd.cli.exits import EXIT_BY_ERROR
from cachd.terminal import settings as printed

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()


@commands.command(epilog="Example: cachd limit 500MB; cachd limit 200MB --source hf; cachd limit none")
def limit(
    rate: Annotated[
        str | None,
        typer.Argument(help="bytes a second, such as 500MB, or none for no limit; default: only show"),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="limit one source: hf, ms, s3, https, http or file; default: all together"),
    ] = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Show or set the bandwidth limits of all pulls, including running ones.

    A limit stays in force until the daemon restarts or the limits in its configuration file change.
    """
    document = ask(server, token_file, lambda client: _limited(client, rate, source))
    rows = printed.limit_rows(document)
    show(document, output, lambda: terminal.show_table(("SOURCE", "LIMIT"), rows))


@commands.command(epilog="Example: cachd options --effective --config /etc/cachd/config.yaml")
def options(
    *,
    effective: Annotated[
        bool, typer.Option("--effective", help="show the values in force, and where each was set")
    ] = False,
    config_file: ConfigFile = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--url",
            "--server",
            envvar=["CACHD_URL", "CACHD_SERVER"],
            help="with --effective: show the values of this daemon",
        ),
    ] = None,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """List every option of the daemon: its key in the file, its environment variable, default and meaning.

    With --effective, show the options of a daemon that would start here and now: the value of each, and the
    flag, variable or line of the file that set it. A running daemon may have another environment: --server
    shows its values.
    """
    from cachd import config

    if effective:
        there = server and ask(server, token_file, lambda client: client.get("/v1/options"))
        in_force = there or _options_here(config_file)
        show(in_force, output, lambda: printed.show_options(in_force))
        return
    rows = list(config.table())
    headings = ("key", "env", "default", "help")
    document = {"options": [dict(zip(headings, row, strict=True)) for row in rows]}
    show(document, output, lambda: terminal.show_table(("KEY", "ENV", "DEFAULT", "MEANING"), rows))


@commands.command(epilog="Example: cachd sources org/model")
def sources(
    ref: Annotated[
        str | None, typer.Argument(help="a ref in any form that cachd pull takes; default: show every entry")
    ] = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Show whether a ref may be pulled, and the settings of `sources` that apply to it.

    Exit code 5 if it may not. Without a ref, show every entry of `sources`.
    """
    path = "/v1/sources" + (f"?{urlencode({'ref': ref})}" if ref else "")
    found = ask(server, token_file, lambda client: client.get(path))
    show(found, output, lambda: printed.show_sources(found))
    if found.get("verdict") == "refused":
        raise typer.Exit(EXIT_BY_ERROR[errors.Forbidden])


async def _limited(client: Client, rate: str | None, source: str | None) -> dict[str, Any]:
    """The limits in force, after `rate` was set. Without a rate, nothing is set."""
    limits = await client.limits()
    if rate is None:
        return limits
    limit = None if rate == "none" else rate
    if source is None:
        return await client.set_limits({**limits, "bytes_per_second": limit})
    return await client.set_limits({**limits, "sources": {**limits["sources"], source: limit}})


def _options_here(config_file: Path | None) -> dict[str, Any]:
    """The options with which a daemon would start here. Unknown variables are reported on standard error."""
    from cachd import config
    from cachd.effective import effective
    from cachd.settings.given import unknown_variables

    for unknown in unknown_variables(config.Config.model_fields):
        terminal.warn(unknown)
    try:
        loaded = config.read(config=config_file)
    except errors.Invalid as error:
        more = "cachd options --effective --url URL shows what a running daemon uses"
        raise errors.Invalid(
            error.detail, code=error.code, hint=f"{error.hint}; {more}" if error.hint else more
        ) from error
    return {"options": [option.as_document() for option in effective(loaded)]}
