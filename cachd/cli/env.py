"""The command that prints what an engine needs to load a model from the mounted cache."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd import terminal
from cachd.cli.arguments import SERVER, Name, Server, TokenFile
from cachd.cli.ask import ask
from cachd.errors import Forbidden, Invalid, Unauthorized
from cachd.model.triton import layout_of, place_of
from cachd.pod.recipe import EngineName, Recipe

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()
_MAX_LISTED = 20
_MISTRAL = "params.json"


class EnvForm(StrEnum):
    """The forms of the answer: variables for a shell, everything as JSON, or a pod."""

    env = "env"
    json = "json"
    pod = "pod"


@commands.command(epilog="Example: cachd env org--model; cachd env org--model --for sglang -o pod")
def env(
    name: Name,
    *,
    engine: Annotated[
        EngineName | None, typer.Option("--for", help="engine; default: the first that takes the layout")
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", help="for llama.cpp: which GGUF file of the model to load")
    ] = None,
    cache: Annotated[str, typer.Option(help="where the pod mounts the cache")] = "/cache",
    link: Annotated[str, typer.Option(help="where `cachd hold` makes the link to the model")] = "/model",
    scratch: Annotated[str, typer.Option(help="where the pod mounts a directory to write to")] = "/scratch",
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Annotated[
        EnvForm, typer.Option("--output", "-o", help="variables, all as JSON, or a pod as YAML")
    ] = EnvForm.env,
) -> None:
    """Print variables, arguments and a pod with which an engine loads a ready model, without a network.

    The pod waits for the model and holds it. Its memory, its GPUs and its images are examples: change them.
    """
    places = {"cache": cache.rstrip("/"), "link": link.rstrip("/"), "scratch": scratch.rstrip("/")}
    recipe = ask(server, token_file, lambda client: _recipe(client, name, engine, file, places))
    if output is EnvForm.json:
        terminal.show_json(recipe.as_document())
    elif output is EnvForm.pod:
        terminal.show_yaml(recipe.pod())
    else:
        for key, value in recipe.env.items():
            terminal.say(f"{key}={shlex.quote(value)}")
        started = [*recipe.command, *recipe.args]
        terminal.say(f"# run: {shlex.join(started)}" if started else f"# load {shlex.quote(recipe.path)}")


async def _recipe(
    client: Client, name: str, engine: EngineName | None, file: str | None, places: Mapping[str, str]
) -> Recipe:
    """The recipe with its directories at `places`: cache, link and scratch.

    Raises NotFound or Unavailable for a model that is not ready, Invalid if no engine or file is clear.
    """
    asked = (await client.ready(name, wait=0)).get("layout")
    found = await _preflight(client, name)
    chosen = engine or _engine_of(name, found)
    for warning in _warnings(chosen, found):
        terminal.warn(f"warning: {warning}", style="yellow")
    paths = [each["path"] for each in (await client.files(name))[0]]
    file = _gguf(name, paths, file) if chosen is EngineName.llama_cpp else ""
    return Recipe(
        chosen,
        name,
        place_of(file, layout_of(paths, asked)).rstrip("/"),
        is_mistral=_MISTRAL in paths and "config.json" not in paths,
        **places,
    )


async def _preflight(client: Client, name: str) -> Mapping[str, Any] | None:
    """The preflight of a model; None for a caller who may not ask for it."""
    try:
        return await client.preflight(name)
    except (Forbidden, Unauthorized):
        return None


def _engine_of(name: str, found: Mapping[str, Any] | None) -> EngineName:
    loaders = found["loaders"] if found else []
    known = [each for each in loaders if each in set(EngineName)]
    if known:
        return EngineName(known[0])
    others = f"its layout fits {', '.join(loaders)}" if loaders else "its layout fits none that is known"
    why = others if found else "the token has no role `pull`, which a preflight needs"
    raise Invalid(
        f"no engine is given for {name}, and {why}",
        code="no_engine",
        hint=f"name one with --for: {', '.join(EngineName)}",
    )


def _warnings(engine: EngineName, found: Mapping[str, Any] | None) -> Iterable[str]:
    """The warnings about a model and the engine that was chosen for it."""
    if found is None:
        return
    if engine not in found["loaders"]:
        yield f"the layout of the model fits {', '.join(found['loaders']) or 'no known engine'}, not {engine}"
    for each in found["findings"]:
        if each["level"] == "refused":
            yield f"{each.get('file', '')}: {each['detail']}".removeprefix(": ")
        elif each["code"] == "remote_code" and each["level"] == "ok":
            yield "the model has its own code, which engines run only with --trust-remote-code"


def _gguf(name: str, paths: Iterable[str], file: str | None) -> str:
    """The GGUF file to load: the first of a split one. Raises Invalid when there is none, or a choice."""
    from cachd.model.weights import gguf_models, gguf_set

    firsts: dict[str, str] = {}
    for path in gguf_models(paths):
        firsts.setdefault(gguf_set(path), path)
    there = sorted(firsts.values())
    if file in there:
        return str(file)
    if len(there) == 1 and file is None:
        return there[0]
    listed = ", ".join(there[:_MAX_LISTED]) or "none"
    raise Invalid(
        f"{name} has {len(there)} GGUF models" + (f", and {file!r:.120} is none of them" if file else ""),
        code="no_such_file",
        hint=f"name one with --file: {listed}" if there else "llama.cpp takes only GGUF",
    )
