"""Writes status/NAME.json, which shows the state of a model to pods that see only the mount, not the API.

The file exists from the request of a pull until the model is deleted. A change of state is written at once,
progress twice a second, and nothing is written while nothing changes. The file is replaced atomically but not
synced: after a crash it may be stale, and the next start of the daemon corrects it.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from cachd.errors import CachdError, Leased, NotFound
from cachd.kernel import durable, threads
from cachd.model import Snapshot
from cachd.report.models import Models, pull_report
from cachd.report.outcomes import outcome_of
from cachd.report.values import ModelState, as_document
from cachd.store.catalog import iso
from cachd.store.changes import Changes
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)

_PULL_KEYS = ("ref", "include", "exclude", "revision", "bytes", "files", "paused", "waits", "retry_at")
# Left out where the spec does not set them, as in the ready file.
_ASKED_KEYS = ("hub_id", "weights", "formats", "copy", "layout")
_FAILED = (ModelState.damaged, ModelState.failed, ModelState.cancelled, ModelState.refused)
_ENDED = (ModelState.ready, ModelState.damaged, ModelState.failed, ModelState.refused)
_PROGRESS_SECONDS = 0.5
_RETRY_SECONDS = 5.0
_PATIENCE_SECONDS = 2.0  # the longest that a caller waits for the status file of a model it changed


class StatusFiles:
    """Keeps the status files of one root up to date, in a thread that runs from `start` to `close`."""

    def __init__(
        self,
        layout: Layout,
        changes: Changes,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._layout, self._changes, self._clock, self._now = layout, changes, clock, now
        self._written: dict[str, str] = {}  # the JSON of each file, without `updated_at`
        self._unwritten: set[str] = set()
        self._stop = threading.Event()
        self._models: Models | None = None
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def start(self, models: Models) -> None:
        """Correct the existing files, and keep all files up to date from now on."""
        self._models = models
        threads.start([self._thread])

    def close(self) -> None:
        """Write the final states, then end the thread."""
        self._stop.set()
        self._changes.wake()
        if self._thread.ident:
            self._thread.join()
        self._changes.close()

    def settle(self) -> None:
        """Wait until the files show every change made so far, for at most two seconds."""
        self._changes.settle(_PATIENCE_SECONDS)

    # --- in the thread ---

    def _run(self) -> None:
        assert self._models is not None
        models, progress_at, retry_at = self._models, 0.0, 0.0
        self._write_all(self._names_to_correct(models), models)
        is_last = False
        while not is_last:
            at_work = {pull.spec.name for pull in models.pulls.at_work()}
            due = min(progress_at if at_work else math.inf, retry_at if self._unwritten else math.inf)
            names = self._changes.take(None if due == math.inf else max(0.0, due - self._clock()))
            now, is_last = self._clock(), self._stop.is_set()
            if now >= progress_at or is_last:
                names |= at_work
                progress_at = now + _PROGRESS_SECONDS
            if now >= retry_at:
                names |= self._unwritten
                retry_at = now + _RETRY_SECONDS
            self._write_all(names, models)

    def _names_to_correct(self, models: Models) -> set[str]:
        """The names whose file may be wrong. Removes the temporary files of interrupted writes."""
        names = set(models.names())
        for leftover in list(self._layout.status.glob(".*")):
            durable.unlink(str(leftover))
        for path in self._layout.status.glob("[!.]*.json"):
            self._written[path.stem] = _content(path)
            # A name with a spec in pending/ keeps its file: if this process does not pull it, the next will.
            if not self._layout.pending_file(path.stem).exists():
                names.add(path.stem)
        return names

    def _write_all(self, names: Iterable[str], models: Models) -> None:
        for name in names:
            try:
                self._write(name, status_document(name, models, before=self._written.get(name, "")))
            except OSError as error:
                self._failed(name, error)
            except Exception:
                log.exception("a status file failed in a way it should not", name=name)

    def _write(self, name: str, document: dict[str, Any] | None) -> None:
        path = self._layout.status_file(name)
        self._unwritten.discard(name)
        if document is None:
            self._written.pop(name, None)
            durable.unlink(str(path))
            return
        stated = json.dumps(document)
        if stated != self._written.get(name):
            content = json.dumps({**document, "updated_at": iso(self._now())}) + "\n"
            durable.replace_file(path, content.encode())
            self._written[name] = stated

    def _failed(self, name: str, error: OSError) -> None:
        """Remove a file that could not be replaced: its content is outdated. No pull fails for this."""
        if not self._unwritten:
            log.warning("status not written", name=name, reason=str(error))
        self._unwritten.add(name)
        self._written.pop(name, None)
        with suppress(OSError):
            durable.unlink(str(self._layout.status_file(name)))
        with suppress(OSError):
            self._layout.status.mkdir(mode=0o755)


def _content(path: Path) -> str:
    """The JSON of a status file without `updated_at`; empty when the file cannot be read."""
    try:
        document = durable.read_document(path)
        del document["updated_at"]
        return json.dumps(document)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, Leased):
        return ""


# --- the document ---


def status_document(name: str, models: Models, *, before: str) -> dict[str, Any] | None:
    """The content of a status file without `updated_at`; None when the name is unknown and has no file.

    `before` is the previous content as JSON. The document of an evicted model repeats it, with a new state.
    """
    state, snapshot, pull = models.state(name), models.store.names.get(name), models.pulls.get(name)
    if state is None:
        return _evicted(name, before) if models.store.names.was_evicted(name) else None
    damage = models.store.names.quarantine_of(name)
    if pull and not snapshot:
        about = as_document(pull_report(pull))
    elif known := snapshot or (damage.snapshot if damage else None):
        about = _about(known)
    else:
        return None  # it was removed after `state` was read; the removal marks the name again
    if models.pulls.are_stopping and state not in _ENDED:
        state = ModelState.queued  # the next start of the daemon resumes it
    failure = models.failure(name) if state in _FAILED else None
    is_downloading = about.get("state", state) == ModelState.downloading
    eta = about["eta_seconds"] if is_downloading else None
    return {
        "name": name,
        "state": state,
        "final": models.is_final(name),
        **{key: about[key] for key in _PULL_KEYS},
        **{key: about[key] for key in _ASKED_KEYS if key in about},
        "rate_bytes_per_second": about["rate_bytes_per_second"] if is_downloading else 0,
        "eta_seconds": None if eta is None else round(eta),
        "error": _error(failure) if failure else None,
    }


def _about(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as the document of a pull. What was fetched, resumed and hedged is no longer known."""
    return {
        **snapshot.spec.as_document(),
        "revision": snapshot.revision,
        "bytes": {
            "total": snapshot.size,
            "done": snapshot.size,
            **dict.fromkeys(("fetched", "resumed", "hedged")),
        },
        "files": {"total": snapshot.files, "done": snapshot.files},
        "paused": False,
        "waits": None,
        "retry_at": None,
        "rate_bytes_per_second": 0,
        "eta_seconds": None,
    }


def _evicted(name: str, before: str) -> dict[str, Any]:
    evicted = NotFound(f"{name} was evicted to free space", code="evicted", hint="pull it again (cachd pull)")
    return {
        **json.loads(before or "{}"),
        "name": name,
        "state": "evicted",
        "final": False,
        "error": _error(evicted),
    }


def _error(error: CachdError) -> dict[str, object]:
    """An error as pods see it. The other fields of its class are for callers of the API."""
    return {
        "code": error.code,
        "detail": error.detail,
        "hint": error.hint,
        "error_class": type(error).__name__,
        "status": outcome_of(error).status,
    }
