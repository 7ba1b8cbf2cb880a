"""Builds the thread that writes this node's signals to Kubernetes, if an option turns one on.

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
    from cachd.cluster.signals import NodeSignals
    from cachd.sources.kubernetes_place import Place

_BY_NAME = "https://kubernetes.default.svc:443"


def node_signals(
    config: Config, daemon: Daemon, prewarm: Prewarm, reload: Reload, events: EventLog
) -> NodeSignals | None:
    """The thread that writes the node's labels, condition, events and taint. None if all are off."""
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
    """The address of the Kubernetes API: the option, or the variables that Kubernetes sets in a container."""
    from cachd.sources.kubernetes_place import Place

    host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    given = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}" if host else _BY_NAME
    return Place(config.kubernetes_url or given, config.kubernetes_token_file, config.kubernetes_ca_file)
