"""Runs the daemon.

It starts from top to bottom, and stops from bottom to top:

    objects      the root is locked, the threads of pulls wait for work (parts.py); while another daemon
                 has the root, this one waits (waiting.py)
    certificate  it is loaded, and is watched from now on
    sockets      they are bound: clients can connect and wait
    signals      from here on, SIGTERM and SIGINT lead to a clean stop
    pulls        the pulls that an earlier process left behind resume
    status, prewarm, progress, sweeps, scrubs, reclaim, signals    their threads start
    Hub endpoint its threads start, if it is on (hub_endpoint.py)
    API          it answers, until one of these signals
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import structlog

from cachd import __version__
from cachd.api.app import create_app
from cachd.api.dependencies import Services
from cachd.api.listeners import Opened, Sockets
from cachd.api.server import stoppable
from cachd.api.tls import Certificate
from cachd.config import Config, Loaded
from cachd.daemon.hub_endpoint import hub_endpoint
from cachd.daemon.listen import allowed_hosts, certified, check_listen
from cachd.daemon.logs import configure_logs
from cachd.daemon.parts import Daemon, assembled
from cachd.daemon.reload import Reload
from cachd.daemon.signals import node_signals, running
from cachd.daemon.store import unleased
from cachd.daemon.waiting import StoppedWaiting, Waiting
from cachd.kernel.notices import Notices
from cachd.metrics import Scrape
from cachd.report.events import EventLog
from cachd.settings.tokens import TokenFile
from cachd.store.catalog import iso
from cachd.upkeep.prewarm import Desired, Prewarm

if TYPE_CHECKING:  # it is imported only if it is on
    from cachd.cluster.signals import NodeSignals

log = structlog.get_logger(__name__)

# The thresholds of the three generations. A pull of many small files makes 10,000 objects at once, and none
# in a cycle. The second generation has half the usual size, because probes wait while it is collected.
_COLLECT_AFTER = 10_000, 5, 20
_ENDINGS_SECONDS = 2.0  # of the five that a stop gives to answers that are under way


def serve(loaded: Loaded, *, waits: bool = True) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises CachdError when it cannot start.

    While another daemon has the root: if it `waits`, wait until that one ends; else raise InUse.
    """
    with suppress(StoppedWaiting):
        _serve(loaded, waits=waits)
    log.info("stopped")


def _serve(loaded: Loaded, *, waits: bool) -> None:
    config = loaded.config
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the options are loaded
    events = EventLog()
    configure_logs(config.log_level, config.log_format, events)
    check_listen(config)
    sockets = Sockets(config.listeners)
    waiting = Waiting(config, sockets)
    with (
        sockets,  # a wait opens them before the objects are built; else they are the last to be opened
        assembled(config, waiting.until_free if waits else None) as daemon,
        certified(config) as certificate,
        waiting.listening() as listeners,
    ):
        reload, notices = Reload(loaded, daemon), Notices(os.environ)
        signal.signal(signal.SIGHUP, lambda _number, _frame: _request(reload, notices))
        prewarm = Prewarm(daemon.pulls, daemon.store, daemon.warms, lambda: _poll(reload, notices))
        tokens = _tokens(config)
        signals = node_signals(config, daemon, prewarm, reload, events)
        daemon.metrics.watch(lambda: _scrape(daemon, prewarm, reload, tokens, certificate, signals))
        services = api_services(
            daemon,
            events=events,
            required=prewarm.required,
            options=reload.as_document,
            sources=reload.sources,
        )
        app = create_app(
            services,
            tokens=tokens,
            anonymous_reads=config.anonymous_reads,
            allowed_hosts=allowed_hosts(config, config.listeners),
        )
        stop = partial(_interrupt, daemon, events)
        run = stoppable(app, listeners, certificate=certificate, interrupt=stop, notices=notices)
        with started(daemon, prewarm), running(signals), hub_endpoint(config, daemon):
            _note_start(loaded, daemon, listeners)
            _collect_seldom()
            run()


def _request(reload: Reload, notices: Notices) -> None:
    """Have the next poll load the configuration."""
    reload.request()  # first: the poll that ends the reload must not come between
    notices.reloading()


