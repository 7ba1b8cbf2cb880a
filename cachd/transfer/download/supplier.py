"""One pull's source of a file: asks it for bytes, and tells the pull how the download ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachd.errors import CachdError, Cancelled, Unavailable
from cachd.kernel import threads
from cachd.model import Extent, File, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.source import Body, Source
from cachd.store.space import Reservation
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.part import Part
from cachd.transfer.engine import Engine
from cachd.transfer.streams import SLOW_SECONDS, Asking, StreamQuota

if TYPE_CHECKING:
    from cachd.transfer.download.download import Download
    from cachd.transfer.download.proving import Proving

NO_RANGES_SLOW_SECONDS = 30.0  # more patience, because a file without ranges starts over from byte 0
_MEASURED_SECONDS = 2.0


class GaveWay(Unavailable):
    """Hardly any bytes came, so the stream was given to another pull, or the part to another supplier."""


class Busy(Unavailable):
    """The origin serves other requests and refused this one. It takes no more at once; this is no failure."""


@dataclass(frozen=True, slots=True)
class Supply:
    """What one pull brings to the downloads of all its files.

    `source` sends the bytes of `ref`, which is for limits and metrics. `quota`: the pull's work for the
    streams. `reservation`: its disk space. `outcomes` counts how its downloads end.
    """

    source: Source
    ref: Ref
    quota: StreamQuota
    reservation: Reservation
    outcomes: Outcomes


class Supplier:
    """One pull's source of a file, made from the pull's `supply`.

    When the blob is here for this pull, or cannot be had, it reports to the supply's `outcomes`.

    `file`: the file as this source lists it; size and digest are those of every supplier. `prefix`: the entry
    of `sources` whose bandwidth limit applies to the file; empty if none does. `turns`: the requests that
    run, each with its part. `queued`: turns that wait for a stream. `pace`: bytes per second of one request,
    None before it was measured. `is_benched`: it was much slower than another one. `wrong`: the digest of a
    complete file from this source, if it was wrong. `vouched`: bytes of the file that it sent.
    """

    def __init__(self, file: File, supply: Supply, engine: Engine, *, prefix: str = "") -> None:
        self.file, self.origin = file, file.origin
        self.source, self.quota = supply.source, supply.quota
        self.reservation, self.outcomes = supply.reservation, supply.outcomes
        self.has_ended = False
        self.cancel_token = CancelToken()
        self.download: Download  # set when it joins one
        self.proving: Proving | None = None
        self.listener = engine.listeners.of(supply.ref)
        self.is_stopped = False
        self.has_ranges = True
        self.is_benched = self.was_measured = False
        self.called_at = math.inf
        self.wrong, self.vouched = "", 0
        self.queued = self.running = self.sent = 0
        self.pace: float | None = None
        self.rests_until = 0.0
        self.turns: dict[Asking, Part] = {}
        self._server = engine.streams.origins.of(file.origin)
        self.quota.server = self.quota.server or self._server
        self._engine, self._scheme, self._prefix = engine, supply.ref.scheme, prefix
        self._mark = 0.0, 0  # when `pace` was last measured, and the bytes sent until then

    def turn(self, buffer: memoryview) -> None:
        """Work on the download. Runs on a stream."""
        self.download.turn(self, buffer)

    def turn_later(self, buffer: memoryview) -> None:
        """Work on the download after a wait. Runs on a stream."""
        self.called_at = math.inf
        self.queued += 1
        self.download.turn(self, buffer)

    def stop(self) -> None:
        """Abort its requests. The threads that work for it leave soon."""
        self.is_stopped = True
        self.cancel_token.cancel()

    def end(self, outcome: CachdError | None) -> None:
        """Stop, and tell the pull. Called once."""
        if not self.is_stopped:
            self.stop()
        self.proving = None
        self._engine.streams.more_files(self.quota, -1)
        self.has_ended = True
        if outcome is None:
            self.reservation.committed(self.file.blob)
        self.outcomes.note(outcome)

    @contextmanager
    def open(self, extent: Extent, part: Part) -> Iterator[Body]:
        """Request an extent from the source, for `part`. Its end aborts the request.

        Raises GaveWay when the stream or the part is taken, and what `Source.open` raises.
        """
        patience = SLOW_SECONDS if self.has_ranges else NO_RANGES_SLOW_SECONDS
        is_answered = False
        with (
            self._engine.streams.asking(self.quota, patience) as asking,
            self.cancel_token.reaches(asking),
        ):
            self.turns[asking] = part
            try:
                with self._ask(extent, asking) as body, self._server.serving(), asking.reaches(body):
                    is_answered = True
                    yield body
            except (Unavailable, Cancelled) as error:
                if asking.is_taken and not self.is_stopped:
                    raise GaveWay(f"{self.file.path}: its stream was taken for another pull") from error
                if is_answered and isinstance(error, Unavailable):
                    self.listener.failed(error)
                raise
            finally:
                del self.turns[asking]

    def _ask(self, extent: Extent, cancel_token: CancelToken) -> Body:
        began = self._engine.clock()
        try:
            with threads.given(self.file.path):
                opened = self.source.open(self.file, extent, cancel_token)
        except CachdError as error:
            self.listener.refused(error)
            if self._server.refused(error):
                raise Busy(error.detail, code=error.code, origin_status=error.origin_status) from error
            raise
        self.listener.answered(self._engine.clock() - began)
        return opened

    def read(self, body: Body, view: memoryview) -> memoryview:
        """Wait for the bandwidth limits, then receive the next bytes. Returns what they fill of `view`."""
        bandwidth, clock = self._engine.bandwidth, self._engine.clock
        wanted = min(len(view), self.quota.read_bytes)
        allowed = bandwidth.allow(self._scheme, wanted, self.cancel_token, prefix=self._prefix)
        self._engine.streams.waits_for(allowed)
        began = clock()
        count = body.readinto(view[:allowed])
        seconds = clock() - began
        self.quota.note_read(count, seconds)
        self.sent += count
        self.download.tally.add(count)
        self.listener.received(count, seconds)
        self._engine.streams.received(count)
        return view[:count]

    def skip(self, body: Body, count: int, buffer: memoryview) -> None:
        """Receive and drop the next `count` bytes."""
        while count > 0 and not self.is_stopped:
            count -= len(self.read(body, buffer[:count]))

    # --- how fast it is ---

    def measure(self, now: float) -> None:
        """Measure `pace` when it has received for two seconds since the last time."""
        since, before = self._mark
        is_idle = not self.running and self.sent == before
        if is_idle or not since:
            self._mark = now, self.sent
        elif now - since >= _MEASURED_SECONDS:
            self.pace = (self.sent - before) / (now - since) / max(self.running, 1)
            self.was_measured = True
            self._mark = now, self.sent

    def give_parts_away(self) -> None:
        """End every request; their parts go to whoever may take them."""
        for asking in list(self.turns):
            asking.take()

    def bench(self) -> None:
        """Take no part until it is released."""
        self.is_benched = True
        self.give_parts_away()

    def release(self, now: float) -> None:
        """Take parts again, and be measured anew."""
        if self.is_benched:
            self.is_benched, self.pace, self._mark = False, None, (now, self.sent)
