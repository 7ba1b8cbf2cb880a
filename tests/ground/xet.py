"""A store that speaks the Xet protocol: hf_xet, the Hub's client, uploads to it and downloads from it.

    POST /v1/xorbs/default/XORB      up to 64 MiB of chunks, each after a head of 8 bytes
    POST /v1/shards                  which chunks of which xorbs a file consists of
    GET  /v1/reconstructions/FILE    the same for a range of the file, with a URL for each xorb

The specification is at https://huggingface.co/docs/xet. This is what hf_xet needs of it, with the settings of
`SETTINGS`. Whatever serves files, such as nginx, serves the xorbs.
"""

from __future__ import annotations

import json
import re
import struct
import threading
from bisect import bisect_right
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_XET_TELEMETRY_ENABLED": "0",
    "HF_XET_CLIENT_LEGACY_DIRECT_XORB_UPLOAD": "1",
    "HF_XET_CLIENT_SHARD_API_VERSION": "1",
    "HF_XET_CLIENT_RECONSTRUCTION_API_VERSION": "1",
}
_ENTRY = struct.Struct("<32sIIII")  # of a shard: a hash and four numbers
_OF_VERIFICATION, _OF_METADATA = 1 << 31, 1 << 30
_HEAD_BYTES = 8  # of a chunk: version, 3 bytes of its size, compression, 3 bytes of its unpacked size


@dataclass(frozen=True, slots=True)
class Term:
    """Chunks `first` to `stop` of one xorb, which are a part of a file."""

    xorb: str
    first: int
    stop: int


@dataclass(slots=True)
class Xorb:
    """Where each chunk begins, in the xorb and among its unpacked bytes. Both lists end with the size."""

    packed: list[int] = field(default_factory=lambda: [0])
    unpacked: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def parse(cls, content: bytes) -> Xorb:
        """Read the heads of the chunks. A footer may follow, whose first byte is no version."""
        found, at = cls(), 0
        while at + _HEAD_BYTES <= len(content) and content[at] == 0:
            at += _HEAD_BYTES + int.from_bytes(content[at + 1 : at + 4], "little")
            found.packed.append(at)
            size = int.from_bytes(content[found.packed[-2] + 5 : found.packed[-2] + 8], "little")
            found.unpacked.append(found.unpacked[-1] + size)
        return found


class XetStore(ThreadingHTTPServer):
    """The store, in a thread of its own. The xorbs are in `directory`, and `served` at this URL."""

    daemon_threads = False

    def __init__(self, directory: Path, served: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory, self.served = directory, served
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, list[Term]] = {}
        self._thread = threading.Thread(target=self.serve_forever, name="xet store")
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def add_xorb(self, name: str, content: bytes) -> None:
        """Keep a xorb."""
        (self.directory / name).write_bytes(content)
        self.xorbs[name] = Xorb.parse(content)

    def add_files(self, shard: bytes) -> None:
        """Keep what a shard says about files: entries of 48 bytes after a header of 48."""
        entries = _ENTRY.iter_unpack(shard[_ENTRY.size : len(shard) // _ENTRY.size * _ENTRY.size])
        for name, flags, count, *_ in entries:
            if name == b"\xff" * 32:
                return
            terms = [next(entries) for _ in range(count)]
            self.files[_hex(name)] = [Term(_hex(xorb), first, stop) for xorb, _, _, first, stop in terms]
            beside = count * bool(flags & _OF_VERIFICATION) + bool(flags & _OF_METADATA)
            for _ in range(beside):
                next(entries)

    def reconstruction(self, file: str, start: int, stop: int | None) -> dict[str, Any] | None:
        """The terms of a range of a file, cut at chunks; None if the file ends before it."""
        terms: list[dict[str, Any]] = []
        fetched: dict[str, list[dict[str, Any]]] = {}
        reached, skipped = 0, 0
        for term in self.files[file]:
            xorb = self.xorbs[term.xorb]
            ends = xorb.unpacked
            began, reached = reached, reached + ends[term.stop] - ends[term.first]
            if reached <= start or (stop is not None and began >= stop):
                continue
            base = ends[term.first] - began  # the place in the xorb is that in the file, plus this
            first = max(term.first, bisect_right(ends, start + base) - 1)
            last = term.stop if stop is None else min(term.stop, bisect_right(ends, stop + base - 1))
            if not terms:
                skipped = max(0, start + base - ends[first])
            chunks = {"start": first, "end": last}
            terms.append({"hash": term.xorb, "unpacked_length": ends[last] - ends[first], "range": chunks})
            extent = {"start": xorb.packed[first], "end": xorb.packed[last] - 1}
            url = f"{self.served}/{term.xorb}"
            fetched.setdefault(term.xorb, []).append({"range": chunks, "url": url, "url_range": extent})
        if not terms:
            return None
        return {"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetched}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: XetStore

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        *_, kind, _, name = f"//{self.path}".split("/")
        if kind == "xorbs":
            self.server.add_xorb(name, content)
            return self._answer(200, {"was_inserted": True})
        self.server.add_files(content)
        return self._answer(200, {"result": 1})

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        if "/v1/reconstructions/" not in self.path or asked is None:
            return self._answer(404, {})
        stop = int(asked[2]) + 1 if asked[2] else None
        found = self.server.reconstruction(name, int(asked[1]), stop)
        return self._answer(200 if found else 416, found or {})

    def _answer(self, status: int, document: object) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _hex(name: bytes) -> str:
    """A hash as Xet writes it: four numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", name))
