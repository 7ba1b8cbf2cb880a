"""Fetches the missing blobs of one pull, all at once."""

from __future__ import annotations

from collections.abc import Iterable

from cachd.errors import CachdError, Cancelled
from cachd.model import File
from cachd.store.space import Reservation
from cachd.transfer.attempt import Attempt
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.supplier import Supplier, Supply
from cachd.transfer.hedging import Hedging

_SAMPLE_SECONDS = 0.5


def fetch(files: Iterable[File], attempt: Attempt, reservation: Reservation) -> None:
    """Fetch a blob for each of the files, the largest first. The first failure ends the other downloads.

    Raises the CachdError of a download, with the facts `bytes_done` and `bytes_total`.
    """
    progress, fetches, quota = attempt.progress, _Fetches(attempt, reservation), attempt.quota
    ordered = sorted(files, key=lambda f: -f.size)
    quota.to_begin = len(ordered)  # known before the first one begins: it decides how large its parts are
    try:
        for file in ordered:
            fetches.join(file)
            quota.to_begin -= 1
        have_all_ended = False
        while not have_all_ended:
            progress.sample()
            _lend_or_take_slot(attempt)
            have_all_ended = fetches.wait()
            if progress.cancel_token.is_cancelled:
                raise Cancelled(
                    f"{attempt.spec.name}: cancelled after {progress.done} of {progress.total} bytes"
                )
        progress.sample()
        attempt.slot.take()
    except CachdError as error:
        error.bytes_done, error.bytes_total = progress.done, progress.total
        raise
    finally:
        quota.to_begin = 0
        attempt.context.downloads.leave(fetches.joined)


def _lend_or_take_slot(attempt: Attempt) -> None:
    """Let another pull use the slot while hardly any byte of this one arrives; else keep it."""
    if attempt.progress.is_slow:
        attempt.slot.lend()
    else:
        attempt.slot.take()


class _Fetches:
    """The downloads of one pull. `joined`: its suppliers in them."""

    def __init__(self, attempt: Attempt, reservation: Reservation) -> None:
        self.joined: list[Supplier] = []
        self._supply = Supply(attempt.source, attempt.spec.ref, attempt.quota, reservation, Outcomes())
        self._hedging = Hedging(attempt.quota)
        self._progress, self._downloads = attempt.progress, attempt.context.downloads
        self._table = attempt.context.table()

    def join(self, file: File) -> None:
        """Start the file's download, or become a supplier of the one that is running."""
        supplier = self._downloads.join(file, self._supply, prefix=self._table.limited_by(file.origin))
        self.joined.append(supplier)
        self._progress.watch(supplier.download.tally)

    def wait(self) -> bool:
        """Wait a moment for the downloads to end. Returns whether all have; raises the error of one."""
        self._downloads.claim(self._supply.quota)
        self._hedging.watch(self.joined)
        return self._supply.outcomes.wait(_SAMPLE_SECONDS)
