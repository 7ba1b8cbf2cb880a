"""Waits until this process may write to a root on a shared volume, or until another one made its model ready.

store/nodes.py has the protocol. `cachd pull --direct` is the only caller: no daemon uses such a root together
with others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachd.errors import error_of
from cachd.files import UNREADABLE
from cachd.kernel import durable
from cachd.model import ModelSpec, Snapshot
from cachd.store.catalog import ready_snapshot
from cachd.store.layout import Layout
from cachd.store.nodes import Nodes, Term, Writer
from cachd.store.opening import check_format
from cachd.store.root import check_root, make_directories

_POLL_SECONDS = 0.5
_STATUS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Waited:
    """The process that is waited for, and how far its pull is, as its status file says.

    `rate`: bytes per second.
    """

    writer: Writer
    state: str
    done: int
    total: int
    rate: int


def take_turn(
    root: Path,
    spec: ModelSpec,
    *,
    accepts_ready: bool,
    waits: Callable[[Waited], object],
    fenced: Callable[[], object],
) -> Term | Snapshot:
    """The right to write to the root, or the snapshot of the spec as soon as it is ready.

    `accepts_ready`: whether a ready snapshot is enough. `waits`: called twice a second while another process
    may write; it may raise, and so may a signal handler. `fenced`: as for `Nodes.take`.

    Raises the error of another process's pull of the same spec, if that error concerns all processes, and
    CachdError if the root cannot be used.
    """
    layout, asked = Layout(root), json.loads(json.dumps(spec.as_document()))
    check_root(root)
    with durable.disk_errors(root):
        check_format(layout)
        make_directories(root)
        nodes, before = Nodes(root), None
        while True:
            ready = ready_snapshot(layout, spec.name) if accepts_ready else None
            if ready and ready.spec == spec:
                return ready
            writer = nodes.writer()
            if before and before.spec == asked and (error := nodes.ended_with(before.number)):
                raise error_of(error)
            if writer:
                before = writer
                waits(_waited(layout, writer))
                time.sleep(_POLL_SECONDS)  # a signal ends it
            elif term := nodes.take(spec.name, asked, fenced=fenced):
                return term


def _waited(layout: Layout, writer: Writer) -> Waited:
    status: Mapping[str, Any] = {}
    try:
        path = layout.status_file(writer.name)
        status = durable.read_document(path, at_most=_STATUS_BYTES)
        done, total = int(status["bytes"]["done"]), int(status["bytes"]["total"])
        return Waited(writer, str(status["state"]), done, total, int(status["rate_bytes_per_second"]))
    except UNREADABLE:
        return Waited(writer, "resolving", 0, 0, 0)
