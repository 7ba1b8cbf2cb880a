"""The resumable write of one blob: `Ingest` joins its data file, its journal and its digest.

ingest/<algorithm>-<hex>-<size>/
    data         the bytes                                        data_file.py
    about.json   for which blob, and from which source            about.py
    received     the parts that survive a crash of the daemon     journal.py
    journal      the parts that survive a crash of the node       journal.py
    owners       the names whose pulls need the blob              content/owners.py
"""

from cachd.store.ingest.ingest import Ingest

__all__ = ["Ingest"]
