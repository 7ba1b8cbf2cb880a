"""Waits until another daemon on this node gives up the root.

Two daemons may overlap: the pod of a node is replaced, or somebody starts a second one. The second one lives
and is not ready until the first one has ended. Then it takes over at once, with the sockets that it has:

    /livez      200
    the rest    503 `root_locked`, with the process for which it waits

An address on which the first daemon listens (hostNetwork) is bound when that daemon has ended.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import structlog

from cachd.api.listeners import Opened, Sockets
from cachd.api.server import STOP_SIGNALS, serve_until
from cachd.api.standby import standby
from cachd.config import Config
from cachd.daemon.listen import certified
from cachd.errors import CachdError
from cachd.kernel import threads
from cachd.kernel.notices import Notices
from cachd.kernel.periodic import Periodic
from cachd.store.root_lock import wait_until_free

log = structlog.get_logger(__name__)

_TICK_SECONDS = 30.0
_LOGGED_AGAIN = 20  # ticks: every ten minutes
_CLOSING_SECONDS = 5.0  # until the kernel has closed all sockets of a daemon that was killed


class StoppedWaiting(Exception):
    """SIGTERM or SIGINT ended the wait."""


class Waiting:
    """The wait of a daemon for its root. It opens `sockets` as far as it can; who made them closes them."""

    def __init__(self, config: Config, sockets: Sockets) -> None:
        self._config, self._sockets = config, sockets
        self._patience_seconds = 0.0

    def until_free(self, refusal: CachdError, lock: Path) -> None:
        """Return when nobody holds the lock of the root any more. `refusal` says who holds it now.

        Raises StoppedWaiting at SIGTERM and SIGINT, and CachdError if this daemon cannot listen.
        """
        self._patience_seconds = _CLOSING_SECONDS
        free, notes = Future[None](), _Notes(refusal)
        with _stoppable(free), certified(self._config) as certificate:
            notes.log()
            threads.start([threading.Thread(target=_wait, args=(free, lock), name="root lock", daemon=True)])
            with closing(Periodic("waiting", notes.tick)) as ticks:
                ticks.start()
                listeners = self._sockets.open_free()
                for each in listeners:
                    log.info("answering probes", **each.place())
                serve_until(free, standby(refusal), listeners, certificate)
        log.info("the root is free", root=str(self._config.root))

    @contextmanager
    def listening(self) -> Iterator[list[Opened]]:
        """All sockets, which the exit closes. Raises InUse, Forbidden or Invalid."""
        with self._sockets:
            yield self._sockets.open_all(patience_seconds=self._patience_seconds)


class _Notes:
    """Says in the log, and to the service manager, that the daemon waits."""

    def __init__(self, refusal: CachdError) -> None:
        self._refusal, self._notices, self._ticks = refusal, Notices(os.environ), 0

    def log(self) -> None:
        log.warning("waiting for another daemon to end", code=self._refusal.code, reason=self._refusal.detail)

    def tick(self) -> float:
        self._notices.waiting(self._refusal.detail, for_seconds=2 * _TICK_SECONDS)
        self._ticks += 1
        if self._ticks % _LOGGED_AGAIN == 0:
            self.log()
        return _TICK_SECONDS


@contextmanager
def _stoppable(free: Future[None]) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the wait for `free`: then the exit raises StoppedWaiting.

    Otherwise it raises what `free` failed with, if it did, and the handlers are what they were before.
    """
    before = [(n, signal.signal(n, lambda *_: _end(free, StoppedWaiting()))) for n in STOP_SIGNALS]
    yield
    free.result()
    for number, handler in before:
        signal.signal(number, handler)


def _wait(free: Future[None], lock: Path) -> None:
    try:
        wait_until_free(lock)
    except (CachdError, OSError) as error:
        _end(free, error)
    else:
        _end(free)


def _end(free: Future[None], error: Exception | None = None) -> None:
    """End the wait. Only the first end counts."""
    with suppress(InvalidStateError):
        if error:
            free.set_exception(error)
        else:
            free.set_result(None)
