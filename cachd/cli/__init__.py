"""The command line: it parses arguments, makes one call and prints the answer.

`serve`, `pull --direct`, `hold` and the commands with `--cache` work in this process. All others ask the
daemon over its API. Results go to standard output, everything else to standard error.

Most commands take less time than their libraries take to load. So each command imports what only it needs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cachd import __version__, terminal
from cachd.cli import check_config, doctor, models, pods, pull, serve, settings, space
from cachd.cli.ask import use_tls_files
from cachd.cli.exits import EXIT_CODES, exit_code
from cachd.errors import CachdError

app = typer.Typer(
    name="cachd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Node-local model cache: pull once, verify every byte, serve every pod.",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)
for group in (serve, pull, models, pods, space, settings, check_config, doctor):
    app.add_typer(group.commands)


@app.callback()
def tls(
    ca_file: Annotated[
        Path | None,
        typer.Option(
            envvar="CACHD_API_CA_FILE",
            help="PEM file of the certificate authorities to trust for an https:// daemon",
        ),
    ] = None,
    cert_file: Annotated[
        Path | None,
        typer.Option(envvar="CACHD_API_CERT_FILE", help="PEM file of the client certificate to present"),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(envvar="CACHD_API_KEY_FILE", help="PEM file of its private key; default: --cert-file"),
    ] = None,
) -> None:
    """Node-local model cache: pull once, verify every byte, serve every pod."""
    use_tls_files(ca_file, cert_file, key_file)


@app.command(epilog="Example: cachd version")
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command line. An error becomes lines on standard error and an exit code."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the search takes 20 ms
    try:
        app()
    except CachdError as error:
        terminal.show_error(error)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)
