"""The command that packs what a bug report needs."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachd import __version__, terminal
from cachd.cli.answers import note
from cachd.cli.arguments import SERVER, Output, Server, TokenFile
from cachd.cli.ask import ask, tls_variables
from cachd.errors import CachdError, Invalid, Unreachable
from cachd.files import reason
from cachd.model.units import count_text

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()

_DOCTOR_SECONDS = 120.0
_LONGEST_LOG, _PIECE_BYTES = 8 << 20, 1 << 20
_ANSWERS = {
    "options.json": "/v1/options",
    "sources.json": "/v1/sources",
    "events.json": "/v1/events?follow=false",
    "capacity.json": "/v1/capacity",
    "evictions.json": "/v1/evictions",
    "limits.json": "/v1/limits",
    "scrubs.json": "/v1/scrubs",
    "livez.json": "/livez",
    "readyz.json": "/readyz?set=required",
}
# What may be a secret, wherever it stands. What the group `kept` matches stays.
_NAMES = r"password|passwd|secret|token|api_?key|access_?key(?:_id)?"
_SECRETS = [
    re.compile(pattern)
    for pattern in (
        r"(?P<kept>://)[^/\s\"'@]+@",  # user and password of a URL
        r"(?P<kept>\b[a-z][a-z0-9+.-]*://[^\s\"'?]+\?)[^\s\"']+",  # the query of a URL
        r"(?P<kept>\b(?i:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}",
        r"(?P<kept>)\b(?:hf|gh[pousr]|glpat|xox[abp])[_-][A-Za-z0-9]{16,}",
        r"(?P<kept>)\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
        rf"(?P<kept>(?i:{_NAMES})[\"']?\s*[:=]\s*[\"']?)[^\s\"',}}]+",
        r"(?P<kept>-----BEGIN [A-Z ]*PRIVATE KEY-----)[^-]*",
    )
]
_GONE = r"\g<kept>[removed]"


@commands.command(epilog="Example: cachd bundle; journalctl -u cachd | cachd bundle --log - report.tar.gz")
def bundle(
    file: Annotated[
        Path | None,
        typer.Argument(help="file to write, or - for standard output; default: cachd-bundle-TIME.tar.gz"),
    ] = None,
    *,
    log: Annotated[
        Path | None,
        typer.Option(help="log of the daemon to add, or - for standard input; its last 8 MB are kept"),
    ] = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
) -> None:
    """Pack what a bug report needs: versions, options, models, space, metrics, doctor's findings and a log.

    Secrets are removed: no token, no password and no query of a URL is in it. Names of models, paths and
    addresses stay. Without an admin's token it lacks the options. It also packs what it can when the daemon
    does not answer.
    """
    moment = _moment()
    target = file or Path(f"cachd-bundle-{moment:%Y%m%dT%H%M%SZ}.tar.gz")
    logged = {} if log is None else {"log.txt": _last_part(log)}
    texts = {"bundle.json": _json(_about(moment)), **_of_daemon(server, token_file), **logged}
    texts["doctor.json"] = _doctor(server, token_file)
    packed = _packed({name: redacted(text) for name, text in texts.items()}, moment)
    if str(target) == "-":
        sys.stdout.buffer.write(packed)
        sys.stdout.flush()
        return
    try:
        target.write_bytes(packed)
    except OSError as error:
        raise Invalid(
            f"{target} cannot be written: {reason(error)}",
            code="bad_file",
            hint="name a file that can be written, or - for standard output",
        ) from error
    note(Output.text, f"it has {count_text(len(texts), 'file')}: read them before you publish it")
    terminal.say(target)


def redacted(text: str) -> str:
    """The text without what may be a secret."""
    for pattern in _SECRETS:
        text = pattern.sub(_GONE, text)
    return text


def _moment(clock: Callable[[], float] = time.time) -> datetime:
    return datetime.fromtimestamp(clock(), UTC)


def _about(moment: datetime) -> dict[str, object]:
    """The machine as this process sees it."""
    return {
        "made_at": moment.isoformat(timespec="seconds"),
        "cachd": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "") if _has_os_release() else "",
    }


def _has_os_release() -> bool:
    return any(Path(path).exists() for path in ("/etc/os-release", "/usr/lib/os-release"))


def _of_daemon(server: str | None, token_file: Path | None) -> dict[str, str]:
    """What the daemon answers, by the name of the file; where it refuses, the error."""

    async def answers(client: Client) -> dict[str, str]:
        found = {name: await _answer(client.get(path)) for name, path in _ANSWERS.items()}
        found["models.json"] = await _answer(client.models())
        found["metrics.txt"] = await _answer(client.text("/metrics"))
        return found

    try:
        return ask(server, token_file, answers)
    except CachdError as error:
        return {"unreachable.json": _json(error.as_document())}


async def _answer(call: Awaitable[object]) -> str:
    """An answer, or its error, as text. Raises Unreachable."""
    try:
        found = await call
    except Unreachable:
        raise
    except CachdError as error:
        found = error.as_document()
    return found if isinstance(found, str) else _json(found)


def _doctor(server: str | None, token_file: Path | None) -> str:
    """What `cachd doctor -o json` prints. In a process of its own, because it may become another user."""
    given = {"CACHD_URL": server, "CACHD_TOKEN_FILE": token_file, **tls_variables()}
    env = {**os.environ, **{name: str(value) for name, value in given.items() if value}}
    command = [sys.executable, "-m", "cachd", "doctor", "-o", "json"]
    try:
        ended = subprocess.run(  # noqa: S603 it is this program
            command, env=env, capture_output=True, text=True, timeout=_DOCTOR_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _json({"error": str(error)})
    return ended.stdout or ended.stderr


def _last_part(log: Path) -> str:
    """The end of a log. Raises Invalid."""
    try:
        with sys.stdin.buffer if str(log) == "-" else log.open("rb") as opened:
            end = b""
            while piece := opened.read(_PIECE_BYTES):
                end = (end + piece)[-_LONGEST_LOG:]
    except OSError as error:
        raise Invalid(f"{log} cannot be read: {reason(error)}", code="bad_file") from error
    return end.decode(errors="replace")


def _packed(texts: Mapping[str, str], made_at: datetime) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"cachd-bundle/{name}")
            content = text.encode(errors="replace")
            member.size, member.mtime, member.mode = len(content), int(made_at.timestamp()), 0o644
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _json(document: object) -> str:
    return json.dumps(document, indent=1, default=str)
