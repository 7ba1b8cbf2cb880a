"""Keeps the pins: names that operators protect from removal, through the API or in the configuration."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

import structlog

from cachd.errors import InUse
from cachd.kernel import durable
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


class PinnedBy(StrEnum):
    """Who pinned a name. `api`: a request or a command did; `configuration`: the list of models does."""

    api = "api"
    configuration = "configuration"


class Pins:
    """The pins of one root: one empty file for each name and who pinned it. A name need not be ready.

    A name is pinned while anybody pins it.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def add(self, name: str, by: PinnedBy = PinnedBy.api) -> None:
        """Protect the name until it is unpinned or forcibly removed. Raises NoSpace, DiskFailed."""
        path = Path(self._at(name, by))
        is_new = not path.exists()
        with durable.disk_errors(path):
            durable.write_file(path, b"")
        if is_new:
            log.info("pinned", name=name, by=by.value)

    def unpin(self, name: str) -> None:
        """Remove the pin of the API; a name that is not pinned is fine.

        Raises InUse if the configuration pins the name, too: it would stay pinned. Raises DiskFailed.
        """
        if PinnedBy.configuration in self.by(name):
            raise InUse(
                f"the configuration pins {name}",
                code="pinned_by_configuration",
                hint=f"set `pin: false` for {name} in `models` of the configuration file, or remove it there",
            )
        self.release(name, PinnedBy.api)

    def release(self, name: str, by: PinnedBy) -> None:
        """Remove one pin of a name; the other one stays. Raises DiskFailed."""
        path = Path(self._at(name, by))
        was_pinned = path.exists()
        with durable.disk_errors(path):
            durable.remove(path)
        if was_pinned:
            log.info("unpinned", name=name, by=by.value)

    def remove(self, name: str) -> None:
        """Remove all pins of a name that is being removed. Raises DiskFailed."""
        for by in PinnedBy:
            self.release(name, by)

    def has(self, name: str) -> bool:
        """Whether anybody pins the name."""
        return bool(self.by(name))

    def by(self, name: str) -> list[PinnedBy]:
        """Who pins the name; empty if nobody does."""
        return [by for by in PinnedBy if os.path.exists(self._at(name, by))]

    def configured(self) -> list[str]:
        """The names that the configuration pinned. Raises DiskFailed."""
        with durable.disk_errors(self._layout.config_pins):
            return [name for name in os.listdir(self._layout.config_pins) if not name.startswith(".")]

    def _at(self, name: str, by: PinnedBy) -> str:
        layout = self._layout
        return layout.config_pin_at(name) if by is PinnedBy.configuration else layout.pin_at(name)
