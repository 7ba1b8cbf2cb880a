"""Keeps the pins: names that operators protect from removal."""

from __future__ import annotations

import os

import structlog

from cachd.kernel import durable
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


class Pins:
    """The pinned names of one root: one empty file per name. A name need not be ready to be pinned."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def add(self, name: str) -> None:
        """Protect the name until it is unpinned or forcibly removed. Raises NoSpace, DiskFailed."""
        is_new = not self.has(name)
        with durable.disk_errors(self._layout.pin(name)):
            durable.write_file(self._layout.pin(name), b"")
        if is_new:
            log.info("pinned", name=name)

    def remove(self, name: str) -> None:
        """End the protection; a name that is not pinned is fine. Raises DiskFailed."""
        was_pinned = self.has(name)
        with durable.disk_errors(self._layout.pin(name)):
            durable.remove(self._layout.pin(name))
        if was_pinned:
            log.info("unpinned", name=name)

    def has(self, name: str) -> bool:
        """Whether the name is pinned."""
        return os.path.exists(self._layout.pin_at(name))
