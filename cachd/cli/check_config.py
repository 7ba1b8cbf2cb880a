"""The command that checks a configuration file without a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cachd import terminal
from cachd.cli.answers import show
from cachd.cli.arguments import Form, Output

commands = typer.Typer()

File = Annotated[
    Path,
    typer.Argument(
        readable=False,
        envvar="CACHD_CONFIG",
        help="YAML file with options, as `cachd serve --config` takes it",
    ),
]


@commands.command("check-config", epilog="Example: cachd check-config /etc/cachd/config.yaml")
def check_config(
    file: File,
    *,
    files: Annotated[
        bool,
        typer.Option(
            "--files/--no-files",
            help="read the certificates that options name, too; --no-files: where they are not mounted",
        ),
    ] = True,
    output: Form = Output.text,
) -> None:
    """Check a configuration file, together with the CACHD_… variables that are set here.

    Prints everything that is wrong at once, each with its file, line and key. Exit code 1 if anything is
    wrong, else 0. It asks no daemon, no network and no cache, and reads no secret. So an init container can
    run it with the ConfigMap alone.
    """
    document = _document(file, files=files)
    show(document, output, lambda: _say(document))
    raise typer.Exit(0 if document["ok"] else 1)


def _document(file: Path, *, files: bool) -> dict[str, Any]:
    from cachd import config  # its libraries take longer to load than most commands to run
    from cachd.doctor.options import CERTIFICATE_FILES, wrong_options
    from cachd.settings.given import unknown_variables

    examined = config.examine(config=file)
    wrong = [each for each in wrong_options(examined) if files or each.key not in CERTIFICATE_FILES]
    return {
        "file": str(file),
        "ok": not wrong,
        "findings": [
            {
                "where": str(each.place),
                "line": each.place.line or None,
                "key": each.key or None,
                "reason": each.reason,
            }
            for each in wrong
        ],
        "more": examined.more,
        "warnings": unknown_variables(config.Config.model_fields),
    }


def _say(document: dict[str, Any]) -> None:
    """Print a line for each finding, as compilers do: FILE:LINE: KEY: REASON."""
    for each in document["findings"]:
        terminal.say_indented(": ".join(filter(None, (each["where"], each["key"], each["reason"]))))
    if document["more"]:
        terminal.say(f"and {document['more']} more")
    for sentence in document["warnings"]:
        terminal.warn(f"warning: {sentence}", style="yellow")
    if document["ok"]:
        terminal.say(f"{document['file']}: ok")
