"""The composition root: builds all objects from the options, starts and stops them in written order."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import structlog

from cachd import __version__, files
from cachd.config import Config, Loaded
from cachd.effective import effective, entries, holding
from cachd.errors import CachdError, Forbidden, Invalid, Leased
from cachd.kubelet import kubelet_keeps
from cachd.metrics import Metrics
from cachd.model import HUB_HOSTS, Percentage, Typed
from cachd.model.listener import Address, Serves
from cachd.policy.proxy import Proxies
from cachd.report.models import Models
from cachd.report.status import StatusFiles
from cachd.settings.file import LONGEST_BYTES
from cachd.settings.given import unknown_variables
from cachd.settings.tokens import TokenFile
from cachd.sources.http import Http
from cachd.sources.schemes import Sources
from cachd.sources.secrets import HubToken, Secret
from cachd.sources.table import Table
from cachd.sources.trust import Authorities
from cachd.store.root import check_above, end_leases, own_directory
from cachd.store.space import beside_others, is_shared
from cachd.store.store import Store
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.downloads import Downloads
from cachd.transfer.engine import Engine
from cachd.transfer.pull import PullContext
from cachd.transfer.pulls import Pulls
from cachd.transfer.reclaim import Reclaim
from cachd.transfer.resolves import Resolves
from cachd.transfer.streams import Streams
from cachd.upkeep.prewarm import Desired, Prewarm
from cachd.upkeep.refusals import Refusals
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.sweeps import Sweeps
from cachd.upkeep.warms import Warms

if TYPE_CHECKING:
    from cachd.api.tls import Certificate

log = structlog.get_logger(__name__)

T = TypeVar("T")
_LEASED_SECONDS, _LEASED_AGAIN_SECONDS = 60.0, 0.5  # longer than fs.lease-break-time, by default 45 s
# Objects between two collections. A pull of many small files makes this many at once, and none in a cycle.
_COLLECT_AFTER = 10_000


@dataclass(frozen=True, slots=True)
class Parts:
    """The objects that run pulls, for the daemon and for `pull --direct`."""

    store: Store
    metrics: Metrics
    bandwidth: Bandwidth
    reclaim: Reclaim
    pulls: Pulls
    sweeps: Sweeps
    scrubs: Scrubs
    warms: Warms
    status: StatusFiles
    sources: Sources
    refusals: Refusals


@contextmanager
def assembled(config: Config) -> Iterator[Parts]:
    """Open the root and start the threads. The exit stops the threads and releases the root.

    Raises CachdError when the root or an option cannot be used.
    """
    _set_limits()
    for unknown in unknown_variables(Config.model_fields):
        log.warning("unknown environment variable", reason=unknown)
    with ExitStack() as stack:
        sources = build_sources(config)
        store = stack.enter_context(_opened(config))
        _set_bounds(store, config)
        metrics = Metrics()
        reclaim = Reclaim(
            store,
            metrics,
            high=config.high_watermark,
            low=config.low_watermark,
            unused_seconds=config.evict_unused_seconds,
            automatic=config.evict,
        )
        stack.callback(reclaim.close)
        reclaim.keep([model.spec.name for model in config.models])
        status = StatusFiles(store.layout, store.snapshots.changes)
        stack.callback(status.close)  # after the pulls have ended
        bandwidth = Bandwidth(config.limits, metrics, sources.table.limits())
        streams = Streams(config.streams, changed=metrics.streams.set)
        engine = Engine(streams, bandwidth, metrics, retries=config.retries)
        stack.callback(engine.close)
        downloads = Downloads(store.content, engine)
        resolves = Resolves(config.resolve_seconds, stall_seconds=config.stall_seconds)
        stack.callback(resolves.close)
        context = PullContext(store, reclaim, downloads, resolves, lambda: sources.table)
        pulls = Pulls(context, sources, metrics, at_once=config.pulls, queued=config.queued_pulls)
        stack.callback(pulls.close)
        sweeps = Sweeps(
            store,
            pulls,
            metrics,
            interval_seconds=config.sweep_interval_seconds,
            keep_seconds=config.keep_unfinished_seconds,
        )
        stack.callback(sweeps.close)
        scrubs = Scrubs(
            store,
            pulls,
            metrics,
            bytes_per_second=config.scrub_bytes_per_second,
            interval_seconds=config.scrub_interval_seconds,
        )
        stack.callback(scrubs.close)
        warms = Warms(store, metrics)
        stack.callback(warms.close)
        refusals = Refusals(store, pulls, lambda: sources.table)
        stack.callback(refusals.close)
        refusals.start()
        yield Parts(
            store, metrics, bandwidth, reclaim, pulls, sweeps, scrubs, warms, status, sources, refusals
        )


def _opened(config: Config) -> Store:
    if config.own_directory:
        root = own_directory(config.root)
    else:
        check_above(root := config.root)
    return _unleased(
        root,
        lambda: Store(
            root,
            disk_at_least=config.disk_at_least,
            keep_previous=config.keep_previous,
            keep_opened_seconds=config.keep_opened_seconds,
            trust_claimed_digests=config.trust_claimed_digests,
        ),
    )


def _unleased(root: Path, read: Callable[[], T]) -> T:
    """What `read` returns. It is called again while another process's lease blocks it.

    Raises Leased after a minute.
    """
    deadline = time.monotonic() + _LEASED_SECONDS
    while True:
        try:
            return read()
        except Leased as error:
            if time.monotonic() > deadline:
                raise
            log.warning("waiting for another process's file lease to end", reason=error.detail)
        end_leases(root)
        time.sleep(_LEASED_AGAIN_SECONDS)


def _set_bounds(store: Store, config: Config) -> None:
    """Give the store its limit and its reserves.

    The reserve `auto` is the kubelet's threshold and a margin on a disk shared with the node, else 0.
    """
    reserve_free, reserve_inodes = config.reserve_free, config.reserve_inodes
    if is_shared(store.layout.root):
        free, inodes = kubelet_keeps(config.kubelet_config, store.space.bounded().total)
        kept, kept_inodes = beside_others(free), beside_others(inodes)
    else:
        free = kept = kept_inodes = Percentage(0)
    store.space.change(
        limit=config.limit_bytes,
        reserve_free=kept if reserve_free == "auto" else reserve_free,
        reserve_inodes=kept_inodes if reserve_inodes == "auto" else reserve_inodes,
    )
    now = store.space.bounded()
    if now.reserve_free < free.of(now.total):
        log.warning(
            "reserve_free is below the kubelet's threshold: it will delete images and evict pods",
            reserve_free_bytes=now.reserve_free,
            kubelet_bytes=free.of(now.total),
        )
    if not store.tells_use:
        log.warning("the kernel cannot report open files here: only pins and leases protect models")


def build_sources(config: Config) -> Sources:
    """The sources that the options describe. Raises Invalid or Unavailable."""
    authorities = _authorities(config.ca_file)
    http = partial(
        Http,
        authorities=authorities,
        stall_seconds=config.stall_seconds,
        connect_seconds=config.connect_seconds,
        proxies=Proxies.configured(config.proxy, config.no_proxy, os.environ),
        proxy_credentials=Secret(config.proxy_credentials_file),
    )
    return Sources(
        http,
        config.allow,
        _table(config),
        s3_authorities=_authorities(config.s3_ca_file) if config.s3_ca_file else authorities,
        stall_seconds=config.stall_seconds,
        hf_endpoint=config.hf_endpoint,
        hf_token=HubToken(config.hf_token_file),
        s3_endpoint_url=config.s3_endpoint_url,
        s3_region=config.s3_region,
    )


def _table(config: Config) -> Table:
    endpoints = {
        "hf": (config.hf_endpoint, *(f"https://{host}" for host in HUB_HOSTS)),
        "s3": (config.s3_endpoint_url,) if config.s3_endpoint_url else (),
    }
    return Table(config.sources, refuse=config.refuse, endpoints=endpoints)


def _authorities(file: Path | None) -> Authorities:
    return Authorities(str(file) if file else None)


def serve(loaded: Loaded) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises CachdError when it cannot start."""
    from cachd.api.app import create_app  # imports the web server, which `pull --direct` does not need
    from cachd.api.dependencies import Services
    from cachd.api.listeners import opened
    from cachd.api.server import run

    config = loaded.config
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the options are loaded
    configure_logs(config.log_level, config.log_format)
    check_listen(config)
    with assembled(config) as parts, _certified(config) as certificate, opened(config.listeners) as listeners:
        watched = _Watched(loaded, parts)
        signal.signal(signal.SIGHUP, lambda _number, _frame: watched.request_reload())
        prewarm = Prewarm(parts.pulls, parts.store.snapshots, parts.warms, watched.poll)
        models = Models(parts.store, parts.pulls, parts.scrubs, parts.warms)
        tokens = TokenFile(config.token_file) if config.token_file else None
        if tokens:
            tokens.are_in_force()  # reads the file now, so that the log has its errors from the start
        parts.metrics.watch(
            gauges=lambda: _gauges(parts.store, parts.scrubs, watched, tokens, certificate),
            models=models.counted,
            limits=parts.bandwidth.rates,
            resident=parts.warms.resident,
        )
        services = Services(
            models=models,
            metrics=parts.metrics,
            bandwidth=parts.bandwidth,
            sweeps=parts.sweeps,
            scrubs=parts.scrubs,
            reclaim=parts.reclaim,
            status=parts.status,
            required=prewarm.required,
            options=watched.as_document,
            sources=watched.holding,
        )
        app = create_app(
            services,
            tokens=tokens,
            anonymous_reads=config.anonymous_reads,
            allowed_hosts=(*config.allowed_hosts, *_hosts(config)),
        )
        _unleased(parts.store.layout.root, parts.pulls.resume)
        parts.status.start(models)
        prewarm.start()
        parts.sweeps.start()
        parts.scrubs.start()
        parts.reclaim.start()
        try:
            for each in listeners:
                place = each.place()
                log.info("listening", **place, root=str(parts.store.layout.root), version=__version__)
            gc.freeze()  # collections skip all objects made so far, and so delay no probe
            gc.set_threshold(_COLLECT_AFTER)
            run(app, listeners, certificate=certificate, interrupt=parts.pulls.interrupt)
        finally:
            prewarm.close()
    log.info("stopped")


