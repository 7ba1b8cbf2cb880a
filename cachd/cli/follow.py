"""Follows a pull or a job of the daemon until it ends, and shows its progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cachd import errors
from cachd.client import Client
from cachd.errors import CachdError, error_of
from cachd.terminal.amounts import duration_text, size_text
from cachd.terminal.models import Status, status_of
from cachd.terminal.progress import Update, progress_bars

_POLL_SECONDS = 0.3


class Pulled:
    """Says whether the pull that this command asked for is done. A pull of another spec does not count."""

    def __init__(self, begun: Mapping[str, Any]) -> None:
        self._spec = _spec_of(begun["pull"])

    def __call__(self, model: Mapping[str, Any]) -> bool:
        """Raises the error that the pull failed with, or Cancelled when another pull replaced it."""
        pull = model["pull"]
        if pull is None:
            return True
        if self._spec and _spec_of(pull) != self._spec:
            raise errors.Cancelled(
                f"{model['name']}: a pull of {pull['ref']} replaced this one",
                code="replaced",
                hint=f"cachd watch {model['name']} follows that one; --name pulls under another name",
            )
        if pull["state"] in ("failed", "cancelled"):
            raise error_of(pull["error"])
        return bool(pull["state"] == "ready")


def _spec_of(pull: Mapping[str, Any] | None) -> list[Any]:
    keys = ("ref", "include", "exclude", "weights", "formats", "layout")
    return [pull.get(key) for key in keys] if pull else []


def is_ready(model: Mapping[str, Any]) -> bool:
    """Whether the name leads to a ready model. Raises the error of a pull that failed for good."""
    if model["final"]:
        raise error_of(model["pull"]["error"])
    return bool(model["state"] == "ready")


async def follow(
    client: Client,
    name: str,
    seconds: float,
    is_done: Callable[[Mapping[str, Any]], bool],
    update: Update,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Show the progress of a model until it is done. Raises what `is_done` raises, or WaitTimeout."""
    deadline = clock() + seconds
    while True:
        model = await client.model(name)
        status = status_of(model)
        update(status)  # before is_done, which raises: the bar of a pull that failed says so
        if is_done(model):
            update(replace(status, done=status.total))
            return model
        left = deadline - clock()
        if left <= 0:
            why = f" ({status.reason})" if status.reason else ""
            raise errors.WaitTimeout(
                f"{name} is {status.state} after {duration_text(seconds)}:"
                f" {size_text(status.done)} of {size_text(status.total)}{why}",
                hint="wait longer (--timeout); the pull continues",
            )
        await _pause(client, model, min(_POLL_SECONDS, left), clock)


async def _pause(
    client: Client, model: Mapping[str, Any], seconds: float, clock: Callable[[], float]
) -> None:
    """Wait `seconds`, or until the running pull ends."""
    if model["state"] in ("ready", "failed", "cancelled", "damaged", "refused"):
        await asyncio.sleep(seconds)
        return
    began = clock()
    try:
        await client.ready(model["name"], wait=seconds)
    except CachdError as error:  # the model's next document has the reason
        if error.code == "not_ready":  # the daemon answers at once when too many clients wait already
            await asyncio.sleep(max(0.0, began + seconds - clock()))


async def until_ended(client: Client, name: str, job: str, begun: Mapping[str, Any]) -> dict[str, Any]:
    """Show the progress of a job until it ends, and return its last document.

    `job` is its key in the model's document, `begun` its first document.
    """
    found = dict(begun)
    with progress_bars() as update:
        while found["state"] == "running":
            update(Status(name, job, found["bytes"]["done"], found["bytes"]["total"]))
            await asyncio.sleep(_POLL_SECONDS)
            found = (await client.model(name))[job]
        update(Status(name, found["state"], found["bytes"]["done"], found["bytes"]["total"]))
    return found
