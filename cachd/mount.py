"""The cache as a pod has it: read through its mount alone, without the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachd import files
from cachd.errors import CachdError, DiskFailed, Invalid, NotFound, WaitTimeout, error_of
from cachd.model import check_name
from cachd.store.catalog import snapshot_from

_MOST_BYTES = 4 << 20


def ready_model(cache: Path, name: str) -> dict[str, Any]:
    """What the ready file of a model says, with `path` and `file` as this mount has them.

    Raises Invalid where no cache is mounted, NotFound for a model that the cache does not know, WaitTimeout
    for one that is not ready yet, what its pull failed with for good, or DiskFailed for a ready file that
    cannot be read.
    """
    ready_file = cache / f"ready/{check_name(name)}.json"
    try:
        told = files.document(ready_file, at_most=_MOST_BYTES)
        snapshot = snapshot_from(told)
    except FileNotFoundError as error:
        raise _not_ready(cache, name) from error
    except files.UNREADABLE as error:
        raise DiskFailed(
            f"{ready_file} cannot be read: {error!r:.120}", code="ready_file_unreadable"
        ) from error
    model = cache / f"models/{name}"
    return {**told, "path": str(model), "file": str(model / snapshot.file) if snapshot.file else None}


def _not_ready(cache: Path, name: str) -> CachdError:
    if not (cache / "ready").is_dir():
        return Invalid(
            f"{cache} is no cache: it has no ready/", code="bad_root", hint="give the mounted root"
        )
    status = _status(cache / f"status/{name}.json")
    if status.get("final") is True and isinstance(status.get("error"), dict):
        return error_of(status["error"])
    if status:
        return WaitTimeout(f"{name} is not ready yet", code="not_ready", hint=f"cachd wait {name}")
    return NotFound(
        f"no model named {name} is ready in {cache}", code="no_such_model", hint="has it been pulled?"
    )


def _status(path: Path) -> dict[str, Any]:
    """How far a model is, as the daemon last wrote it; empty when it never heard of it."""
    try:
        told = files.document(path, at_most=_MOST_BYTES)
    except files.UNREADABLE:
        return {}
    return told if isinstance(told, dict) else {}
