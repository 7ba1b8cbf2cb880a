"""Agrees which process may write to a root on a shared volume, without locks and without comparing clocks.

.cachd/nodes/
    <number>.writer     made once, by link(2); who has this fencing number: {"token", "who", "name", "spec"}
    <number>.beat       a counter that this process overwrites each second while it lives
    <number>.ended      the process gave up the right: {"error": … or null}
    <number>.work/      its ingest/, staging/ and trash/

The process with the highest number is the writer. Others may take the next number once `ended` exists, or
once they saw the same beat for DEAD_SECONDS. Each measures that by its own clock, from what it read itself.
docs/decisions/0011 gives the reasons, and says what is left at risk.

    absent --take--> taken --begin--> writing --end--> ended
                       └──────(another process takes a higher number)──────> fenced

`begin` moves the work directories of all former writers away. All that becomes visible is renamed from a work
directory, so a former writer that is not dead fails then, whatever it had checked before.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from cachd.errors import Cancelled, InUse
from cachd.files import UNREADABLE
from cachd.kernel import durable
from cachd.kernel.periodic import Periodic
from cachd.model import SizeOrPercent
from cachd.store.layout import PRIVATE_DIRECTORY, Layout
from cachd.store.root_lock import take_shared_lock
from cachd.store.takeover import Takeover, formers_in, move_ingests

log = structlog.get_logger(__name__)

BEAT_SECONDS = 1.0
DEAD_SECONDS = 10.0
_LATE_SECONDS = 3.0  # without a beat for so long, a writer asks whether it was fenced before it goes on
_LONGEST_STEP_SECONDS = 2.0  # that counts between two reads: the observer itself may have been stopped
_KEPT = 20  # numbers; an observer that read an older one finds a higher one when it checks
_DOCUMENT_BYTES = 64 << 10
_NUMBER = re.compile(r"([0-9]{1,12})\.writer")
_WORK = ("ingest", "staging", "trash")


@dataclass(frozen=True, slots=True)
class Writer:
    """The process that may write now. `who`: its pid and host. `name`, `spec`: the model that it pulls."""

    number: int
    who: str
    name: str
    spec: Mapping[str, Any]


class Nodes:
    """Observes the writers of one root. One thread uses it."""

    def __init__(
        self,
        root: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        unique: Callable[[int], str] = secrets.token_hex,
    ) -> None:
        self._layout, self._clock, self._unique = Layout(root), clock, unique
        self.directory = self._layout.nodes
        self.seen: tuple[int, bytes] = 0, b""  # the highest number, and its beat
        self._seen_at = clock()
        self._unchanged_seconds = 0.0

    def writer(self) -> Writer | None:
        """The process that may write now; None if nobody may, or if it seems to be dead. Raises OSError.

        To be called about once a second: a longer pause of the caller counts as two seconds.
        """
        number = newest_number(self._layout)
        seen = number, _read(self._file(number, "beat"))
        now = self._clock()
        if seen != self.seen:
            self.seen, self._unchanged_seconds = seen, 0.0
        else:
            self._unchanged_seconds += min(now - self._seen_at, _LONGEST_STEP_SECONDS)
        self._seen_at = now
        if not number or self.has_ended(number) or self._unchanged_seconds >= DEAD_SECONDS:
            return None
        about = _document(self._file(number, "writer"))
        spec = about.get("spec")
        return Writer(
            number,
            str(about.get("who") or "unknown"),
            str(about.get("name") or ""),
            spec if isinstance(spec, dict) else {},
        )

    def has_ended(self, number: int) -> bool:
        """Whether the writer with this number gave up its right."""
        return self._file(number, "ended").exists()

    def ended_with(self, number: int) -> Mapping[str, Any] | None:
        """The document of the final error of a writer that ended with one."""
        error = _document(self._file(number, "ended")).get("error")
        return error if isinstance(error, dict) else None

    def take(self, name: str, spec: Mapping[str, Any], *, fenced: Callable[[], object]) -> Term | None:
        """Take the next number, if `writer` was None just now; None if another process was faster.

        `fenced`: called in any thread of this process when it finds that another one took a higher number.
        The term holds the shared lock until it ends, so it touches nothing while a process uses the root
        alone: that is InUse. Raises OSError, CachdError.
        """
        lock, term = take_shared_lock(self._layout.lock), None
        try:
            term = self.take_locked(name, spec, fenced=fenced, lock=lock)
        finally:
            if term is None:
                os.close(lock)
        return term

    def take_locked(
        self,
        name: str,
        spec: Mapping[str, Any],
        *,
        fenced: Callable[[], object],
        lock: int | None = None,
    ) -> Term | None:
        """As `take`, if this process holds the root's lock. `lock`: its descriptor, which the term closes."""
        number, token = self.seen[0] + 1, self._unique(16)
        about = {"token": token, "who": _own_name(), "name": name, "spec": dict(spec)}
        staged, target = self._layout.nodes / f".{token}", self._file(number, "writer")
        durable.write_note(staged, json.dumps(about).encode())
        try:
            with suppress(FileExistsError):
                durable.link_new(staged, target)
        finally:
            durable.unlink(str(staged))
        # Over NFS, a link may be made though its answer was lost: the content says who made it.
        if _document(target).get("token") != token or newest_number(self._layout) != number:
            return None
        log.info("taking the shared volume", root=str(self._layout.root), number=number)
        return Term(self._layout.root, number, fenced=fenced, lock=lock)

    def _file(self, number: int, suffix: str) -> Path:
        return self._layout.nodes / f"{number}.{suffix}"


