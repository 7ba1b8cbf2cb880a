"""Defines the metrics that are measured at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cachd.metrics.labels import MODEL_STATES
from cachd.model.finding import Level
from cachd.store.capacity import Capacity
from cachd.store.watch import Watched

MAX_MODELS = 100  # models with a series of their own


@dataclass(frozen=True, slots=True)
class Scrape:
    """What the daemon measures for one scrape.

    `oldest_scrub`: Unix time of the oldest verification of any published blob. `certificate_*` are None
    without a certificate. `models`: how many, by state. `preflights`: how many ready models, by the level of
    their worst finding. `limits`: bandwidth limits, by source or prefix.
    `resident`: bytes in the page cache, by model; `sizes`: all its bytes. `done`, `eta`: the ratio of bytes
    that are here and the seconds that are left, by the model of a running pull; absent while unknown.
    `kubelet`: its threshold of free bytes as a ratio, by where it comes from. `required_absent`: how many
    required models are not ready. `are_signals_written`: None while no signal of the node is on.
    """

    capacity: Capacity
    views: Watched
    leases: int
    oldest_scrub: float | None
    is_config_in_force: bool
    is_config_loaded: bool
    config_loaded_at: float
    waiting_options: int
    are_tokens_in_force: bool
    certificate_expires_at: float | None
    is_certificate_in_force: bool | None
    models: Mapping[str, int]
    preflights: Mapping[str, int]
    limits: Mapping[str, int]
    resident: Mapping[str, int]
    sizes: Mapping[str, int]
    done: Mapping[str, float]
    eta: Mapping[str, float]
    kubelet: Mapping[str, float]
    required_absent: int
    are_signals_written: bool | None = None


@dataclass(frozen=True, slots=True)
class _Measured:
    """A gauge that is measured at each scrape. A value that is None is left out."""

    name: str
    text: str
    value: Callable[[Scrape], float | None]

    def family(self, scrape: Scrape) -> Metric | None:
        value = self.value(scrape)
        return None if value is None else GaugeMetricFamily(self.name, self.text, value=value)


@dataclass(frozen=True, slots=True)
class _MeasuredBy:
    """A gauge with one label that is measured at each scrape."""

    name: str
    text: str
    label: str
    values: Callable[[Scrape], Mapping[str, float]]

    def family(self, scrape: Scrape) -> Metric:
        family = GaugeMetricFamily(self.name, self.text, labels=[self.label])
        for label, value in self.values(scrape).items():
            family.add_metric([label], value)
        return family


MEASURED: tuple[_Measured | _MeasuredBy, ...] = (
    _Measured(
        "cachd_available_bytes",
        "Bytes that a new pull can reserve now without an eviction",
        lambda now: max(now.capacity.available, 0),
    ),
    _Measured(
        "cachd_cache_limit_bytes",
        "Most bytes that models may take: limit_bytes, or the disk less reserve_free",
        lambda now: now.capacity.usable,
    ),
    _Measured(
        "cachd_cache_size_bytes",
        "Bytes on disk of published snapshots; a shared file counts once",
        lambda now: now.capacity.usage.blobs,
    ),
    _Measured(
        "cachd_config_in_force",
        "1 while the daemon uses the configuration file as it is on disk;"
        " 0 while the file is wrong or a changed option needs a restart",
        lambda now: now.is_config_in_force,
    ),
    _Measured(
        "cachd_config_last_reload_successful",
        "1 if the configuration file was valid when it was last read; 0 if it is wrong, and the previous"
        " options stay in force",
        lambda now: now.is_config_loaded,
    ),
    _Measured(
        "cachd_config_last_reload_timestamp_seconds",
        "Unix time at which the configuration in force was loaded",
        lambda now: now.config_loaded_at,
    ),
    _Measured(
        "cachd_config_waiting_options",
        "Number of changed options in the configuration file that need a restart",
        lambda now: now.waiting_options,
    ),
    _Measured(
        "cachd_fs_size_bytes", "Size of the cache's file system in bytes", lambda now: now.capacity.total
    ),
    _Measured(
        "cachd_fs_free_bytes",
        "Bytes of the cache's file system that are free to cachd",
        lambda now: now.capacity.free,
    ),
    _Measured(
        "cachd_fs_free_inodes",
        "Free inodes of the cache's file system",
        lambda now: now.capacity.free_inodes,
    ),
    _Measured(
        "cachd_held_bytes",
        "Bytes on disk of deleted files that a process still has open",
        lambda now: now.capacity.usage.held,
    ),
    _Measured("cachd_leases", "Leases that have not expired", lambda now: now.leases),
    _Measured(
        "cachd_required_models_not_ready",
        "Models that the configuration marks `required` and that are not ready",
        lambda now: now.required_absent,
    ),
    _Measured(
        "cachd_node_signals_written",
        "1 while the node's labels, condition and taint in Kubernetes say what is true; 0 while a write of"
        " them waits or fails; absent while they are off",
        lambda now: now.are_signals_written,
    ),
    _Measured(
        "cachd_reserve_free_bytes",
        "Bytes of the cache's file system that cachd keeps free (reserve_free)",
        lambda now: now.capacity.reserve_free,
    ),
    _Measured(
        "cachd_reserved_bytes",
        "Bytes reserved for running pulls and not yet written",
        lambda now: now.capacity.reserved,
    ),
    _Measured(
        "cachd_tokens_in_force",
        "1 while the API uses the tokens of token_file as it is on disk; 0 while it cannot be used",
        lambda now: now.are_tokens_in_force,
    ),
    _Measured(
        "cachd_view_watches",
        "Directories of the views that the kernel watches for changes",
        lambda now: now.views.directories,
    ),
    _Measured(
        "cachd_view_unwatched",
        "Directories of the views that the kernel does not watch: its limit is reached",
        lambda now: now.views.unwatched,
    ),
    _Measured(
        "cachd_tls_certificate_expiry_timestamp_seconds",
        "Unix time at which the API's certificate expires",
        lambda now: now.certificate_expires_at,
    ),
    _Measured(
        "cachd_tls_in_force",
        "1 while the API uses the certificate that is on disk; 0 while it cannot be used",
        lambda now: now.is_certificate_in_force,
    ),
    _Measured(
        "cachd_scrub_oldest_timestamp_seconds",
        "Unix time of the oldest verification of any published blob; 0 when there is none",
        lambda now: now.oldest_scrub or 0.0,
    ),
    _MeasuredBy(
        "cachd_models",
        "Models by state",
        "state",
        lambda now: {state: now.models.get(state, 0) for state in MODEL_STATES},
    ),
    _MeasuredBy(
        "cachd_preflight_models",
        "Ready models by the level of the worst finding of their preflight; an engine would refuse, or load"
        " wrongly, those at `refused`",
        "level",
        lambda now: {level.value: now.preflights.get(level.value, 0) for level in Level},
    ),
    _MeasuredBy(
        "cachd_limit_bytes_per_second",
        "Bandwidth limits in force, by source or prefix; the source `all` is the limit of all together",
        "source",
        lambda now: now.limits,
    ),
    _MeasuredBy(
        "cachd_kubelet_threshold_ratio",
        "Ratio of free bytes below which the kubelet deletes images or evicts pods; `from` says how cachd"
        " knows it",
        "from",
        lambda now: now.kubelet,
    ),
    _MeasuredBy(
        "cachd_model_size_bytes",
        "Bytes of a ready model on disk; a file that models share counts for each of them",
        "model",
        lambda now: now.sizes,
    ),
    _MeasuredBy(
        "cachd_pull_done_ratio",
        "Bytes of a model that are here, as a ratio of all, while it is being pulled",
        "model",
        lambda now: now.done,
    ),
    _MeasuredBy(
        "cachd_pull_eta_seconds",
        "Seconds until the last byte of a model that is being pulled, at the rate of the last ten seconds;"
        " absent while no byte arrives",
        "model",
        lambda now: now.eta,
    ),
    _MeasuredBy(
        "cachd_model_resident_bytes",
        "Bytes of a ready model that are in the page cache",
        "model",
        lambda now: now.resident,
    ),
)


class AtScrape(Collector):
    """Measures MEASURED whenever Prometheus scrapes the daemon."""

    def __init__(self, scrape: Callable[[], Scrape]) -> None:
        self._scrape = scrape

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering measures nothing."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now."""
        scrape = self._scrape()
        return [family for each in MEASURED if (family := each.family(scrape)) is not None]
