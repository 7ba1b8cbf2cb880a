"""Defines the arguments that several commands take, once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Output(StrEnum):
    """The forms of an answer: for people, the API's document, or names alone."""

    text = "text"
    json = "json"
    name = "name"


def _seconds(value: str | float) -> float:
    from cachd.model import seconds_of

    try:
        return seconds_of(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


SERVER = "http://127.0.0.1:8470"
DAY = 86400.0

Server = Annotated[
    str,
    typer.Option(
        "--url",
        "--server",
        envvar=["CACHD_URL", "CACHD_SERVER"],
        help="address of the daemon: http://HOST:PORT, https://HOST:PORT or unix:/PATH",
        show_default=True,
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="CACHD_TOKEN_FILE", help="file with the bearer token; default: the token in CACHD_TOKEN"
    ),
]
Form = Annotated[Output, typer.Option("--output", "-o", help="output format")]
# No envvar here: config.read reads these variables itself, to know that the environment set the option.
Root = Annotated[Path | None, typer.Option(readable=False, help="cache directory; default: CACHD_ROOT")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", readable=False, help="YAML file with options; default: CACHD_CONFIG"),
]
Timeout = Annotated[
    float,
    typer.Option(parser=_seconds, metavar="TIME", help="longest time to wait, such as 90s or 1h30m"),
]
UnknownTimeout = Annotated[
    float | None,
    typer.Option(
        parser=_seconds,
        metavar="TIME",
        help="longest time to wait while no daemon of this node knows the model; default: --timeout",
    ),
]
Deadline = Annotated[
    float,
    typer.Option(parser=_seconds, metavar="TIME", help="longest time to wait for an answer of each server"),
]
