"""Begins a download: with a proof, with a small file in one piece, or with an ingest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachd.errors import Unavailable
from cachd.transfer.download.assembly import Assembly
from cachd.transfer.download.proving import prove
from cachd.transfer.download.schedule import Stage
from cachd.transfer.download.small import MAX_BYTES, fetch_small

if TYPE_CHECKING:
    from cachd.transfer.download.download import Download
    from cachd.transfer.download.supplier import Supplier


def begin(download: Download, supplier: Supplier, buffer: memoryview) -> None:
    """Begin the download on the calling stream, in its stage `beginning`.

    The stage afterwards is `proving`, `fetching`, or `waiting` if nothing could begin. Raises what makes the
    supplier, or the download, fail.
    """
    schedule, content, file = download.schedule, download.content, download.file
    try:
        if content.has(file):
            schedule.stage = Stage.proving
            schedule.call_others(supplier)  # each proves on its own, and this proof may take long
            prove(download, supplier, buffer)
            return
        is_small = file.digest and 0 < file.size <= MAX_BYTES
        if is_small and not content.is_begun(file):
            fetch_small(download, supplier, buffer)
            return
        assembly = _with_space(download, supplier)
    except Unavailable as error:  # no file descriptor left for its ingest or its blob
        schedule.retry(supplier, download.commits, 0, error)
        return
    finally:
        if schedule.stage is Stage.beginning:
            schedule.stage = Stage.waiting
    if assembly is not None:
        assembly.begin(supplier)
        assembly.serve()
        schedule.call_others(supplier)
        assembly.work(supplier, buffer)


def _with_space(download: Download, supplier: Supplier) -> Assembly | None:
    """Begin the ingest; None, and nothing has begun, while a damaged blob's parts find no space."""
    content, file, blocks = download.content, download.file, download.blocks
    rest = max(file.size - content.allocated(file), 0)
    if not rest or not content.damaged.has(file.blob):
        return Assembly.begun(download, supplier)
    payer = blocks.payer()
    with payer.grant(rest, rest) as granted:
        if not granted:
            download.schedule.wait_for_space(supplier)
            return None
        assembly = Assembly.begun(download, supplier)
        blocks.took(assembly.ingest, granted, payer)
        return assembly