def check_listen(config: Config) -> None:
    """Raises Forbidden when anybody on the network could write, and Invalid when nobody could read."""
    if not (config.anonymous_reads or config.token_file):
        raise Invalid(
            "with anonymous_reads: false and no token_file, nobody could read",
            code="bad_option",
            hint="set token_file, too",
        )
    if config.token_file or config.anonymous_writes:
        return
    for each in config.listeners:
        if not each.at.is_local and each.serves is Serves.everything:
            raise Forbidden(
                f"listening on {each} would let anybody on the network pull and delete models",
                code="open_writes",
                hint="set token_file, or anonymous_writes: true if the network is trusted",
            )


def configure_logs(level: str, form: str) -> None:
    """Log to standard error, from `level` on, in the `form` auto, json or text."""
    as_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if as_text else structlog.processors.JSONRenderer()
    )
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[libraries], force=True)


def _hosts(config: Config) -> list[str]:
    """The host names of the addresses that the API listens on."""
    return [each.at.host for each in config.listeners if isinstance(each.at, Address)]


@contextmanager
def _certified(config: Config) -> Iterator[Certificate | None]:
    """The API's certificate, reloaded when its files change; None without one. Raises Unavailable."""
    from cachd.api.tls import Certificate, TlsFiles

    if config.tls_cert_file is None:
        yield None
        return
    key = config.tls_key_file or config.tls_cert_file
    certificate = Certificate(TlsFiles(config.tls_cert_file, key, config.tls_client_ca_file))
    certificate.start()
    try:
        yield certificate
    finally:
        certificate.close()


