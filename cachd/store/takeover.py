"""Moves the work of former writers of a shared volume into the work directory of the new one (nodes.py).

<number>.work/former-<former number>.<number>-<count>/    what a former writer had; deleted once it is adopted
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from cachd.errors import CachdError
from cachd.kernel import durable
from cachd.model import SizeOrPercent, amount_in
from cachd.store.ingest.copies import bytes_to_copy, copy_ingest
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)

_FORMER = re.compile(r"former-([0-9]+).*")
_SPARE_BYTES = 64 << 20  # that a copy leaves free, beside the reserve: other processes write, too
_REMOVALS = 20  # a former writer may make new files while its directory is removed


class Takeover:
    """Takes over from the writers with lower numbers than `number`. `check` raises if a higher one exists.

    `layout`: that of the new writer. `reserve_free`: what copies leave free on the disk.
    Methods raise OSError, and what `check` raises.
    """

    def __init__(
        self, layout: Layout, number: int, check: Callable[[], object], *, reserve_free: SizeOrPercent
    ) -> None:
        self._layout, self._common, self._number, self._check = layout, Layout(layout.root), number, check
        self._place = layout.root / layout.work
        self._reserve_free, self._count = reserve_free, 0

    def run(self) -> None:
        """Fence the former writers, and take over their partial downloads."""
        self._fence()
        move_ingests(self._common, self._layout, self._check)
        self._take_leftovers()
        formers = formers_in(self._place)
        for former in formers:
            for name in ("staging", "trash"):  # they may take the space that copies need
                _delete(former / name)
        self._adopt_all(formers)
        for former in formers:
            if not _delete(former):
                log.warning("files of a former writer cannot be deleted yet", directory=str(former))

    def _take_leftovers(self) -> None:
        """Move what a process that used the root alone left half done to the trash, which is emptied next."""
        for place in (self._common.staging, self._common.trash):
            for left in place.iterdir():
                self._count += 1
                self._check()
                durable.move(left, self._layout.trash / f"{left.name}.{self._count}")

    def _adopt_all(self, formers: list[Path]) -> None:
        """Adopt their partial downloads. The oldest are dropped until there is space to copy the newest."""
        ingests = [path for former in formers for path in (former / "ingest").glob("*")]
        ingests.sort(key=lambda path: (_modified(path), _number_of(path.parent.parent)))
        while ingests:
            if self._has_ended(ingests[-1]):
                self._adopt(ingests.pop(), durable.move)
            elif self._fits(ingests[-1]):
                self._adopt(ingests.pop(), copy_ingest)
            else:
                oldest = ingests.pop(0)
                log.warning("partial download dropped: no space to take it over", ingest=oldest.name)
                _delete(oldest)

    def _has_ended(self, ingest: Path) -> bool:
        """Whether the writer of a partial download says that it writes no more."""
        return (self._layout.nodes / f"{_number_of(ingest.parent.parent)}.ended").exists()

    def _fits(self, ingest: Path) -> bool:
        """Whether a copy leaves free what must stay free."""
        disk = os.statvfs(self._place)
        total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        try:
            need = bytes_to_copy(ingest)
        except (OSError, CachdError):
            return True  # it cannot be copied: `_adopt` says why
        return need + _SPARE_BYTES + amount_in(total, self._reserve_free) <= free

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

    def _adopt(self, ingest: Path, transfer: Callable[[Path, Path], None]) -> None:
        """Copy a partial download if its writer may be alive, and have its files open; else rename it."""
        target, staged = self._layout.ingests / ingest.name, self._layout.staging / ingest.name
        if not target.exists():
            try:
                transfer(ingest, staged)
                durable.move(staged, target)
                log.info("partial download taken over", ingest=ingest.name)
            except (OSError, CachdError) as error:
                log.warning("partial download not taken over", ingest=ingest.name, reason=str(error))
                durable.remove_tree(staged)
        _delete(ingest)


def move_ingests(source: Layout, target: Layout, check: Callable[[], object] = lambda: None) -> None:
    """Move the partial downloads that `target` lacks. `check` is called before each. Raises OSError."""
    for ingest in source.ingests.iterdir():
        if not (target.ingests / ingest.name).exists():
            check()
            durable.move(ingest, target.ingests / ingest.name)


def formers_in(place: Path) -> list[Path]:
    """The work directories of former writers that the writer with this one has not deleted yet."""
    return [path for path in place.glob("former-*") if _FORMER.fullmatch(path.name)]


def _number_of(former: Path) -> int:
    match = _FORMER.fullmatch(former.name)
    return int(match[1]) if match else 0


def _modified(ingest: Path) -> float:
    """The time of the last write to its data, to compare partial downloads; 0 if it has none."""
    try:
        return (ingest / "data").stat().st_mtime
    except OSError:
        return 0.0


def _delete(directory: Path) -> bool:
    """Delete as much as possible; whether that is all. NFS and FUSE refuse to delete files that are open."""
    for _ in range(_REMOVALS):
        for path in (*directory.glob("*/*"), *directory.glob("*"), directory):
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    durable.remove_tree(path)
                else:
                    durable.unlink(str(path))
        if not directory.exists():
            return True
    return False
