"""Reads the document of a ready model through a pod's mount."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachd import files
from cachd.errors import CachdError, DiskFailed, Invalid, NotFound, WaitTimeout, error_of
from cachd.model import check_name
from cachd.pod.mount import MAX_BYTES, Mount
from cachd.store.catalog import snapshot_from
from cachd.store.layout import Layout


def ready_model(cache: Path, name: str) -> dict[str, Any]:
    """The ready document of a model, with `path` and `file` as paths below `cache`.

    Reads the mount alone, and does not wait. Raises Invalid when `cache` is not a cache, NotFound when it
    does not know the model, WaitTimeout when the model is not ready yet, DiskFailed when the ready file
    cannot be read. When the pull failed for good, raises the error of the pull.
    """
    layout = Layout(cache)
    ready_file = layout.ready_file(check_name(name))
    try:
        document = files.document(ready_file, at_most=MAX_BYTES)
        snapshot = snapshot_from(document)
    except FileNotFoundError as error:
        raise _not_ready(cache, name) from error
    except files.UNREADABLE as error:
        raise DiskFailed(
            f"{ready_file} cannot be read: {error!r:.120}", code="ready_file_unreadable"
        ) from error
    model = layout.model(name)
    return {**document, "path": str(model), "file": str(model / snapshot.file) if snapshot.file else None}


def _not_ready(cache: Path, name: str) -> CachdError:
    """The error for a model without a ready file. Its status file says how far its pull is."""
    if not (cache / "ready").is_dir():
        return Invalid(
            f"{cache} is not a cache: it has no directory ready/",
            code="bad_root",
            hint="give the mounted root of the cache",
        )
    status = Mount(cache).status(name)
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