# Options that take effect as soon as the file changes. All others need a restart.
TAKEN_OVER = frozenset(
    (
        *("models", "limit_bytes_per_second", "source_limits", "limit_bytes", "reserve_free"),
        *("reserve_inodes", "allow", "refuse", "sources"),
    )
)


class _Watched:
    """Loads the configuration file again whenever it changes, and applies the options of TAKEN_OVER.

    While the file is wrong, the options from before stay in force.
    """

    def __init__(self, loaded: Loaded, parts: Parts) -> None:
        self._parts = parts
        self._in_force = loaded
        self._seen = loaded.content
        self._is_first = True
        self._refusal: CachdError | None = None
        self._waiting: list[str] = []
        self._is_requested = False

    def request_reload(self) -> None:
        """Load the file at the next poll even if it did not change. Safe in a signal handler."""
        self._is_requested = True

    def poll(self) -> Iterable[Desired] | None:
        """Load the file if it changed. Returns the desired models, or None when nothing changed."""
        path = self._in_force.config.config
        content = _content(path) if path else b""
        is_requested, self._is_requested = self._is_requested, False
        if content == self._seen and not self._is_first and not is_requested:
            return None
        try:
            if content != self._seen or is_requested:
                self._seen = content
                self._take_over(self._in_force.again())
        except CachdError as error:
            self._refusal = error
            log.warning("configuration file not taken over", reason=error.detail)
            if not self._is_first:
                return None
        self._is_first = False
        models = self._in_force.config.models
        self._parts.reclaim.keep([m.spec.name for m in models])
        return [
            Desired(m.spec, required=m.required, pin=m.pin, warm=m.warm, priority=m.priority) for m in models
        ]

    def _take_over(self, now: Loaded) -> None:
        before, after = self._in_force.config.limits, self._in_force.updated(now, TAKEN_OVER)
        parts = self._parts
        _set_bounds(parts.store, after.config)
        table = _table(after.config)
        parts.sources.change(after.config.allow, table)
        parts.refusals.look()
        # Limits set through the API stay in force until the limits in the file change.
        limits = after.config.limits if after.config.limits != before else parts.bandwidth.limits
        if (limits, table.limits()) != (parts.bandwidth.limits, parts.bandwidth.prefixes):
            parts.bandwidth.change(limits, table.limits())
        self._in_force, self._refusal, self._waiting = after, None, now.differs_from(after)
        if self._waiting:
            log.warning("options of the file wait for a restart", options=self._waiting)

    @property
    def is_in_force(self) -> bool:
        """Whether the daemon uses every option of the file as it is on disk."""
        return self._refusal is None and not self._waiting

    def as_document(self) -> dict[str, object]:
        """Every option in force with where it was set, and the state of the file (GET /v1/options)."""
        config, error = self._in_force.config, self._refusal
        options = effective(self._in_force, self._parts.bandwidth.limits)
        return {
            "options": [option.as_document() for option in options],
            "file": {
                "path": str(config.config) if config.config else None,
                "in_force": self.is_in_force,
                "waiting_for_restart": self._waiting,
                "error": error.as_document() if error else None,
            },
        }

    def holding(self, typed: str | None) -> dict[str, object]:
        """The entries of `sources` in force, or the settings for a ref (GET /v1/sources).

        `typed` is the ref as the user typed it. Raises Invalid when it is not one.
        """
        if typed is None:
            return {"sources": entries(self._in_force)}
        return holding(self._in_force, self._parts.sources.table, Typed.parse(typed).ref)


