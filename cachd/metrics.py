"""Defines every metric of the daemon: its name, labels, help and buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cachd import __version__
from cachd.policy.roles import Role

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MODEL_STATES = (
    "queued",
    "resolving",
    "waiting",
    "downloading",
    "publishing",
    "ready",
    "failed",
    "cancelled",
    "damaged",
    "refused",
)
MOST_MODELS = 100  # models with a series of their own
CALLERS = ("anonymous", *Role.__members__)
VERDICTS = ("accepted", "refused", "failed")
EVICTION_REASONS = ("pull", "pressure", "unused", "asked")
# Gauges that are measured at each scrape.
MEASURED = {
    "cachd_available_bytes": "Bytes that a new pull can reserve now without an eviction",
    "cachd_cache_limit_bytes": "Most bytes that models may take: limit_bytes, or the disk less reserve_free",
    "cachd_cache_size_bytes": "Bytes on disk of published snapshots; a shared file counts once",
    "cachd_config_in_force": "1 while the daemon uses the configuration file as it is on disk;"
    " 0 while the file is wrong or a changed option needs a restart",
    "cachd_fs_size_bytes": "Size of the cache's file system in bytes",
    "cachd_fs_free_bytes": "Bytes of the cache's file system that are free to cachd",
    "cachd_fs_free_inodes": "Free inodes of the cache's file system",
    "cachd_held_bytes": "Bytes on disk of deleted files that a process still has open",
    "cachd_leases": "Leases that have not expired",
    "cachd_reserved_bytes": "Bytes reserved for running pulls and not yet written",
    "cachd_tokens_in_force": "1 while the API uses the tokens of token_file as it is on disk;"
    " 0 while it cannot be used",
    "cachd_view_watches": "Directories of the views that the kernel watches for changes",
    "cachd_view_unwatched": "Directories of the views that the kernel does not watch: its limit is reached",
    "cachd_tls_certificate_expiry_timestamp_seconds": "Unix time at which the API's certificate expires",
    "cachd_tls_in_force": "1 while the API uses the certificate that is on disk; 0 while it cannot be used",
    "cachd_scrub_oldest_timestamp_seconds": "Unix time of the oldest verification of any published blob;"
    " 0 when there is none",
}
# The buckets of the kubelet's kubelet_image_pull_duration_seconds: from one second to an hour.
_PULL_SECONDS = (1, 5, 10, 20, 30, 60, 120, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600)
_SIZE_CLASSES = ((1e9, "<1GB"), (1e10, "1-10GB"), (1e11, "10-100GB"), (float("inf"), ">100GB"))


def size_class(size: int) -> str:
    """The value of the label `size_class` for a model of `size` bytes."""
    return next(label for limit, label in _SIZE_CLASSES if size < limit)


class Metrics:
    """The daemon's metrics, in a registry of its own.

    Labels have small closed sets of values. No URL, file or request id is ever one.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        Gauge(
            "cachd_build_info", "Always 1; the label has the version of cachd", ["version"], registry=registry
        ).labels(__version__).set(1)
        self.requests = Counter(
            "cachd_requests_total",
            "API requests, by operation and class of the HTTP status",
            ["op", "result"],
            registry=registry,
        )
        self.writes = Counter(
            "cachd_writes_total",
            "API requests to change something, by the role of the caller and the outcome",
            ["role", "verdict"],
            registry=registry,
        )
        for role in CALLERS:
            for verdict in VERDICTS:
                self.writes.labels(role, verdict)
        self.hits = Counter(
            "cachd_hits_total", "Requests for a model that was already ready", registry=registry
        )
        self.misses = Counter("cachd_misses_total", "Requests that started a pull", registry=registry)
        self.joins = Counter("cachd_joins_total", "Requests that joined a running pull", registry=registry)
        self.download_bytes = Counter(
            "cachd_download_bytes_total", "Bytes received from sources", ["source"], registry=registry
        )
        self.resumed_bytes = Counter(
            "cachd_resumed_bytes_total",
            "Bytes that a resumed download found on disk and did not fetch again",
            registry=registry,
        )
        self.refetched_bytes = Counter(
            "cachd_refetched_bytes_total",
            "Bytes fetched again because a file did not match its digest",
            ["reason"],
            registry=registry,
        )
        self.origin_requests = Counter(
            "cachd_origin_requests_total",
            "Requests to sources for bytes of files, by the class of the HTTP status",
            ["source", "code_class"],
            registry=registry,
        )
        self.origin_retries = Counter(
            "cachd_origin_retries_total",
            "Requests for parts of files that were repeated after a failure",
            ["reason"],
            registry=registry,
        )
        self.limited_seconds = Counter(
            "cachd_limited_seconds_total",
            "Seconds that streams waited because of a bandwidth limit, summed over all streams",
            ["source"],
            registry=registry,
        )
        self.verify_failures = Counter(
            "cachd_verify_failures_total",
            "Files that did not match their digest, or were damaged or missing, by the check that found it",
            ["stage"],
            registry=registry,
        )
        for stage in ("pull", "scrub"):
            self.verify_failures.labels(stage)
        self.view_changes = Counter(
            "cachd_views_changed_total",
            "Checks that ran because files of the views had changed, by cachd or by another process",
            registry=registry,
        )
        self.scrub_bytes = Counter(
            "cachd_scrub_bytes_total", "Bytes of published blobs re-read for verification", registry=registry
        )
        self.swept_bytes = Counter(
            "cachd_swept_bytes_total",
            "Bytes freed by removing leftovers that no model and no pull needs, by kind",
            ["kind"],
            registry=registry,
        )
        self.warmed_bytes = Counter(
            "cachd_warmed_bytes_total", "Bytes read into memory to warm models", registry=registry
        )
        self.disk_failures = Counter(
            "cachd_disk_failures_total",
            "Pulls that failed because of an error of the node's disk, other than lack of space",
            registry=registry,
        )
        self.evictions = Counter(
            "cachd_evictions_total",
            "Snapshots evicted, by reason: for a pull, under disk pressure, unused, or on request",
            ["reason"],
            registry=registry,
        )
        for reason in EVICTION_REASONS:
            self.evictions.labels(reason)
        self.evicted_bytes = Counter(
            "cachd_evicted_bytes_total", "Bytes of disk freed by evictions", registry=registry
        )
        self.pull_seconds = Histogram(
            "cachd_pull_duration_seconds",
            "Seconds from the start of a pull to its end, by result and size of the model",
            ["result", "size_class"],
            buckets=_PULL_SECONDS,
            registry=registry,
        )
        self.streams = Gauge(
            "cachd_streams",
            "Connections that may receive at once now; cachd adapts their number to the throughput",
            registry=registry,
        )
        self.pulls_in_progress = Gauge("cachd_pulls_in_progress", "Pulls that run now", registry=registry)
        self.pull_queue_length = Gauge(
            "cachd_pull_queue_length", "Pulls that wait for a slot", registry=registry
        )
        self.last_pull = Gauge(
            "cachd_last_successful_pull_timestamp_seconds",
            "Unix time of the last successful pull",
            registry=registry,
        )

    def watch(
        self,
        *,
        gauges: Callable[[], Mapping[str, float]],
        models: Callable[[], Mapping[str, int]],
        limits: Callable[[], Mapping[str, int]],
        resident: Callable[[], Mapping[str, int]],
    ) -> None:
        """Measure at each scrape: the gauges of `MEASURED`, models by state, bandwidth limits by source, and
        the bytes of each model that are in memory."""
        self.registry.register(_Measured(gauges, models, limits, resident))

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class _Measured(Collector):
    def __init__(
        self,
        gauges: Callable[[], Mapping[str, float]],
        models: Callable[[], Mapping[str, int]],
        limits: Callable[[], Mapping[str, int]],
        resident: Callable[[], Mapping[str, int]],
    ) -> None:
        self._gauges, self._models, self._limits, self._resident = gauges, models, limits, resident

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        measured = self._gauges()
        for name, text in MEASURED.items():
            if name in measured:
                yield GaugeMetricFamily(name, text, value=measured[name])
        states = GaugeMetricFamily("cachd_models", "Models by state", labels=["state"])
        counted = self._models()
        for state in MODEL_STATES:
            states.add_metric([state], counted.get(state, 0))
        yield states
        limits = GaugeMetricFamily(
            "cachd_limit_bytes_per_second",
            "Bandwidth limits in force, by source or prefix; the source `all` is the limit of all together",
            labels=["source"],
        )
        for source, rate in self._limits().items():
            limits.add_metric([source], rate)
        yield limits
        resident = GaugeMetricFamily(
            "cachd_model_resident_bytes",
            "Bytes of a ready model that are in the page cache",
            labels=["model"],
        )
        for name, size in self._resident().items():
            resident.add_metric([name], size)
        yield resident
