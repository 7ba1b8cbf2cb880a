"""Reloads the configuration file while the daemon runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from cachd import files
from cachd.config import RELOADED_KEYS, Config, Loaded, examine
from cachd.daemon.last_good import keep
from cachd.daemon.parts import Daemon
from cachd.daemon.sources import build_table
from cachd.effective import effective, entries, holding
from cachd.errors import CachdError
from cachd.model import Typed
from cachd.settings.file import LONGEST_BYTES
from cachd.store.catalog import iso
from cachd.upkeep.prewarm import Desired

log = structlog.get_logger(__name__)


class Reload:
    """The options in force. They follow the configuration file while the daemon runs.

    Whenever the file changes, `poll` leads to one of these states of the file:

        in force    the daemon uses all its options
        waiting     an option changed that is not marked RELOADED: the daemon uses it after a restart
        refused     an option is wrong, or the file cannot be read: all options from before stay in force

    The daemon may begin with a file that is refused, if the last good configuration is kept (last_good.py).

    One thread calls `poll`. Any thread may call the other methods.
    """

    def __init__(self, loaded: Loaded, daemon: Daemon, *, now: Callable[[], float] = time.time) -> None:
        self._daemon, self._now = daemon, now
        self._in_force, last_good = loaded, loaded.last_good
        self._refusal = last_good.fault if last_good else None
        self.loaded_at = last_good.kept_at if last_good else now()
        self._seen = loaded.content
        self._is_first = True
        self._waiting: list[str] = []
        self._is_requested = False

    def request(self) -> None:
        """Load the file at the next poll even if it did not change. Safe in a signal handler."""
        self._is_requested = True

    def poll(self) -> Iterable[Desired] | None:
        """Load the file if it changed. Returns the desired models, or None when nothing changed."""
        path = self._in_force.config.config
        content = _content(path) if path else b""
        is_requested, self._is_requested = self._is_requested, False
        if content == self._seen and not self._is_first and not is_requested:
            return None
        try:
            if content != self._seen or is_requested:
                self._seen = content
                self._apply(self._in_force.again())
        except CachdError as error:
            self._refuse(error)
            if not self._is_first:
                return None
        if self._is_first and self._in_force.last_good is None:  # it works: the daemon has started with it
            keep(self._in_force, self._daemon.store.layout)
        self._is_first = False
        models = self._in_force.config.models
        self._daemon.reclaim.keep([m.spec.name for m in models])
        return [
            Desired(m.spec, required=m.required, pin=m.pin, warm=m.warm, priority=m.priority) for m in models
        ]

    def _refuse(self, error: CachdError) -> None:
        self._refusal = error
        # Events show the keys, and a key that is no option may be anything, even a secret.
        found = (re.split(r"[.\[]", each.key)[0] for each in examine(**self._in_force.flags).findings)
        keys = [key for key in dict.fromkeys(found) if key in Config.model_fields]
        log.error("configuration file not taken over", code=error.code, reason=error.detail, options=keys)

    def _apply(self, now: Loaded) -> None:
        before, after = self._in_force.config.limits, self._in_force.updated(now, RELOADED_KEYS)
        changed = after.differs_from(self._in_force)
        daemon = self._daemon
        daemon.bounds.set(after.config)
        table = build_table(after.config)
        daemon.sources.change(after.config.allow, table)
        daemon.refusals.check_soon()
        # Limits set through the API stay in force until the limits in the file change.
        limits = after.config.limits if after.config.limits != before else daemon.bandwidth.limits
        if (limits, table.limits()) != (daemon.bandwidth.limits, daemon.bandwidth.prefixes):
            daemon.bandwidth.change(limits, table.limits())
        self._in_force, self._refusal, self._waiting = after, None, now.differs_from(after)
        self.loaded_at = self._now()
        keep(after, daemon.store.layout)
        log.info("configuration file taken over", options=changed)
        if self._waiting:
            log.warning("options of the file wait for a restart", options=self._waiting)

    @property
    def is_loaded(self) -> bool:
        """Whether the file was taken over when it was last read; options of it may wait for a restart."""
        return self._refusal is None

    @property
    def waiting(self) -> int:
        """How many options of the file wait for a restart."""
        return len(self._waiting)

    @property
    def is_in_force(self) -> bool:
        """Whether the daemon uses every option of the file as it is on disk."""
        return self._refusal is None and not self._waiting

    def as_document(self) -> dict[str, object]:
        """Every option in force with where it was set, and the state of the file (GET /v1/options)."""
        config, error = self._in_force.config, self._refusal
        options = effective(self._in_force, self._daemon.bandwidth.limits)
        return {
            "options": [option.as_document() for option in options],
            "file": {
                "path": str(config.config) if config.config else None,
                "in_force": self.is_in_force,
                "last_good": self._in_force.last_good is not None,
                "loaded_at": iso(self.loaded_at),
                "waiting_for_restart": self._waiting,
                "error": error.as_document() if error else None,
            },
        }

    def sources(self, typed: str | None) -> dict[str, object]:
        """The entries of `sources` in force, or the settings for a ref (GET /v1/sources).

        `typed` is the ref as the user typed it. Raises Invalid when it is not one.
        """
        if typed is None:
            return {"sources": entries(self._in_force)}
        return holding(self._in_force, self._daemon.sources.table, Typed.parse(typed).ref)


def _content(path: Path) -> bytes:
    try:
        return files.content(path, at_most=LONGEST_BYTES)
    except OSError:
        return b""
