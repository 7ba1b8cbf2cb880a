"""Records the pulls that have not ended, so that the next start resumes them, and those that failed.

pending/<name>.json    the spec, with `replace` and `pins` as in Permit
pending/<name>.began   how many daemon processes in a row began the pull and died; absent for none
pending/<name>.failed  the spec of a pull that failed or was cancelled, and how it ended
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from cachd.errors import Leased
from cachd.files import UNREADABLE
from cachd.kernel import durable
from cachd.model import ModelSpec
from cachd.store import catalog
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PendingPull:
    """A pull to resume after a restart.

    `replace`, `pins`: as in Permit. `began`: how many daemon processes in a row began it and died.
    """

    spec: ModelSpec
    replace: bool
    pins: bool
    began: int


@dataclass(frozen=True, slots=True)
class FailedPull:
    """A pull that failed or was cancelled, to show after a restart.

    `ended`: how it ended, as a JSON document.
    """

    spec: ModelSpec
    replace: bool
    pins: bool
    ended: Mapping[str, Any]


class PendingPulls:
    """The pending pulls of one root, by name. Every method raises NoSpace or DiskFailed."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def remember(self, spec: ModelSpec, *, replace: bool = True, pins: bool = False) -> None:
        """Record a pull until `forget`, so that a restart resumes it. `replace`, `pins`: as in Permit."""
        path = self._layout.pending_file(spec.name)
        document = {**spec.as_document(), "replace": replace, "pins": pins}
        with durable.disk_errors(path):
            durable.remove(self._layout.began(spec.name))
            durable.remove(self._layout.failed(spec.name))
            durable.write_file(path, json.dumps(document).encode())

    def forget(self, name: str) -> None:
        """Delete the record of a pull that has ended, if there is one, so that no restart resumes it."""
        with durable.disk_errors(self._layout.pending_file(name)):
            durable.remove(self._layout.failed(name))
            durable.remove(self._layout.began(name))
            durable.remove(self._layout.pending_file(name))

    def fail(self, failed: FailedPull) -> None:
        """Like `forget`, and record how the pull ended, until `remember` or `forget`."""
        name = failed.spec.name
        document = {
            **failed.spec.as_document(),
            "replace": failed.replace,
            "pins": failed.pins,
            "ended": dict(failed.ended),
        }
        with durable.disk_errors(self._layout.pending_file(name)):
            try:
                durable.write_file(self._layout.failed(name), json.dumps(document).encode())
            finally:
                durable.remove(self._layout.began(name))
                durable.remove(self._layout.pending_file(name))

    def forget_failure(self, name: str) -> None:
        """Delete the record that `fail` made, if there is one. A pull to resume stays recorded."""
        with durable.disk_errors(self._layout.pending_file(name)):
            durable.remove(self._layout.failed(name))

    def failed(self) -> list[FailedPull]:
        """The pulls that `fail` recorded, the oldest first. Removes unreadable records."""
        return sorted(self._read("failed", _failed), key=lambda each: str(each.ended.get("ended_at")))

    def all(self) -> list[PendingPull]:
        """The pulls to resume. Removes unreadable records."""
        return self._read("json", self._pending)

    def begins(self, name: str) -> None:
        """Count one more daemon process that began this pull. Called before the pull does anything."""
        path = self._layout.began(name)
        with durable.disk_errors(path):
            durable.write_file(path, str(_read_began(path) + 1).encode())

    def ends_well(self, name: str) -> None:
        """Reset the count of `begins`: this daemon process did not die during the pull."""
        with durable.disk_errors(self._layout.began(name)):
            durable.remove(self._layout.began(name))

    def _pending(self, document: Mapping[str, Any]) -> PendingPull:
        spec = ModelSpec.from_document(document)
        return PendingPull(
            spec,
            replace=bool(document.get("replace", True)),  # older versions wrote none and allowed it
            pins=bool(document.get("pins", False)),
            began=_read_began(self._layout.began(spec.name)),
        )

    def _read(self, suffix: str, made: Callable[[Mapping[str, Any]], T]) -> list[T]:
        """What is `made` of each readable record; the others are removed."""
        found = []
        for path in sorted(self._layout.pending.glob(f"[!.]*.{suffix}")):
            try:
                found.append(made(durable.read_document(path)))
            except UNREADABLE as error:
                catalog.check_passing(error, path)
                log.warning("unreadable pending pull removed", file=path.name, reason=repr(error))
                path.unlink(missing_ok=True)
        return found


def _failed(document: Mapping[str, Any]) -> FailedPull:
    return FailedPull(
        ModelSpec.from_document(document),
        replace=bool(document["replace"]),
        pins=bool(document["pins"]),
        ended=dict(document["ended"]),
    )


def _read_began(path: Path) -> int:
    """How many daemon processes in a row began a pull and died; 0 if the file is missing or unreadable."""
    try:
        return max(int(durable.read_file(path, at_most=20)), 0)
    except (OSError, ValueError, Leased):
        return 0
