"""Builds and runs the Hub endpoint, if an option says where it listens.

Its code is imported only then, so that a daemon without it starts as fast as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import structlog

from cachd.api.listeners import Sockets
from cachd.config import Config
from cachd.daemon.listen import allowed_hosts
from cachd.daemon.parts import Daemon
from cachd.policy.hosts import OwnNames

log = structlog.get_logger(__name__)

_TAKEN_SECONDS = 10.0  # how long a daemon that just ended may still have the address


@contextmanager
def hub_endpoint(config: Config, daemon: Daemon) -> Iterator[None]:
    """Run the endpoint of the options. Raises InUse, Forbidden or Invalid when it cannot listen there."""
    if not config.hub_listen:
        yield
        return
    from cachd.serve.bounds import Waits
    from cachd.serve.callers import Callers, Tokens
    from cachd.serve.hub import HubApi
    from cachd.serve.repositories import Repositories
    from cachd.serve.server import HubServer, Size

    by_token, metrics, size = config.hub_share == "token", daemon.metrics, Size()
    waits = Waits(size.threads, metrics.hub_waiting.set)
    repositories = Repositories(daemon.models, daemon.sources, waits, hub_only=by_token)
    callers = Callers(config.hub_allow, Tokens(daemon.pulls.previews, waits, metrics) if by_token else None)
    names = OwnNames(allowed_hosts(config, config.hub_listeners))
    api = HubApi(daemon.models, repositories, callers, daemon.downloads.hasten, names=names)
    with Sockets(config.hub_listeners) as sockets:
        opened = sockets.open_all(patience_seconds=_TAKEN_SECONDS)
        listening = [each.sock for each in opened]
        with closing(
            HubServer(listening, api.answer, metrics, waits=waits, may_connect=callers.may_connect, size=size)
        ) as server:
            server.start()
            for each in opened:
                log.info("hub endpoint listening", **each.place())
            yield
