"""Defines the arguments that several commands take, once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cachd.cli.completion import complete_names


class Output(StrEnum):
    """The forms of an answer: for people, the API's document, or names alone."""

    text = "text"
    wide = "wide"
    json = "json"
    yaml = "yaml"
    name = "name"


def _seconds(value: str | float) -> float:
    from cachd.model import seconds_of

    try:
        return seconds_of(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


DAY = 86400.0
SERVER: str | None = None  # the daemon of this node


def server_option(says: str) -> Any:
    """The option --url, whose help is `says`."""
    return typer.Option("--url", "--server", envvar=["CACHD_URL", "CACHD_SERVER"], help=says)


Server = Annotated[
    str | None,
    server_option(
        "address of the daemon: http://HOST:PORT, https://HOST:PORT or unix:/PATH; default: the daemon of"
        " this node, where CACHD_LISTEN or the file CACHD_CONFIG (/etc/cachd/config.yaml) says it listens"
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="CACHD_TOKEN_FILE",
        help="file with the bearer token, or a token_file of the daemon; default: the token in CACHD_TOKEN,"
        " else one from the token_file of this node's daemon, if this user may read it",
    ),
]
Form = Annotated[Output, typer.Option("--output", "-o", help="output format; wide shows more columns")]
Name = Annotated[str, typer.Argument(autocompletion=complete_names, help="name of a model")]
Names = Annotated[list[str], typer.Argument(autocompletion=complete_names, help="names of models")]
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
        help="with --cache: longest time to wait while no daemon of this node knows the model; default:"
        " --timeout. Without --cache, an unknown model ends the wait at once",
    ),
]
Deadline = Annotated[
    float,
    typer.Option(parser=_seconds, metavar="TIME", help="longest time to wait for an answer of each server"),
]
LeaseTime = Annotated[
    float,
    typer.Option(
        "--seconds", parser=_seconds, metavar="TIME", help="how long it lasts from now, such as 10m"
    ),
]

# --- what selects files of a source ---

Ref = Annotated[
    str,
    typer.Argument(
        # A backslash keeps rich from reading brackets as markup.
        help="a model of the Hub as org/model, hf://org/model\\[@rev], org/model/file or an address on"
        " huggingface.co; or s3://bucket/prefix/, https://host/file, https://host/dir/, file:///path"
    ),
]
Files = Annotated[
    list[str] | None,
    typer.Argument(help="files to pull, or patterns such as '*.safetensors'; the same as --include"),
]
RefName = Annotated[str | None, typer.Option("--name", help="local name; default: derived from the ref")]
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
Formats = Annotated[
    str | None,
    typer.Option(
        help="safe: leave out Python pickles that have safetensors beside them, and refuse other pickles"
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="with --direct: private network or URL prefix that sources may reach; repeatable"),
]
