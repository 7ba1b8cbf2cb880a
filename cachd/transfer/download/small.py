"""Fetches a small file into the stream's buffer and writes the blob from there, without an ingest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachd.errors import Cancelled, Corrupt, Unavailable
from cachd.model import Extent
from cachd.transfer.download.assembly import Assembly, ask_anew, explained
from cachd.transfer.download.blocks import NoSpaceNow
from cachd.transfer.download.part import Part
from cachd.transfer.download.supplier import Supplier
from cachd.transfer.download.turn import YIELD_AFTER_SECONDS, keep, write

if TYPE_CHECKING:
    from cachd.transfer.download.download import Download

_STEP_BYTES = 64 << 10


def fetch_small(download: Download, supplier: Supplier, buffer: memoryview) -> None:
    """Fetch the complete file and commit it.

    If the transfer breaks off or yields to another pull, the rest of the file is fetched as a part of an
    ingest. Raises what makes the supplier, or the download, fail.
    """
    size = download.file.size
    if download.tally.is_waiting_for_space and not download.blocks.has_space_again(size):
        download.schedule.wait_for_space(supplier)
        return
    streams, clock = download.engine.streams, download.engine.clock
    content, part = buffer[:size], Part(Extent(0, size))
    supplier.running += 1
    received, error = 0, None
    try:
        with supplier.open(part.extent, part) as body:
            began = clock()
            while received < size and not supplier.is_stopped:
                if clock() - began > YIELD_AFTER_SECONDS and streams.should_yield(supplier.quota):
                    break
                received += len(supplier.read(body, content[received : received + _STEP_BYTES]))
    except (Unavailable, Cancelled) as broken:
        error = broken
    finally:
        supplier.running -= 1
    if received == size:
        _put(download, supplier, content)
    else:
        _go_on_in_parts(download, supplier, part, content[:received], error)


def _put(download: Download, supplier: Supplier, content: memoryview) -> None:
    """Write the content as a blob."""
    blocks, size = download.blocks, len(content)
    payer = blocks.payer()
    with payer.grant(size, size) as granted:
        if not granted:
            download.tally.forget(size)
            download.schedule.wait_for_space(supplier)
            return
        download.tally.is_waiting_for_space = False
        try:
            download.content.put(supplier.file, content)  # point of no return: the blob is here
        except Corrupt as error:
            payer.return_unused(granted)
            if supplier.wrong:
                raise explained(error, supplier.wrong) from None
            supplier.wrong = error.got or ""
            ask_anew(supplier, size, "source")
            return
    blocks.spend_in_others(payer, size)
    download.end(None)


def _go_on_in_parts(
    download: Download,
    supplier: Supplier,
    part: Part,
    content: memoryview,
    error: Unavailable | Cancelled | None,
) -> None:
    """Begin an ingest for a small file that is not complete, with the content received so far."""
    download.blocks.begin_ingest()
    assembly = Assembly.begun(download, supplier)
    part.sender, part.hash = supplier, assembly.ingest.part_hash()
    try:
        if content:
            assembly.blocks.allocate(assembly.ingest, part, len(content))
            write(assembly, part, content)
            keep(assembly, part)
    except NoSpaceNow:  # these bytes are fetched again
        download.schedule.wait_for_space()
    try:
        if error is not None:
            assembly.broke_off(supplier, part, error)
    finally:
        assembly.parts.put_back(part)
        assembly.serve()