def _content(path: Path) -> bytes:
    try:
        return files.content(path, at_most=LONGEST_BYTES)
    except OSError:
        return b""


def _gauges(
    store: Store,
    scrubs: Scrubs,
    watched: _Watched,
    tokens: TokenFile | None,
    certificate: Certificate | None,
) -> Mapping[str, float]:
    now, views = store.space.capacity(), store.watch.watched()
    return {
        "cachd_available_bytes": max(now.available, 0),
        "cachd_cache_limit_bytes": now.usable,
        "cachd_cache_size_bytes": now.usage.blobs,
        "cachd_config_in_force": float(watched.is_in_force),
        "cachd_fs_size_bytes": now.total,
        "cachd_fs_free_bytes": now.free,
        "cachd_fs_free_inodes": now.free_inodes,
        "cachd_held_bytes": now.usage.held,
        "cachd_leases": store.snapshots.leases.count(time.time()),
        "cachd_reserved_bytes": now.reserved,
        "cachd_tokens_in_force": float(tokens is None or tokens.are_in_force()),
        "cachd_view_watches": views.directories,
        "cachd_view_unwatched": views.unwatched,
        "cachd_scrub_oldest_timestamp_seconds": scrubs.oldest() or 0.0,
        **(certificate.gauges() if certificate else {}),
    }


def _set_limits() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain the tokens
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.umask(0o022)
