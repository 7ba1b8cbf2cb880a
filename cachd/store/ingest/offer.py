"""Offers the synced bytes of an ingest to readers who do not wait for its digest.

A reader must learn when the digest was wrong after it had got bytes. So the bytes of an ingest that readers
got are one numbered attempt. Two files remember it, and survive a crash of the node:

    ingest/<algorithm>-<hex>-<size>/attempt     the number of the attempt whose bytes are in this ingest
    streamed/<algorithm>-<hex>-<size>           the number of the last attempt of which a reader got a byte,
                                                and `verified` once its digest was right

    no attempt --claim: a reader wants the first byte--> offered
    offered --verify: the digest is right--> no record, or `verified` if an earlier attempt was wrong
    offered --withdraw: parts are fetched again, or the ingest goes--> no attempt; the next claim counts up

So a reader may go on with bytes of attempt N if the ingest has the attempt N, or the record says that N was
verified. If a record is left, an earlier attempt was never verified, and somebody may still have its bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cachd import files
from cachd.kernel import durable
from cachd.model import Extent
from cachd.policy.parts import Received
from cachd.store.ingest.records import Records

HELD_BYTES = 4 << 20  # the end of a file that no reader gets before the digest is right: a part, at least
_MAX_BYTES = 64
_SYNC_SECONDS, _FOLLOWED_SECONDS = 0.25, 60.0
_VERIFIED, _TOKEN = "verified", "attempt"


class Offer:
    """The bytes of one blob that readers may have before it is verified. Safe from any thread.

    `size`: bytes of the blob. `directory`: of its ingest. `record`: the path of its file in streamed/, one of
    `records`. An ingest opens the offer, adds to it and ends it; readers claim, wait and read.
    """

    def __init__(
        self,
        size: int,
        directory: Path,
        record: Path,
        records: Records | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._records = clock, records or Records(record.parent)
        self.size, self._directory, self._record = size, directory, record
        self._changed = threading.Condition()
        self._received = Received()
        self._is_open = self._is_verified = False
        self._attempt: int | None = None
        self._changes = 0
        self._awaited = 0  # where the reader that asked last waits
        self._followed_until = -_FOLLOWED_SECONDS
        self._synced_at = -_SYNC_SECONDS

    @property
    def data(self) -> Path:
        """The file with the bytes."""
        return self._directory / "data"

    # --- for the ingest ---

    def open(self, parts: Iterable[Extent], *, is_complete: bool) -> None:
        """Offer the parts that an earlier process synced. `is_complete`: whether none of them was lost.

        Raises OSError.
        """
        with self._changed:
            self._is_open, self._is_verified = True, False
            if not is_complete:
                durable.remove(self._token)
            self._attempt = _number(self._token)
            for part in parts:
                self._received.add(part)
            self._tell()

    def add(self, parts: Iterable[Extent]) -> None:
        """Offer parts that are synced."""
        with self._changed:
            for part in parts:
                self._received.add(part)
            self._tell()

    def wants_sync(self, kept: Extent) -> bool:
        """Whether a reader waits for kept bytes, which the caller shall sync; four times a second at most."""
        now = self._clock()
        if now > self._followed_until or not kept.start <= self._awaited < kept.stop:
            return False
        with self._changed:
            if now - self._synced_at < _SYNC_SECONDS:
                return False
            self._synced_at = now
            return True

    def withdraw(self) -> None:
        """Offer nothing: some bytes were wrong, or are about to be removed. Raises DiskFailed or NoSpace."""
        with self._changed, durable.disk_errors(self._directory):
            self._received, self._attempt = Received(), None
            durable.remove(self._token)
            self._tell()

    def verify(self) -> None:
        """Note that the digest of all bytes is right. Call it before the blob is here. Raises DiskFailed."""
        with self._changed, durable.disk_errors(self._directory):
            self._is_verified = True
            if self._attempt is not None and _number(self._record) == self._attempt:
                if self._attempt == 1:
                    self._records.remove(self._record)
                else:
                    self._records.write(self._record, f"{self._attempt} {_VERIFIED}")

    def close(self) -> None:
        """Offer nothing until the ingest is opened again."""
        with self._changed:
            self._received, self._is_open = Received(), False
            self._tell()

    def tell(self) -> None:
        """Wake the readers: the blob is here, or will not come."""
        with self._changed:
            self._tell()

    def _tell(self) -> None:
        self._changes += 1
        self._changed.notify_all()

    @property
    def _token(self) -> Path:
        return self._directory / _TOKEN

    # --- for readers ---

    @property
    def next_attempt(self) -> int:
        """The number that a claim would return now. Raises OSError."""
        with self._changed:
            return self._next()

    def _next(self) -> int:
        last, current = _number(self._record), _number(self._token)
        if last is None:
            return current or 1
        return last if current == last else last + 1

    def follow(self, at: int) -> None:
        """Have the bytes from `at` on synced soon, also within a part, because a reader waits for them."""
        self._awaited, self._followed_until = at, self._clock() + _FOLLOWED_SECONDS

    def claim(self) -> int | None:
        """The attempt whose bytes are offered now, recorded durably. None if no byte may be read yet.

        Raises NoSpace, DiskFailed or Unavailable.
        """
        with self._changed, durable.disk_errors(self._directory):
            if not (self._is_open and self._received.bytes):
                return None
            if self._is_verified:  # the blob is about to be here, and nothing more is recorded
                return self._attempt
            if self._attempt is None or _number(self._record) != self._attempt:
                number = self._next()
                self._records.write(self._record, str(number))
                durable.write_file(self._token, str(number).encode(), mode=0o600)
                self._attempt = number
            return self._attempt

    def is_right(self, attempt: int) -> bool:
        """Whether a verified blob has all bytes that readers got of an attempt. Raises OSError.

        Of an attempt above the recorded one nobody got a byte.
        """
        with self._changed:
            if not self._record.exists():
                return True
            last = _number(self._record)
            if last is None or attempt < last:
                return False
            return attempt > last or _text(self._record).endswith(_VERIFIED)

    @property
    def has_wrong_readers(self) -> bool:
        """Whether somebody may still have bytes of an attempt that was never verified."""
        with self._changed:
            return self._record.exists()

    def until(self, attempt: int, offset: int) -> int | None:
        """The end of the bytes from `offset` on that a reader of an attempt may have; None if it is over."""
        with self._changed:
            if self._is_open and self._attempt != attempt:
                return None
            reached = next((gap for gap in self._received.gaps(self.size) if gap.stop > offset), None)
            stop = self.size if reached is None else max(reached.start, offset)
            return max(offset, min(stop, self.size - HELD_BYTES)) if self._is_open else offset

    def wait(self, changes: int, seconds: float) -> int:
        """Wait until something has changed since `changes`, or the time is over; the count of changes."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes != changes, seconds)
            return self._changes


def end_attempt(directory: Path) -> None:
    """Durably end the attempt of an ingest whose directory is about to be removed. Raises OSError."""
    durable.remove(directory / _TOKEN)


def _text(path: Path) -> str:
    try:
        return durable.read_file(path, at_most=_MAX_BYTES).decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError, files.TooLong):
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file."""
    number = _text(path).partition(" ")[0]
    return int(number) if number.isascii() and number.isdecimal() else None
