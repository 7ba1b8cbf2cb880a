"""Fetches the missing blobs of one pull, all at once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, wait

from cachd.errors import CachdError, Cancelled, DiskFailed, NoSpace
from cachd.model import File
from cachd.store.space import Reservation
from cachd.transfer.attempt import Attempt
from cachd.transfer.download import Download

_SAMPLE_SECONDS = 0.5


def fetch(files: Iterable[File], attempt: Attempt, reservation: Reservation) -> None:
    """Fetch a blob for each of the files, the largest first. The first failure ends the other downloads.

    When a download that another pull started fails at that pull's origin, it is restarted from this origin.
    Raises the CachdError of a download, with the facts `bytes_done` and `bytes_total`.
    """
    progress, fetches = attempt.progress, _Fetches(attempt, reservation)
    try:
        for file in sorted(files, key=lambda f: -f.size):
            fetches.join(file)
        while fetches.unfinished:
            progress.sample()
            _lend_or_take_slot(attempt)
            fetches.wait()
            if progress.cancel_token.is_cancelled:
                raise Cancelled(
                    f"{attempt.spec.name}: cancelled after {progress.done} of {progress.total} bytes"
                )
        progress.sample()
        attempt.slot.take()
    except CachdError as error:
        error.facts = {**error.facts, "bytes_done": progress.done, "bytes_total": progress.total}
        raise
    finally:
        attempt.context.downloads.leave(fetches.joined)


def _lend_or_take_slot(attempt: Attempt) -> None:
    """Let another pull use the slot while hardly any byte of this one arrives; else keep it."""
    if attempt.progress.is_slow:
        attempt.slot.lend()
    else:
        attempt.slot.take()


class _Fetches:
    """The downloads that one pull has `joined`, and the file of each that is `unfinished`."""

    def __init__(self, attempt: Attempt, reservation: Reservation) -> None:
        self.joined: list[Download] = []
        self.unfinished: dict[Future[None], File] = {}
        self._attempt, self._reservation = attempt, reservation
        self._downloads, self._table = attempt.context.downloads, attempt.context.table()

    def join(self, file: File) -> None:
        """Start the file's download, or join the one that is running."""
        download = self._downloads.join(
            file,
            self._attempt.source,
            self._attempt.quota,
            scheme=self._attempt.spec.ref.scheme,
            reservation=self._reservation,
            prefix=self._table.limited_by(file.origin),
        )
        self.joined.append(download)
        self._attempt.progress.watch(download)
        self.unfinished[download.done] = file

    def wait(self) -> None:
        """Wait a moment for downloads to end. Raises the error of one that failed at this pull's origin."""
        self._downloads.claim(self._attempt.quota)
        ended, _ = wait(self.unfinished, timeout=_SAMPLE_SECONDS, return_when=FIRST_EXCEPTION)
        for future in ended:
            file = self.unfinished.pop(future)
            if self._failed_elsewhere(future, file):
                self.join(file)
            else:
                future.result()

    def _failed_elsewhere(self, future: Future[None], file: File) -> bool:
        """Whether a shared download failed at another origin than this file's own."""
        failure = future.exception()
        if failure is None or isinstance(failure, NoSpace | DiskFailed):
            return False
        return all(d.file.origin != file.origin for d in self.joined if d.done is future)
