"""Finds the offer of a blob, for the ingest that fills it and for those who read along."""

from __future__ import annotations

import threading
from weakref import WeakValueDictionary

from cachd.model import Digest, File
from cachd.store.ingest import Offer
from cachd.store.ingest.records import Records
from cachd.store.layout import Layout


class Offers:
    """The offers that an ingest or a reader uses now, one for each blob and size. Safe from any thread."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._records = layout, Records(layout.all_streamed)
        self._lock = threading.Lock()
        self._used: WeakValueDictionary[tuple[Digest, int], Offer] = WeakValueDictionary()

    def of(self, file: File) -> Offer:
        """The offer of a file's blob. It lasts as long as somebody has it."""
        key = file.blob, file.size
        with self._lock:
            offer = self._used.get(key)
            if offer is None:
                offer = self._used[key] = Offer(
                    file.size, self._layout.ingest(*key), self._layout.streamed(*key), self._records
                )
            return offer

    def tell(self, file: File) -> None:
        """Wake those who read along, because the file's blob is here."""
        with self._lock:
            offer = self._used.get((file.blob, file.size))
        if offer is not None:
            offer.tell()
