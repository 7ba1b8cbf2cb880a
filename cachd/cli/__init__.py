"""The command line: it parses arguments, makes one call and prints the answer.

`serve`, `pull --direct`, `hold` and the commands with `--cache` work in this process. All others ask the
daemon over its API. Results go to standard output, everything else to standard error.

Most commands take less time than their libraries take to load. So the module of a command is imported when
the command runs (commands.py), and each command imports what only it needs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cachd import __version__
from cachd.cli.ask import use_tls_files
from cachd.cli.commands import Commands
from cachd.cli.exits import EXIT_CODES
from cachd.cli.failures import report, report_usage
from cachd.errors import CachdError

app = typer.Typer(
    name="cachd",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Node-local model cache: pull once, verify every byte, serve every pod.",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)


def _print_version(is_wanted: bool) -> None:  # noqa: FBT001 typer calls it
    if is_wanted:
        print(__version__)
        raise typer.Exit


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
    _version: Annotated[  # noqa: FBT002 an option
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Node-local model cache: pull once, verify every byte, serve every pod."""
    use_tls_files(ca_file, cert_file, key_file)


@app.command(epilog="Example: cachd version", rich_help_panel="The node")
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command line. An error becomes lines on standard error, or JSON, and an exit code."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the search takes 20 ms
    try:
        sys.exit(app(standalone_mode=False, prog_name="cachd"))
    except CachdError as error:
        sys.exit(report(error))
    except typer.TyperException as error:
        sys.exit(report_usage(error))
    except KeyboardInterrupt:
        sys.exit(130)
