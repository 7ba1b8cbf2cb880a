"""The command line: it parses arguments, makes one call and prints the answer.

`serve`, `pull --direct`, `hold` and the commands with `--cache` work in this process. All others ask the
daemon over its API. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlencode

import typer
from rich.filesize import decimal

from cachd import __version__, errors, files, terminal
from cachd.errors import CachdError, Invalid, Unreachable, error_of

if TYPE_CHECKING:
    from cachd.client import Client
    from cachd.pod import Mount, Patience

T = TypeVar("T")


EXIT_CODES = {
    0: "done",
    1: "any other failure",
    2: "wrong command line, option or ref",
    3: "model, revision or file not found",
    4: "not ready in time",
    5: "refused: token, permission or policy",
    6: "no daemon answers",
    7: "no space",
    8: "bytes do not match their digest",
    9: "in use, pinned or busy",
    10: "the source is unavailable or breaks its protocol",
    11: "model not known on this node",
    130: "interrupted",
}
EXIT_BY_ERROR: dict[type, int] = {
    errors.Invalid: 2,
    errors.NotFound: 3,
    errors.NotKnown: 11,
    errors.WaitTimeout: 4,
    errors.Forbidden: 5,
    errors.Unreachable: 6,
    errors.NoSpace: 7,
    errors.TooBig: 7,
    errors.Corrupt: 8,
    errors.InUse: 9,
    errors.Leased: 9,
    errors.Changed: 10,
    errors.Unavailable: 10,
}
_POLL_SECONDS = 0.3
_LONGEST_TOKEN_BYTES = 64 << 10

app = typer.Typer(
    name="cachd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Node-local model cache: pull once, verify every byte, serve every pod.",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)


class Output(StrEnum):
    text = "text"
    json = "json"
    name = "name"


def _seconds(value: str | float) -> float:
    from cachd.model import seconds_of

    try:
        return seconds_of(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


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
ROOT = Annotated[Path | None, typer.Option(help="cache directory; default: CACHD_ROOT")]
CONFIG = Annotated[
    Path | None, typer.Option("--config", help="YAML file with options; default: CACHD_CONFIG")
]
CACHE = Annotated[
    Path | None,
    typer.Option(envvar="CACHD_CACHE", help="read the cache mounted here, and ask no daemon"),
]
Timeout = Annotated[
    float, typer.Option(parser=_seconds, metavar="TIME", help="longest time to wait, such as 90s or 1h30m")
]
UnknownTimeout = Annotated[
    float | None,
    typer.Option(
        parser=_seconds,
        metavar="TIME",
        help="longest time to wait while no daemon of this node knows the model; default: --timeout",
    ),
]
SERVER = "http://127.0.0.1:8470"


_trust: dict[str, Path | None] = {}


@app.callback()
def trust(
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
    _trust.update(ca_file=ca_file, cert_file=cert_file, key_file=key_file)


@app.command(epilog="Example: cachd serve --root /var/lib/cachd --config /etc/cachd/config.yaml")
def serve(
    root: ROOT = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(help="address of the API: HOST:PORT or unix:/PATH; repeatable; default: CACHD_LISTEN"),
    ] = None,
    config_file: CONFIG = None,
) -> None:
    """Run the daemon. `cachd options` lists every option for the file and the environment."""
    gc.disable()  # imports make no garbage, and collections would take a tenth of the start
    from cachd import config, daemon  # their libraries take longer to load than most commands to run

    gc.freeze()
    gc.enable()
    daemon.serve(config.read(root=root, listen=listen or None, config=config_file))


@app.command(epilog="Example: cachd pull org/model@main --wait")
def pull(
    ref: Annotated[
        str,
        typer.Argument(
            help="a model of the Hub as org/model, org/model@revision, org/model/file or an address on"
            " huggingface.co; or s3://bucket/prefix/, https://host/file, https://host/dir/, file:///path"
        ),
    ],
    name: Annotated[str | None, typer.Option(help="local name; default: derived from the ref")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="pattern of the files to pull; repeatable; default: all")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="pattern of the files to leave out; repeatable")
    ] = None,
    hub_id: Annotated[
        str | None,
        typer.Option(help="Hub repository org/model under which a mirror of it appears in the Hub view"),
    ] = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="pin the model: it is never evicted, and `cachd rm` needs --force")
    ] = False,
    priority: Annotated[
        int, typer.Option(min=-100, max=100, help="higher priorities are pulled first and evicted last")
    ] = 0,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="resolve the ref again even if the model is ready")
    ] = False,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="take over the name even if it is another model's, or pinned"),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="wait until the model is ready")] = False,
    timeout: Timeout = 86400.0,
    direct: Annotated[bool, typer.Option("--direct", help="pull in this process, without a daemon")] = False,
    root: ROOT = None,
    config_file: CONFIG = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="with --direct: private network or URL prefix that sources may reach; repeatable"),
    ] = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Pull a model. The last line printed is its path.

    This is the model's directory; with --wait or --direct, and a model of one file, it is the file.
    """
    asked = {
        "ref": ref,
        "name": name,
        "include": include or [],
        "exclude": exclude or [],
        "hub_id": hub_id,
        "pin": pin,
        "priority": priority,
        "refresh": refresh,
        "replace": replace,
    }
    if direct:
        from cachd import config
        from cachd.direct import pull_here

        document = pull_here(asked, config.load(root=root, config=config_file, allow=allow), timeout)
    else:
        document = _ask(server, token_file, lambda client: _pull_there(client, asked, wait, timeout))
    path = _file_or_directory(document) if wait or direct else document["path"]
    _print(document, output, lambda: terminal.say(path))


