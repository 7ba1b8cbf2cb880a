"""Every metric: name, labels, help, buckets."""

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
MOST_MODELS = 100  # may have a series of their own
CALLERS = ("anonymous", *Role.__members__)
VERDICTS = ("accepted", "refused", "failed")
EVICTION_REASONS = ("pull", "pressure", "unused", "asked")
# Measured when scraped.
MEASURED = {
    "cachd_available_bytes": "Bytes that a pull could be promised now with nothing evicted",
    "cachd_cache_limit_bytes": "The most that models may take: limit_bytes, or the disk less its reserve",
    "cachd_cache_size_bytes": "Bytes on disk of published snapshots, shared ones counted once",
    "cachd_config_in_force": "1 while the daemon works by the configuration file as it is on disk",
    "cachd_fs_size_bytes": "Size of the cache's file system",
    "cachd_fs_free_bytes": "Bytes free to cachd on its file system",
    "cachd_fs_free_inodes": "Inodes free on the cache's file system",
    "cachd_held_bytes": "Bytes on disk of deleted models that a process still has open",
    "cachd_leases": "Leases that have not expired",
    "cachd_reserved_bytes": "Bytes promised to running pulls",
    "cachd_tokens_in_force": "1 while the API's tokens are those of token_file as it is on disk",
    "cachd_view_watches": "Directories of the views that the kernel watches",
    "cachd_view_unwatched": "Directories of the views that the kernel does not watch, for its limits",
    "cachd_tls_certificate_expiry_timestamp_seconds": "Unix time at which the API's certificate expires",
    "cachd_tls_in_force": "1 while the API shows the certificate that is on disk, 0 while that does not work",
    "cachd_scrub_oldest_timestamp_seconds": "When the blob was read again that waits for it the longest",
}
# As the kubelet measures image pulls: from seconds to an hour.
_PULL_SECONDS = (1, 5, 10, 20, 30, 60, 120, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600)
_SIZE_CLASSES = ((1e9, "<1GB"), (1e10, "1-10GB"), (1e11, "10-100GB"), (float("inf"), ">100GB"))


def size_class(size: int) -> str:
    """The label that stands for a model of `size` bytes."""
    return next(label for limit, label in _SIZE_CLASSES if size < limit)


class Metrics:
    """One registry. Labels are small closed sets; no URL, file or request id is ever one."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        Gauge("cachd_build_info", "1, labelled with the version", ["version"], registry=registry).labels(
            __version__
        ).set(1)
        self.requests = Counter(
            "cachd_requests_total", "API requests answered", ["op", "result"], registry=registry
        )
        self.writes = Counter(
            "cachd_writes_total",
            "Requests to change something, by the role of the caller and how they ended",
            ["role", "verdict"],
            registry=registry,
        )
        for role in CALLERS:
            for verdict in VERDICTS:
                self.writes.labels(role, verdict)
        self.hits = Counter("cachd_hits_total", "Requests for a model that was ready", registry=registry)
        self.misses = Counter("cachd_misses_total", "Requests that began a pull", registry=registry)
        self.joins = Counter("cachd_joins_total", "Requests that joined a running pull", registry=registry)
        self.download_bytes = Counter(
            "cachd_download_bytes_total", "Bytes received from sources", ["source"], registry=registry
        )
        self.resumed_bytes = Counter(
            "cachd_resumed_bytes_total", "Bytes found in journals and not fetched again", registry=registry
        )
        self.refetched_bytes = Counter(
            "cachd_refetched_bytes_total",
            "Bytes fetched again because a digest was wrong",
            ["reason"],
            registry=registry,
        )
        self.origin_requests = Counter(
            "cachd_origin_requests_total",
            "Requests for bytes, by the class of the answer",
            ["source", "code_class"],
            registry=registry,
        )
        self.origin_retries = Counter(
            "cachd_origin_retries_total", "Parts asked for again", ["reason"], registry=registry
        )
        self.limited_seconds = Counter(
            "cachd_limited_seconds_total",
            "Seconds that streams waited for a bandwidth limit",
            ["source"],
            registry=registry,
        )
        self.verify_failures = Counter(
            "cachd_verify_failures_total",
            "Files whose bytes disagreed with their digest",
            ["stage"],
            registry=registry,
        )
        for stage in ("pull", "scrub"):
            self.verify_failures.labels(stage)
        self.view_changes = Counter(
            "cachd_views_changed_total",
            "Times that something changed in what pods see, by cachd or by somebody else, and was looked at",
            registry=registry,
        )
        self.scrub_bytes = Counter(
            "cachd_scrub_bytes_total", "Bytes of published blobs read again", registry=registry
        )
        self.swept_bytes = Counter(
            "cachd_swept_bytes_total",
            "Bytes freed of what no model and no pull needs",
            ["kind"],
            registry=registry,
        )
        self.warmed_bytes = Counter(
            "cachd_warmed_bytes_total", "Bytes read into memory for models to be warm", registry=registry
        )
        self.disk_failures = Counter(
            "cachd_disk_failures_total",
            "Pulls that ended because the node's disk refused, for another reason than space",
            registry=registry,
        )
        self.evictions = Counter(
            "cachd_evictions_total",
            "Snapshots evicted: for a pull, over the limit, unused, asked for",
            ["reason"],
            registry=registry,
        )
        for reason in EVICTION_REASONS:
            self.evictions.labels(reason)
        self.evicted_bytes = Counter(
            "cachd_evicted_bytes_total", "Bytes of disk that evictions freed", registry=registry
        )
        self.pull_seconds = Histogram(
            "cachd_pull_duration_seconds",
            "From the start of a pull to its end",
            ["result", "size_class"],
            buckets=_PULL_SECONDS,
            registry=registry,
        )
        self.streams = Gauge(
            "cachd_streams",
            "Streams that may receive at once, as many as were found to pay",
            registry=registry,
        )
        self.pulls_in_progress = Gauge("cachd_pulls_in_progress", "Pulls at work", registry=registry)
        self.pull_queue_length = Gauge("cachd_pull_queue_length", "Pulls waiting", registry=registry)
        self.last_pull = Gauge(
            "cachd_last_successful_pull_timestamp_seconds", "When a pull last ended ready", registry=registry
        )

    def watch(
        self,
        *,
        gauges: Callable[[], Mapping[str, float]],
        models: Callable[[], Mapping[str, int]],
        limits: Callable[[], Mapping[str, int]],
        resident: Callable[[], Mapping[str, int]],
    ) -> None:
        """Measure at each scrape: the gauges of `MEASURED`, models by state, limits by source, and how much
        of each model is in memory."""
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
            "Bandwidth limits in force, by source and of all",
            labels=["source"],
        )
        for source, rate in self._limits().items():
            limits.add_metric([source], rate)
        yield limits
        resident = GaugeMetricFamily(
            "cachd_model_resident_bytes", "Bytes of a ready model that are in memory", labels=["model"]
        )
        for name, size in self._resident().items():
            resident.add_metric([name], size)
        yield resident
