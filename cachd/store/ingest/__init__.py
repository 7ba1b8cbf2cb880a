"""The resumable write of one blob: `Ingest` joins its data file, its journal and its digest.

ingest/<algorithm>-<hex>-<size>/
    data         the bytes                                        data_file.py
    about.json   for which blob, and from which source            about.py
    received     the parts that survive a crash of the daemon     journal.py
    journal      the parts that survive a crash of the node       journal.py
    attempt      the number of the attempt that readers get       offer.py
    owners       the names whose pulls need the blob              content/owners.py
"""

from cachd.store.ingest.ingest import Ingest
from cachd.store.ingest.offer import HELD_BYTES, Offer

__all__ = ["HELD_BYTES", "Ingest", "Offer"]
