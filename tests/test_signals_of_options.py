"""The thread that writes this node's signals, built as the options say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachd.cluster.signals import NodeSignals
from cachd.config import Loaded, read
from cachd.daemon.parts import assembled
from cachd.daemon.reload import Reload
from cachd.daemon.signals import node_signals, running
from cachd.report.events import EventLog
from cachd.upkeep.prewarm import Prewarm

ON = {"node_labels": True, "node_name": "node-1", "kubernetes_url": "https://127.0.0.1:1"}


def made(loaded: Loaded) -> NodeSignals | None:
    with assembled(loaded.config) as daemon:
        reload = Reload(loaded, daemon)
        prewarm = Prewarm(daemon.pulls, daemon.store, daemon.warms, reload.poll)
        return node_signals(loaded.config, daemon, prewarm, reload, EventLog())


@pytest.fixture
def signals(root: Path) -> Iterator[NodeSignals]:
    found = made(read(root=root, reserve_free=0, **ON))
    assert isinstance(found, NodeSignals)
    yield found
    found.close()


def test_without_an_option_there_are_no_signals(root: Path) -> None:
    assert made(read(root=root, reserve_free=0, node_name="node-1")) is None
    before = threading.active_count()
    with running(None):
        assert threading.active_count() == before


def test_the_signals_are_written_by_a_thread_while_the_block_lasts(signals: NodeSignals) -> None:
    before = set(threading.enumerate())
    with running(signals):
        assert set(threading.enumerate()) - before
    assert set(threading.enumerate()) <= before