class Term:
    """The right of this process to write to a root, with its fencing number. See the module's states.

    Methods raise NoSpace or DiskFailed when the disk fails.
    """

    def __init__(
        self, root: Path, number: int, *, fenced: Callable[[], object], lock: int | None = None
    ) -> None:
        self.number, self._lock = number, lock
        self.work = f"{PRIVATE_DIRECTORY}/nodes/{number}.work"
        self._layout, self._common = Layout(root, self.work), Layout(root)
        self._place, self._fenced = root / self.work, fenced
        self._beats, self._beaten_at = 0, _uptime()
        self._thread = Periodic("beat", self._beat_until_fenced)

    def begin(self, *, reserve_free: SizeOrPercent = 0) -> None:
        """Begin to beat, and take over the partial downloads of former writers. Raises InUse if fenced.

        `reserve_free`: what the takeover leaves free on the disk.
        """
        with durable.disk_errors(self._layout.nodes):
            self._beat()
            self._thread.start(after=BEAT_SECONDS)
            for name in _WORK:
                (self._place / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            Takeover(self._layout, self.number, self.check, reserve_free=reserve_free).run()
            self._forget_old()
        self.check()

    def check(self) -> None:
        """Raises InUse (`fenced`), after a call of `fenced`, unless this process has the highest number."""
        with durable.disk_errors(self._layout.nodes):
            newest = newest_number(self._layout)
        if newest == self.number:
            return
        log.warning("another process took over", number=self.number, newest=newest)
        self._fenced()
        raise InUse(
            f"process {newest} took over {self._layout.root} from this one ({self.number})",
            code="fenced",
            hint="this process stood still for too long; run it again: it waits for the other one",
        )

    def check_if_late(self) -> None:
        """As `check`; returns at once if this process wrote a beat a moment ago."""
        if _uptime() - self._beaten_at > _LATE_SECONDS:
            self.check()

    def end(self, error: Mapping[str, Any] | None = None) -> None:
        """Give up the right, so that the next process need not wait.

        `error`: the pull's, if the same pull of others fails, too.
        Nothing may use the store any more. If this process was fenced, it only ends the beat.
        """
        self._thread.close()
        try:
            with durable.disk_errors(self._layout.nodes):
                if newest_number(self._layout) == self.number:
                    self._hand_over(error)
        finally:
            if self._lock is not None:
                os.close(self._lock)
            self._lock = None

    def _hand_over(self, error: Mapping[str, Any] | None) -> None:
        if self._layout.ingests.exists():  # `begin` may have failed before it made them
            move_ingests(self._layout, self._common)
        # A takeover that was interrupted stays for the next writer: it may have partial downloads.
        places = [self._place / name for name in _WORK] if formers_in(self._place) else [self._place]
        for place in places:
            try:
                durable.remove_tree(place)
            except OSError as kept:  # a file that a process has open: the next writer tries again
                log.warning("work directory not deleted yet", number=self.number, reason=str(kept))
        ended = self._layout.nodes / f"{self.number}.ended"
        durable.write_file(ended, json.dumps({"error": error}).encode())

    def _beat_until_fenced(self) -> float:
        try:
            self._beat()
        except InUse as error:
            raise Cancelled(error.detail) from error
        return BEAT_SECONDS

    def _beat(self) -> None:
        """Write the next beat. Raises what `check` does."""
        self.check()
        began, self._beats = _uptime(), self._beats + 1
        # In place and of one length, so that no client sees a stale or an empty file. It is not synced:
        # other processes shall see it, but it need not survive a crash.
        fd = durable.open_file(self._layout.nodes / f"{self.number}.beat", os.O_WRONLY | os.O_CREAT)
        try:
            durable.write_at(fd, memoryview(b"%020d\n" % self._beats), 0)
        finally:
            os.close(fd)
        self._beaten_at = began

    def _forget_old(self) -> None:
        for path in list(self._layout.nodes.iterdir()):
            number = path.name.partition(".")[0]
            if number.isdecimal() and int(number) <= self.number - _KEPT and not path.is_dir():
                durable.unlink(str(path))


def end_dead_writer(root: Path) -> None:
    """Take over from a writer that died, so that this process, which has locked the root, can use it alone.

    Returns at once if there is none; otherwise it takes DEAD_SECONDS. Raises InUse if that writer lives.
    """
    nodes = Nodes(root)
    with durable.disk_errors(nodes.directory):
        writer, first = nodes.writer(), nodes.seen
        while writer:
            time.sleep(BEAT_SECONDS)
            writer = nodes.writer()
            if nodes.seen != first:
                raise InUse(
                    f"another cachd ({writer.who if writer else 'unknown'}) pulls into {root}",
                    code="root_locked",
                    hint="wait until it ends; on a shared volume, use cachd pull --direct --shared",
                )
        is_dead = first[0] > 0 and not nodes.has_ended(first[0])
        has_left = any(nodes.directory.glob("[0-9]*.work"))
        if (is_dead or has_left) and (term := nodes.take_locked("", {}, fenced=lambda: None)):
            term.begin()
            term.end()


def newest_number(layout: Layout) -> int:
    """The highest fencing number of a root; 0 if nobody has ever had one. Raises OSError."""
    found = (_NUMBER.fullmatch(name) for name in os.listdir(layout.nodes))
    return max((int(match[1]) for match in found if match), default=0)


def _own_name() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _uptime(clock: Callable[[int], float] = time.clock_gettime) -> float:
    """Seconds that pass while the machine sleeps, too."""
    return clock(time.CLOCK_BOOTTIME)


def _read(path: Path) -> bytes:
    try:
        return durable.read_file(path, at_most=_DOCUMENT_BYTES)
    except FileNotFoundError:
        return b""


def _document(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it is missing or damaged."""
    try:
        found = durable.read_document(path, at_most=_DOCUMENT_BYTES)
    except UNREADABLE:
        return {}
    return found if isinstance(found, dict) else {}
