"""Reads the ready and status files of a model through a pod's mount, without the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachd import files
from cachd.errors import CachdError, DiskFailed, Invalid, NotFound, WaitTimeout, error_of
from cachd.model import check_name
from cachd.store.catalog import snapshot_from

_MOST_BYTES = 4 << 20


def ready_model(cache: Path, name: str) -> dict[str, Any]:
    """The ready document of a model, with `path` and `file` as paths below `cache`.

    Raises Invalid when `cache` is not a cache, NotFound when it does not know the model, WaitTimeout when the
    model is not ready yet, the error of the pull when that failed for good, and DiskFailed when the ready
    file cannot be read.
    """
    ready_file = cache / f"ready/{check_name(name)}.json"
    try:
        document = files.document(ready_file, at_most=_MOST_BYTES)
        snapshot = snapshot_from(document)
    except FileNotFoundError as error:
        raise _not_ready(cache, name) from error
    except files.UNREADABLE as error:
        raise DiskFailed(
            f"{ready_file} cannot be read: {error!r:.120}", code="ready_file_unreadable"
        ) from error
    model = cache / f"models/{name}"
    return {**document, "path": str(model), "file": str(model / snapshot.file) if snapshot.file else None}


def _not_ready(cache: Path, name: str) -> CachdError:
    if not (cache / "ready").is_dir():
        return Invalid(
            f"{cache} is not a cache: it has no directory ready/",
            code="bad_root",
            hint="give the mounted root of the cache",
        )
    status = _status(cache / f"status/{name}.json")
    if status.get("final") is True and isinstance(status.get("error"), dict):
        return error_of(status["error"])
    if status:
        return WaitTimeout(
            f"{name} is not ready yet", code="not_ready", hint=f"wait for it (cachd wait {name})"
        )
    return NotFound(
        f"no model named {name} is ready in {cache}",
        code="no_such_model",
        hint="check the name, or pull the model",
    )


def _status(path: Path) -> dict[str, Any]:
    """The status of a model, as the daemon last wrote it; empty when there is none."""
    try:
        document = files.document(path, at_most=_MOST_BYTES)
    except files.UNREADABLE:
        return {}
    return document if isinstance(document, dict) else {}