@app.command("ls", epilog="Example: cachd ls -o json")
def list_models(server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text) -> None:
    """List the models of this node."""
    found = _ask(server, token_file, lambda client: client.models())
    if output is Output.name:
        for model in found:
            terminal.say(model["name"])
        return
    rows = [terminal.model_row(model) for model in found]
    _print({"models": found}, output, lambda: terminal.show_table(terminal.MODEL_HEADINGS, rows))


@app.command(epilog="Example: cachd show org--model")
def show(
    name: str, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Show one model: state, path, revision, size, progress, errors, and what protects it."""
    document = _ask(server, token_file, lambda client: client.model(name))
    _print(document, output, lambda: terminal.show_model(document))


@app.command(epilog="Example: cachd wait org--model --timeout 600; cachd wait org--model --cache /cache")
def wait(
    name: str,
    timeout: Timeout = 86400.0,
    cache: CACHE = None,
    unknown_timeout: UnknownTimeout = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Wait until a model is ready, and show its progress. The last line printed is what `cachd path` prints.

    With --cache it needs only the mounted cache, as in a pod.
    """
    if cache is not None:
        from cachd import mount as mounted
        from cachd import pod

        _end_at_sigterm()
        mount = pod.Mount(cache)
        pod.wait(mount, name, _patience(mount, name, timeout, unknown_timeout))
        model = mounted.ready_model(cache.absolute(), name)
        _print(model, output, lambda: terminal.say(_file_or_directory(model)))
        return
    document = _ask(server, token_file, lambda client: _follow(client, name, timeout, _is_ready))
    _print(document, output, lambda: terminal.say(_file_or_directory(document)))


@app.command("path", epilog="Example: cachd path org--model; llama-server -m $(cachd path org--model)")
def print_path(
    name: str,
    file: Annotated[bool, typer.Option("--file", help="fail if the model has more than one file")] = False,
    cache: CACHE = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Print the path of a ready model: its file if it has just one, else its directory.

    A GGUF that is split into shards counts as one file: its first shard, which is what engines take.
    """
    if cache:
        from cachd.mount import ready_model

        document = ready_model(cache, name)
    else:
        document = _ask(server, token_file, lambda client: _ready_there(client, name))
    if file and not document["file"]:
        raise errors.NotFound(
            f"{name} has several files", code="several_files", hint=f"its directory is {document['path']}"
        )
    _print(document, output, lambda: terminal.say(_file_or_directory(document)))


@app.command(epilog="Example: cachd hold org--model --link /model -- vllm serve /model/org--model")
def hold(
    name: str,
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
    timeout: Timeout = 86400.0,
    unknown_timeout: UnknownTimeout = None,
) -> None:
    """Protect one snapshot of a model for as long as the pod lives, and make LINK/NAME a link to it.

    It needs only the mounted cache. When it starts again, it holds the same snapshot.
    """
    from cachd import pod

    _end_at_sigterm()
    mount = pod.Mount(cache)
    holder = pod.Holder(mount, name, link, tell=_tell)
    holder.become(holder.hold(_patience(mount, name, timeout, unknown_timeout)), command or [])


@app.command(epilog="Example: cachd pin org--model")
def pin(name: str, server: Server = SERVER, token_file: TokenFile = None) -> None:
    """Pin a model: it is not evicted, and `cachd rm` refuses to delete it without --force."""
    _ask(server, token_file, lambda client: client.pin(name))


@app.command(epilog="Example: cachd unpin org--model")
def unpin(name: str, server: Server = SERVER, token_file: TokenFile = None) -> None:
    """Unpin a model: it may be evicted and deleted again."""
    _ask(server, token_file, lambda client: client.unpin(name))


@app.command(epilog="Example: cachd rm org--model")
def rm(
    name: str,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="delete the model even if it is pinned, in use or listed in the configuration"
        ),
    ] = False,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Delete a model: cancel its pull, unpublish it and free its disk space."""
    document = _ask(server, token_file, lambda client: client.delete(name, force=force))
    text = f"{name}: {decimal(document['freed_bytes'])} freed"
    if document["configured"]:
        text += "; the configuration lists it, so it comes back at the next start or change of the file"
    _print(document, output, lambda: terminal.say(text))


@app.command(epilog="Example: cachd limit 500MB; cachd limit 200MB --source hf; cachd limit none")
def limit(
    rate: Annotated[
        str | None,
        typer.Argument(help="bytes a second, such as 500MB, or none for no limit; default: only show"),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="limit one source: hf, s3, https, http or file; default: all together"),
    ] = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Show or set the bandwidth limits of all pulls, including running ones.

    A limit stays in force until the daemon restarts or the limits in its configuration file change.
    """
    document = _ask(server, token_file, lambda client: _limit_there(client, rate, source))
    rows = terminal.limit_rows(document)
    _print(document, output, lambda: terminal.show_table(("SOURCE", "LIMIT"), rows))


@app.command(epilog="Example: cachd rollback org--model")
def rollback(
    name: str, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Point a name back to its previous snapshot, at once. The last line printed is the path."""
    document = _ask(server, token_file, lambda client: client.rollback(name))
    text = (
        f"{name} {document['ready']['ref']} {document['ready']['revision']}\n{_file_or_directory(document)}"
    )
    _print(document, output, lambda: terminal.say(text))


@app.command(epilog="Example: cachd verify org--model -o json")
def verify(
    name: str, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Re-read and verify every byte of a model. Exit code 8 if a file is damaged.

    A damaged model is no longer ready, and the daemon repairs it at once: `cachd wait` waits for that.
    """
    document = _ask(server, token_file, lambda client: _verify_there(client, name))
    _print({"name": name, **document}, output, lambda: terminal.show_verification(name, document))
    if document["state"] != "intact":
        raise typer.Exit(8 if document["state"] == "damaged" else 1)


@app.command(epilog="Example: cachd warm org--model")
def warm(
    name: str, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Read a model into free memory, so that the next pod loads it from there."""
    document = _ask(server, token_file, lambda client: _warm_there(client, name))
    loaded, total = document["bytes"]["loaded"], document["bytes"]["total"]
    text = f"{name} {document['state']}: {decimal(loaded)} of {decimal(total)} read"
    _print({"name": name, **document}, output, lambda: terminal.say(text))


@app.command(epilog="Example: cachd sweep --dry-run")
def sweep(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what would be removed, and remove nothing")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option("--everything", help="also remove what ended pulls left within keep_unfinished_seconds"),
    ] = False,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Remove what no model and no pull needs: replaced snapshots, unused blobs and partial downloads."""
    asked = {"dry_run": dry_run, "everything": everything}
    document = _ask(server, token_file, lambda client: client.sweep(asked))
    rows = [(each["kind"], each["name"], decimal(each["freed_bytes"])) for each in document["swept"]]
    _print(document, output, lambda: terminal.show_table(("KIND", "NAME", "FREED"), rows))


@app.command(epilog="Example: cachd capacity -o json")
def capacity(server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text) -> None:
    """Show the disk space that models use and may use, and each snapshot with its size and protection."""
    document = _ask(server, token_file, lambda client: client.get("/v1/capacity"))
    _print(document, output, lambda: terminal.show_capacity(document))


@app.command(epilog="Example: cachd evict 40GB --dry-run; cachd evict hf://org/model")
def evict(
    space: Annotated[
        str,
        typer.Argument(
            help="bytes that must be available, such as 40GB, or the ref of a model that must fit"
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what would be evicted and why, and evict nothing")
    ] = False,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Evict the models with the lowest score until the given space is available. `cachd gc` is the same."""
    asked = {"bytes" if _is_size(space) else "ref": space}
    document = _ask(server, token_file, lambda client: client.make_space(asked, dry_run=dry_run))
    _print(document, output, lambda: terminal.show_evictions(document))


def _is_size(space: str) -> bool:
    """Whether it is a size and not a ref: the owner of a model may begin with a digit, too."""
    return space.strip()[:1].isdigit() and "/" not in space


app.command("gc", epilog="Example: cachd gc 40GB --dry-run")(evict)


@app.command(epilog="Example: cachd evictions")
def evictions(server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text) -> None:
    """List the evictions since the daemon started, the newest first, with the reason of each."""
    document = _ask(server, token_file, lambda client: client.get("/v1/evictions"))
    _print(document, output, lambda: terminal.show_evictions(document))


@app.command(epilog="Example: cachd doctor")
def doctor(server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text) -> None:
    """Check the daemon, its disk and its models, and report every problem. Exit code 1 if there is one."""
    findings = _ask(server, token_file, _examine)
    wrong = [f for f in findings if not f["ok"]]

    def text() -> None:
        for finding in findings:
            terminal.say(f"{'ok  ' if finding['ok'] else 'FAIL'} {finding['what']}")

    _print({"findings": findings}, output, text)
    raise typer.Exit(1 if wrong else 0)


@app.command(epilog="Example: cachd options --effective --config /etc/cachd/config.yaml")
def options(
    effective: Annotated[
        bool, typer.Option("--effective", help="show the values in force, and where each was set")
    ] = False,
    config_file: CONFIG = None,
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
        there = server and _ask(server, token_file, lambda client: client.get("/v1/options"))
        in_force = there or _options_here(config_file)
        _print(in_force, output, lambda: terminal.show_options(in_force))
        return
    rows = list(config.table())
    headings = ("key", "env", "default", "help")
    document = {"options": [dict(zip(headings, row, strict=True)) for row in rows]}
    _print(document, output, lambda: terminal.show_table(("KEY", "ENV", "DEFAULT", "MEANING"), rows))


@app.command(epilog="Example: cachd sources org/model")
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
    found = _ask(server, token_file, lambda client: client.get(path))
    _print(found, output, lambda: terminal.show_sources(found))
    if found.get("verdict") == "refused":
        raise typer.Exit(EXIT_BY_ERROR[errors.Forbidden])


@app.command(epilog="Example: cachd version")
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command line. An error becomes lines on standard error and an exit code."""
    try:
        app()
    except CachdError as error:
        terminal.show_error(error)
        sys.exit(_exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _exit_code(error: CachdError) -> int:
    return next((EXIT_BY_ERROR[kind] for kind in type(error).__mro__ if kind in EXIT_BY_ERROR), 1)


def _patience(mount: Mount, name: str, seconds: float, unknown_seconds: float | None) -> Patience:
    from cachd.pod import Patience

    unknown_seconds = seconds if unknown_seconds is None else unknown_seconds
    return Patience(mount, name, seconds=seconds, unknown_seconds=unknown_seconds, tell=_tell)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _end_at_sigterm() -> None:
    """End at SIGTERM. Process 1 of a container gets only signals that it handles (pid_namespaces(7))."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _ask(server: str, token_file: Path | None, call: Callable[[Client], Awaitable[T]]) -> T:
    """What `call` returns, given a client of the daemon. Raises CachdError."""
    from cachd.client import Client  # imports aiohttp, which takes as long as all other imports here

    try:
        token = _token_in(token_file) if token_file else os.environ.get("CACHD_TOKEN")
    except OSError as error:
        raise Invalid(
            f"token file {token_file} cannot be read: {files.reason(error)}", code="bad_secret"
        ) from error

    if token and not (token.isascii() and token.isprintable()):
        raise Invalid(
            "the token contains characters that no token may have",
            code="bad_secret",
            hint="write the token on one line, in printable ASCII",
        )

    async def session() -> T:
        async with Client(server, token, **_trust) as client:
            return await call(client)

    return asyncio.run(session())


def _token_in(file: Path) -> str:
    """The token in the file, which may be a pipe: its first 64 KiB, without surrounding white space."""
    with file.open("rb") as opened:
        return opened.read(_LONGEST_TOKEN_BYTES).decode(errors="replace").strip()


def _options_here(config_file: Path | None) -> dict[str, Any]:
    from cachd import config
    from cachd.effective import effective
    from cachd.settings.given import unknown_variables

    for unknown in unknown_variables(config.Config.model_fields):
        terminal.stderr.print(unknown, markup=False, highlight=False, soft_wrap=True)
    return {"options": [option.as_document() for option in effective(config.read(config=config_file))]}


async def _pull_there(client: Client, asked: dict[str, Any], wait: bool, seconds: float) -> dict[str, Any]:
    document = await client.pull(asked)
    return await _follow(client, document["name"], seconds, _Pulled(document)) if wait else document


async def _ready_there(client: Client, name: str) -> dict[str, Any]:
    """The document of a ready model. Raises NotFound, or WaitTimeout when it is not ready."""
    document = await client.model(name)
    if not _is_ready(document):
        raise errors.WaitTimeout(
            f"{name} is {document['state']}", code="not_ready", hint=f"cachd wait {name}"
        )
    return document


async def _limit_there(client: Client, rate: str | None, source: str | None) -> dict[str, Any]:
    limits = await client.limits()
    if rate is None:
        return limits
    limit = None if rate == "none" else rate
    if source is None:
        return await client.set_limits({**limits, "bytes_per_second": limit})
    return await client.set_limits({**limits, "sources": {**limits["sources"], source: limit}})


async def _verify_there(client: Client, name: str) -> dict[str, Any]:
    return await _until_ended(client, name, "verification", await client.verify(name))


async def _warm_there(client: Client, name: str) -> dict[str, Any]:
    """The document of the warming once it has ended. Raises the error that it failed with."""
    warming = await _until_ended(client, name, "warming", await client.warm(name))
    if warming["error"]:
        raise error_of(warming["error"])
    return warming


async def _until_ended(client: Client, name: str, what: str, begun: Mapping[str, Any]) -> dict[str, Any]:
    """Show the progress of a job until it ends, and return its last document.

    `what` is the job's key in the model's document; `begun` is its first document.
    """
    job = dict(begun)
    with terminal.progress_bar(name) as update:
        while job["state"] == "running":
            update(what, job["bytes"]["done"], job["bytes"]["total"])
            await asyncio.sleep(_POLL_SECONDS)
            job = (await client.model(name))[what]
    return job


class _Pulled:
    """Tells whether the pull that this command asked for is done. A pull of another spec does not count."""

    def __init__(self, begun: Mapping[str, Any]) -> None:
        self._asked = _asked_of(begun["pull"])

    def __call__(self, model: Mapping[str, Any]) -> bool:
        """Raises the error that the pull failed with, or Cancelled when another pull replaced it."""
        pull = model["pull"]
        if pull is None:
            return True
        if self._asked and _asked_of(pull) != self._asked:
            raise errors.Cancelled(
                f"{model['name']}: a pull of {pull['ref']} replaced this one", code="replaced"
            )
        if pull["state"] in ("failed", "cancelled"):
            raise error_of(pull["error"])
        return bool(pull["state"] == "ready")


def _asked_of(pull: Mapping[str, Any] | None) -> list[Any]:
    return [pull[key] for key in ("ref", "include", "exclude")] if pull else []


def _is_ready(model: Mapping[str, Any]) -> bool:
    """Whether the name leads to a ready model. Raises the error of a pull that failed for good."""
    if model["final"]:
        raise error_of(model["pull"]["error"])
    return bool(model["state"] == "ready")


async def _follow(
    client: Client, name: str, seconds: float, is_done: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """Show the progress of a model until it is done. Raises what `is_done` raises, or WaitTimeout."""
    deadline = time.monotonic() + seconds
    with terminal.progress_bar(name) as update:
        while True:
            model = await client.model(name)
            if is_done(model):
                return model
            pull = model["pull"] or {"state": model["state"], "bytes": {"done": 0, "total": 0}, "error": None}
            progress = pull["bytes"]
            update(pull["state"], progress["done"], progress["total"])
            left = deadline - time.monotonic()
            if left <= 0:
                why = f" ({pull['error']['detail']})" if pull["error"] else ""
                raise errors.WaitTimeout(
                    f"{name} is {pull['state']} after {seconds:.0f} s:"
                    f" {progress['done']} of {progress['total']} bytes{why}",
                    hint="wait longer (--timeout); the pull continues",
                )
            await _pause(client, model, min(_POLL_SECONDS, left))


async def _pause(client: Client, model: Mapping[str, Any], seconds: float) -> None:
    """Wait `seconds`, or until the running pull ends."""
    if model["state"] in ("ready", "failed", "cancelled", "damaged", "refused"):
        await asyncio.sleep(seconds)
        return
    ended_at = time.monotonic() + seconds
    try:
        await client.ready(model["name"], wait=seconds)
    except CachdError as error:  # the model's next document has the reason
        if error.code == "not_ready":  # the daemon answers at once when too many clients wait already
            await asyncio.sleep(max(0.0, ended_at - time.monotonic()))


async def _examine(client: Client) -> list[dict[str, Any]]:
    """The findings about the daemon and its models, each with `ok` and the sentence `what`."""
    findings = []
    for path, what in (("/livez", "the daemon answers"), ("/readyz", "its disk is writable")):
        findings.append(await _finding(client, path, what))
    findings.append(await _finding(client, "/readyz?set=required", "every required model is ready"))
    capacity = await client.get("/v1/capacity")
    free, over = capacity["free_bytes"] - capacity["reserved_bytes"], capacity["over_bytes"]
    text = f"{decimal(free)} of {decimal(capacity['total_bytes'])} free"
    text += f", {decimal(over)} over limit_bytes or reserve_free" if over else ""
    findings.append({"ok": free > 0.05 * capacity["total_bytes"] and not over, "what": text})
    if capacity["in_use_reported_by"] != "kernel":
        text = "the kernel cannot report open files here: only pins and leases protect models"
        findings.append({"ok": False, "what": text})
    findings += await _in_force(client)
    views = capacity["views"]
    if views["unwatched"]:
        text = f"the kernel does not watch {views['unwatched']} directories of the views: {views['reason']};"
        text += " cachd finds files deleted there only after minutes"
        findings.append({"ok": False, "what": text})
    for model in await client.models():
        error = (model["pull"] or {}).get("error")
        if error:
            text = f"{model['name']}: {error['detail']} ({error['code']}) {error.get('hint', '')}".rstrip()
            findings.append({"ok": False, "what": text})
    return findings


async def _in_force(client: Client) -> list[dict[str, Any]]:
    """A finding for each reason why the configuration file is not in force. Only an admin may read them."""
    try:
        reasons = terminal.not_in_force((await client.get("/v1/options"))["file"])
    except errors.Forbidden:
        text = "its configuration was not checked: that needs an admin's token (--token-file)"
        return [{"ok": True, "what": text}]
    return [{"ok": False, "what": reason} for reason in reasons]


async def _finding(client: Client, path: str, what: str) -> dict[str, Any]:
    try:
        await client.get(path)
    except Unreachable:
        raise
    except CachdError as error:
        return {"ok": False, "what": f"{what}: no: {error.detail}"}
    return {"ok": True, "what": what}


def _file_or_directory(document: Mapping[str, Any]) -> str:
    """The path to give to an engine: the model's only file, else its directory."""
    return str(document["file"] or document["path"])


def _print(document: dict[str, Any], output: Output, text: Callable[[], object]) -> None:
    if output is Output.json:
        terminal.show_json(document)
    elif output is Output.name and "name" in document:
        terminal.say(document["name"])
    else:
        text()
