"""Builds what tells Kubernetes about this node, if an option turns it on.

Its code is imported only then: a daemon without it neither asks the Kubernetes API nor pays for it.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING

from cachd.config import Config
from cachd.daemon.parts import Daemon
from cachd.daemon.reload import Reload
from cachd.report.events import EventLog
from cachd.upkeep.prewarm import Prewarm

if TYPE_CHECKING:
    from cachd.cluster.api_server import Place
    from cachd.cluster.signals import NodeSignals

_BY_NAME = "https://kubernetes.default.svc:443"


def node_signals(
    config: Config, daemon: Daemon, prewarm: Prewarm, reload: Reload, events: EventLog
) -> NodeSignals | None:
    """What writes the node's labels, condition, events and taint; None while all of them are off."""
    if not config.informs_kubernetes:
        return None
    from cachd.cluster.api_server import ApiServer
    from cachd.cluster.signals import NodeSignals, Seen, Switches, Watched

    assert config.node_name is not None
    models = daemon.models

    def current() -> Seen:
        states = {name: state for name in models.names() if (state := models.state(name)) is not None}
        return Seen(states, frozenset(prewarm.required()), is_configuration_right=reload.is_loaded)

    switches = Switches(
        config.node_name,
        labels=config.node_labels,
        max_labels=config.max_node_labels,
        condition=config.node_condition,
        events=config.node_events,
        taint=config.startup_taint,
    )
    return NodeSignals(switches, ApiServer(place(config)), Watched(current, events), daemon.metrics)


def running(signals: NodeSignals | None) -> AbstractContextManager[object]:
    """In the block, the signals are written."""
    if signals is None:
        return nullcontext()
    signals.start()
    return closing(signals)


def place(config: Config) -> Place:
    """Where the Kubernetes API answers: the option, else what Kubernetes tells every container."""
    from cachd.cluster.api_server import Place

    host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    given = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}" if host else _BY_NAME
    return Place(config.kubernetes_url or given, config.kubernetes_token_file, config.kubernetes_ca_file)