def _poll(reload: Reload, notices: Notices) -> Iterable[Desired] | None:
    try:
        return reload.poll()
    finally:
        notices.reloaded()


def api_services(
    daemon: Daemon,
    *,
    events: EventLog,
    required: Callable[[], list[str]],
    options: Callable[[], dict[str, object]],
    sources: Callable[[str | None], dict[str, object]],
) -> Services:
    """The objects that the routes of the API use. `Services` explains `required`, `options` and `sources`."""
    return Services(
        models=daemon.models,
        metrics=daemon.metrics,
        bandwidth=daemon.bandwidth,
        sweeps=daemon.sweeps,
        scrubs=daemon.scrubs,
        reclaim=daemon.reclaim,
        status=daemon.status,
        events=events,
        required=required,
        options=options,
        sources=sources,
        kubelet=daemon.bounds.report,
    )


def _interrupt(daemon: Daemon, events: EventLog) -> None:
    """End the waits of all callers: for pulls, which the next start resumes, and for events.

    Those who wait for events first hear of the pulls that end now.
    """
    at_work = daemon.pulls.at_work()
    daemon.pulls.interrupt()
    futures.wait([pull.done for pull in at_work], timeout=_ENDINGS_SECONDS)
    events.close()


@contextmanager
def started(daemon: Daemon, prewarm: Prewarm) -> Iterator[None]:
    """Resume the pulls of an earlier process, and start the threads that work without a request."""
    unleased(daemon.store.layout.root, daemon.pulls.resume)
    daemon.status.start(daemon.models)
    prewarm.start()
    with closing(prewarm):
        daemon.progress.start()
        daemon.sweeps.start()
        daemon.scrubs.start()
        daemon.reclaim.start()
        yield


def _note_start(loaded: Loaded, daemon: Daemon, listeners: Sequence[Opened]) -> None:
    """Log where the API is, and whether the configuration is the last good one."""
    if last_good := loaded.last_good:
        log.error(
            "last good configuration in force",
            code=last_good.fault.code,
            reason=last_good.fault.detail,
            kept_at=iso(last_good.kept_at),
            hint="correct the configuration file: the daemon takes it over at once",
        )
    for each in listeners:
        log.info("listening", **each.place(), root=str(daemon.store.layout.root), version=__version__)


def _tokens(config: Config) -> TokenFile | None:
    """The tokens of the API; None without token_file."""
    if config.token_file is None:
        return None
    tokens = TokenFile(config.token_file)
    tokens.are_in_force()  # reads the file now, so that the log has its errors from the start
    return tokens


def _scrape(
    daemon: Daemon,
    prewarm: Prewarm,
    reload: Reload,
    tokens: TokenFile | None,
    certificate: Certificate | None,
    signals: NodeSignals | None,
) -> Scrape:
    names, underway = daemon.store.names, daemon.models.underway()
    return Scrape(
        capacity=daemon.store.space.capacity(),
        views=daemon.store.watch.watched(),
        leases=daemon.models.leases(),
        oldest_scrub=daemon.scrubs.oldest(),
        is_config_in_force=reload.is_in_force,
        is_config_loaded=reload.is_loaded,
        config_loaded_at=reload.loaded_at,
        waiting_options=reload.waiting,
        are_tokens_in_force=tokens is None or tokens.are_in_force(),
        certificate_expires_at=certificate.expires_at if certificate else None,
        is_certificate_in_force=certificate.is_in_force if certificate else None,
        models=daemon.models.counted(),
        preflights=daemon.models.counted_by_finding(),
        limits=daemon.bandwidth.rates(),
        resident=daemon.warms.resident(),
        sizes=daemon.models.sizes(),
        done={name: done for name, (done, _) in underway.items()},
        eta={name: eta for name, (_, eta) in underway.items() if eta is not None},
        kubelet=daemon.bounds.kubelet_ratio(),
        required_absent=sum(not names.get(name) for name in prewarm.required()),
        are_signals_written=signals.are_written if signals else None,
    )


def _collect_seldom() -> None:
    """Let garbage collections skip all objects made so far, so that none delays a probe."""
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)
