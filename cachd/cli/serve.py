"""The command that runs the daemon."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from cachd.cli.arguments import ConfigFile, Root

commands = typer.Typer()


@commands.command(epilog="Example: cachd serve --root /var/lib/cachd --config /etc/cachd/config.yaml")
def serve(
    root: Root = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(help="address of the API: HOST:PORT or unix:/PATH; repeatable; default: CACHD_LISTEN"),
    ] = None,
    config_file: ConfigFile = None,
    *,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait",
            help="while another daemon has the root: wait until it ends, or end with exit code 9",
        ),
    ] = True,
) -> None:
    """Run the daemon. `cachd options` lists every option for the file and the environment."""
    gc.disable()  # imports make no garbage, and collections would take a tenth of the start
    from cachd.api.load import load_libraries

    load_libraries()
    from cachd.daemon import serve as daemon  # its libraries take longer to load than most commands to run
    from cachd.daemon.last_good import read_or_last_good

    gc.freeze()
    gc.enable()
    daemon.serve(read_or_last_good(root=root, listen=listen or None, config=config_file), waits=wait)
