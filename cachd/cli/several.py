"""Makes one call for each of several models. One that fails does not keep the others from theirs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cachd.cli.answers import show
from cachd.cli.arguments import Output
from cachd.cli.ask import ask
from cachd.cli.failures import report
from cachd.errors import CachdError, Unreachable

if TYPE_CHECKING:
    from cachd.client import Client

Document = Mapping[str, Any]
Call = Callable[["Client", str], Awaitable[Document]]


def ask_each(
    server: str | None,
    token_file: Path | None,
    names: Sequence[str],
    call: Call,
    *,
    output: Output,
    text: Callable[[Document], object],
    status: Callable[[Document], int] = lambda _: 0,
) -> None:
    """Print what `call` answers for each name, in their order: with `text`, or as one document.

    The document of one name is its own; that of several is a list, `models`. Every failure is reported.
    Raises Exit with the first exit code that is not 0: that of an error, or what `status` says of an answer.
    """
    answers = ask(server, token_file, lambda client: _answers(client, names, call))
    print_each(answers, output, text)
    codes = [status(a) if not isinstance(a, CachdError) else report(a) for a in answers]
    if first := next(filter(None, codes), 0):
        raise typer.Exit(first)


async def _answers(client: Client, names: Sequence[str], call: Call) -> list[Document | CachdError]:
    answers: list[Document | CachdError] = []
    for name in dict.fromkeys(names):
        try:
            answers.append(await call(client, name))
        except Unreachable:
            raise
        except CachdError as error:
            answers.append(error)
    return answers


def print_each(
    answers: Sequence[Document | CachdError], output: Output, text: Callable[[Document], object]
) -> None:
    """Print the answers that are no errors."""
    found = [each for each in answers if not isinstance(each, CachdError)]
    if output in (Output.json, Output.yaml) and len(answers) > 1:
        show({"models": found}, output, lambda: None)
        return
    for each in found:
        show(each, output, partial(text, each))
