"""Downloads one file from its suppliers: parts are written into an ingest, verified and committed.

    download.py    the life of one download: who joins, who leaves, how it ends
    beginning.py   how it begins: with a proof, a small file, or an ingest
    supplier.py    one pull's source of the file
    outcomes.py    what a pull waits for: the ends of all its downloads
    suppliers.py   which supplier may take the next part
    schedule.py    queues the turns of the suppliers on the streams, now or after a wait
    part.py        an extent that is being fetched, and the queue of those that no stream fetches now
    assembly.py    the states of a file that arrives in parts: fetching, hashing, repair, commit
    turn.py        a stream's turn at a part: from the request to the journal
    following.py   the digest follows the bytes
    vouchers.py    which origin sent which part, and whose parts are fetched again after a wrong digest
    blocks.py      pays for disk blocks from the reservations of the pulls
    small.py       a small file, received in one buffer and written without an ingest
    proving.py     a supplier proves that it has a blob that is here already
    tally.py       how far the download is

Every pull that asks for a file brings a supplier: its source, and the file as that source lists it. The size
and the digest come from the manifest and are equal for all; the bytes may come from any supplier. A part that
breaks off is resumed where it stopped, by whichever supplier may take it next.

Retries happen only here. After more than `retries` failures of one supplier without 64 KiB of progress
between them, the supplier fails, and its pull with it. The download continues if it has another supplier.
"""
