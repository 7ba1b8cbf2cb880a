"""Moves the work of former writers of a shared volume into the work directory of the new one (nodes.py).

<number>.work/former-<former number>.<number>-<count>/    what a former writer had; deleted once it is adopted
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from cachd.errors import CachdError
from cachd.kernel import durable
from cachd.store.ingest.copies import copy_ingest
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)

_FORMER = re.compile(r"former-([0-9]+).*")
_REMOVALS = 20  # a former writer may make new files while its directory is removed


class Takeover:
    """Takes over from the writers with lower numbers than `number`. `check` raises if a higher one exists.

    `layout`: that of the new writer. Methods raise OSError, and what `check` raises.
    """

    def __init__(self, layout: Layout, number: int, check: Callable[[], object]) -> None:
        self._layout, self._common, self._number, self._check = layout, Layout(layout.root), number, check
        self._place = layout.root / layout.work
        self._count = 0

    def run(self) -> None:
        """Fence the former writers, and take over their partial downloads."""
        self._fence()
        for ingest in self._common.ingests.iterdir():
            if not (self._layout.ingests / ingest.name).exists():
                self._check()
                durable.move(ingest, self._layout.ingests / ingest.name)
        # The newest first: it has what it took over from those before it.
        for former in sorted(formers_in(self._place), key=_number_of, reverse=True):
            for ingest in sorted((former / "ingest").glob("*")):
                self._adopt(ingest)
            _delete(former)

    def _fence(self) -> None:
        """Take the work directories of former writers, so that they cannot publish what they have there."""
        # Only lower numbers: this process may have stood still, and a later writer may be at work.
        lower = [p for p in self._layout.nodes.glob("[0-9]*.work") if int(p.stem) < self._number]
        for former in sorted(lower, key=lambda path: int(path.stem)):
            taken = self._new_place(int(former.stem))
            self._check()
            with suppress(FileNotFoundError):
                durable.move(former, taken)  # point of no return for the former writer
            # They stay side by side: one that cannot be deleted gets no longer path with each takeover.
            for inner in formers_in(taken):
                durable.move(inner, self._new_place(_number_of(inner)))

    def _new_place(self, number: int) -> Path:
        self._count += 1
        return self._place / f"former-{number}.{self._number}-{self._count}"

    def _adopt(self, ingest: Path) -> None:
        """Copy a partial download: its writer may be alive, and have its files open."""
        target, staged = self._layout.ingests / ingest.name, self._layout.staging / ingest.name
        if target.exists():
            return
        try:
            copy_ingest(ingest, staged)
            durable.move(staged, target)
            log.info("partial download taken over", ingest=ingest.name)
        except (OSError, CachdError) as error:
            log.warning("partial download not taken over", ingest=ingest.name, reason=str(error))
            durable.remove_tree(staged)


def formers_in(place: Path) -> list[Path]:
    """What former writers had, and the writer with this work directory has not deleted."""
    return [path for path in place.glob("former-*") if _FORMER.fullmatch(path.name)]


def _number_of(former: Path) -> int:
    match = _FORMER.fullmatch(former.name)
    return int(match[1]) if match else 0


def _delete(former: Path) -> None:
    """Delete as much as possible. NFS and FUSE refuse it for files that a process has open."""
    for _ in range(_REMOVALS):
        for path in (*former.glob("*/*"), *former.glob("*"), former):
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    durable.remove_tree(path)
                else:
                    durable.unlink(str(path))
        if not former.exists():
            return
    log.warning("files of a former writer cannot be deleted yet", directory=str(former))
