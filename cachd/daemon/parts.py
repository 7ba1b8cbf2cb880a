"""Builds the objects that run pulls.

They are built from top to bottom and closed from bottom to top. Whatever uses an object is built after it.
`metrics`, `sources`, `bandwidth` and `downloads` have no threads and are not closed.

    built        uses                       at its close
    ---------------------------------------------------------------------------------
    store                                   releases the root
    status       store                      writes the last state of each model
    reclaim      store                      ends the thread that evicts
    engine       bandwidth                  ends the threads that receive and hash
    resolves     engine                     ends the threads that ask sources
    pulls        store, reclaim, engine, …  stops the running pulls, which resume at the next start
    progress     pulls                      ends the thread that logs how far pulls are
    sweeps       store, pulls               ends the thread that removes leftovers
    scrubs       store, pulls               ends the threads that verify blobs
    warms        store                      ends the threads that read models into memory
    refusals     store, pulls, sources      ends the thread that withdraws refused models
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog

from cachd.config import Config
from cachd.daemon.sources import build_sources
from cachd.daemon.store import ALONE, Bounds, Sharing, UntilFree, open_store
from cachd.errors import CachdError
from cachd.metrics import Metrics
from cachd.model import Ref
from cachd.report.models import Models
from cachd.report.progress_log import ProgressLog
from cachd.report.status import StatusFiles
from cachd.settings.given import unknown_variables
from cachd.sources.schemes import Sources
from cachd.store.store import Store
from cachd.transfer.attempt import PullContext
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.downloads import Downloads
from cachd.transfer.engine import Engine
from cachd.transfer.pulls import Pulls
from cachd.transfer.reclaim import Reclaim
from cachd.transfer.resolves import Resolves
from cachd.transfer.space_watch import EvictionRules
from cachd.transfer.streams import Streams
from cachd.upkeep.refusals import Refusals
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.sweeps import Sweeps
from cachd.upkeep.warms import Warms

log = structlog.get_logger(__name__)


class _Closes(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=_Closes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """The objects that run pulls, for the daemon and for `pull --direct`."""

    store: Store
    metrics: Metrics
    bandwidth: Bandwidth
    reclaim: Reclaim
    pulls: Pulls
    downloads: Downloads
    progress: ProgressLog
    sweeps: Sweeps
    scrubs: Scrubs
    warms: Warms
    status: StatusFiles
    sources: Sources
    refusals: Refusals
    models: Models
    bounds: Bounds


@contextmanager
def assembled(  # over 40 lines: one for each object, in order
    config: Config, until_free: UntilFree | None = None, sharing: Sharing = ALONE
) -> Iterator[Daemon]:
    """Open the root and build the objects. The exit stops their threads and releases the root.

    The daemon starts progress, sweeps, scrubs and reclaim itself. This process loses its core dumps, and gets
    the highest limit of open files and the umask 022; the exit does not undo that. `until_free`,
    `sharing`: as for `open_store`.

    Raises CachdError when the root or an option cannot be used.
    """
    _limit_this_process()
    for unknown in unknown_variables(Config.model_fields):
        log.warning("unknown environment variable", reason=unknown)
    sources, metrics = build_sources(config), Metrics()
    with ExitStack() as stack:

        def closing(part: C) -> C:
            stack.callback(part.close)
            return part

        store = stack.enter_context(open_store(config, until_free, sharing))
        bounds = Bounds(store)
        bounds.set(config)
        if not store.reports_open_files:
            log.warning("the kernel cannot report open files here: only pins and leases protect models")
        status = closing(StatusFiles(store.layout, store.changes))
        reclaim = closing(_reclaim(config, store, metrics))
        bandwidth = Bandwidth(config.limits, metrics, sources.table.limits())
        engine = closing(_engine(config, bandwidth, metrics))
        resolves = closing(_resolves(config, engine))
        downloads = Downloads(store.content, engine)
        context = PullContext(store, reclaim, downloads, resolves, lambda: sources.table, config.preflight)
        pulls = closing(_pulls(config, context, sources, metrics))
        progress = closing(ProgressLog(pulls))
        sweeps = closing(_sweeps(config, store, pulls, metrics))
        scrubs = closing(_scrubs(config, store, pulls, metrics))
        warms = closing(Warms(store, metrics))
        refusals = closing(Refusals(store, pulls, lambda: sources.table))
        refusals.start()
        yield Daemon(
            store=store,
            metrics=metrics,
            bandwidth=bandwidth,
            reclaim=reclaim,
            pulls=pulls,
            downloads=downloads,
            progress=progress,
            sweeps=sweeps,
            scrubs=scrubs,
            warms=warms,
            status=status,
            sources=sources,
            refusals=refusals,
            models=Models(store, pulls, scrubs, warms),
            bounds=bounds,
        )


def _reclaim(config: Config, store: Store, metrics: Metrics) -> Reclaim:
    rules = EvictionRules(
        high=config.high_watermark,
        low=config.low_watermark,
        unused_seconds=config.evict_unused_seconds,
        automatic=config.evict,
    )
    reclaim = Reclaim(store, metrics, rules)
    reclaim.keep([model.spec.name for model in config.models])
    return reclaim


def _engine(config: Config, bandwidth: Bandwidth, metrics: Metrics) -> Engine:
    streams = Streams(config.streams, changed=metrics.streams.set)
    return Engine(streams, bandwidth, metrics, retries=config.retries)


def _resolves(config: Config, engine: Engine) -> Resolves:
    def failed(ref: Ref, error: CachdError) -> None:
        engine.listeners.of(ref).failed(error)

    return Resolves(config.resolve_seconds, stall_seconds=config.stall_seconds, failed=failed)


def _pulls(config: Config, context: PullContext, sources: Sources, metrics: Metrics) -> Pulls:
    return Pulls(context, sources, metrics, at_once=config.pulls, queued=config.queued_pulls)


def _sweeps(config: Config, store: Store, pulls: Pulls, metrics: Metrics) -> Sweeps:
    return Sweeps(
        store,
        pulls,
        metrics,
        interval_seconds=config.sweep_interval_seconds,
        keep_seconds=config.keep_unfinished_seconds,
    )


def _scrubs(config: Config, store: Store, pulls: Pulls, metrics: Metrics) -> Scrubs:
    return Scrubs(
        store,
        pulls,
        metrics,
        bytes_per_second=config.scrub_bytes_per_second,
        interval_seconds=config.scrub_interval_seconds,
    )


def _limit_this_process() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain the tokens
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.umask(0o022)
