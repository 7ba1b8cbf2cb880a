"""Defines the metrics that events change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from cachd import __version__
from cachd.metrics.labels import CALLERS, EVICTION_REASONS, SEEN, SIGNAL_FAILURES, VERDICTS, Signal
from cachd.metrics.measured import MEASURED, AtScrape, Scrape

# The buckets of the kubelet's kubelet_image_pull_duration_seconds: from one second to an hour.
_PULL_SECONDS = (1, 5, 10, 20, 30, 60, 120, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600)

M = TypeVar("M", bound=Counter | Gauge | Histogram | Summary)


class _Declared(Generic[M]):
    """A metric that each Metrics object has. If all values of its labels are known, all series start at 0."""

    def __init__(
        self,
        kind: Callable[..., M],
        name: str,
        text: str,
        labels: Mapping[str, tuple[str, ...]],
        **options: Any,
    ) -> None:
        self.name, self.text = name, text
        self._kind: Callable[..., M] = kind
        self._labels, self._options = labels, options

    def __get__(self, metrics: object, owner: type) -> M:
        """For type checkers: the attribute of a Metrics object is the metric, and not this declaration."""
        raise AttributeError(self.name)

    def create(self, registry: CollectorRegistry) -> M:
        """The metric, registered."""
        metric = self._kind(self.name, self.text, list(self._labels), registry=registry, **self._options)
        if self._labels:
            for values in itertools.product(*self._labels.values()):
                metric.labels(*values)
        return metric


def _counter(name: str, text: str, **labels: tuple[str, ...]) -> _Declared[Counter]:
    return _Declared(Counter, name, text, labels)


def _gauge(name: str, text: str, **labels: tuple[str, ...]) -> _Declared[Gauge]:
    return _Declared(Gauge, name, text, labels)


def _seconds(name: str, text: str, **labels: tuple[str, ...]) -> _Declared[Histogram]:
    return _Declared(Histogram, name, text, labels, buckets=_PULL_SECONDS)


class Metrics:
    """The daemon's metrics, in a registry of its own."""

    build_info = _gauge(
        "cachd_build_info", "Always 1; the label has the version of cachd", version=(__version__,)
    )
    requests = _counter(
        "cachd_requests_total",
        "API requests, by operation and class of the HTTP status",
        op=SEEN,
        result=SEEN,
    )
    writes = _counter(
        "cachd_writes_total",
        "API requests to change something, by the role of the caller and the outcome",
        role=CALLERS,
        verdict=VERDICTS,
    )
    ready_wait_seconds = _seconds(
        "cachd_ready_wait_seconds",
        "Seconds from the first question whether a model is ready, asked during a pull, to the end of the"
        " pull, by result",
        result=("ready", "failed", "cancelled", "interrupted"),
    )
    hits = _counter("cachd_hits_total", "Requests for a model that was already ready")
    misses = _counter("cachd_misses_total", "Requests that started a pull")
    joins = _counter("cachd_joins_total", "Requests that joined a running pull")
    saved_bytes = _counter(
        "cachd_saved_bytes_total",
        "Bytes of models that requests found ready (hits), or that the pull they joined made ready (joins)",
    )
    download_bytes = _counter("cachd_download_bytes_total", "Bytes received from sources", source=SEEN)
    resumed_bytes = _counter(
        "cachd_resumed_bytes_total",
        "Bytes that a resumed download found on disk and did not fetch again",
    )
    hedged_bytes = _counter(
        "cachd_hedged_bytes_total",
        "Bytes that another connection fetched because the first one was far slower",
    )
    refetched_bytes = _counter(
        "cachd_refetched_bytes_total",
        "Bytes fetched again because a file did not match its digest",
        reason=("disk", "source"),
    )
    origin_requests = _counter(
        "cachd_origin_requests_total",
        "Requests to sources for bytes of files, by the class of the HTTP status",
        source=SEEN,
        code_class=SEEN,
    )
    origin_retries = _counter(
        "cachd_origin_retries_total",
        "Requests for parts of files that were repeated after a failure",
        reason=SEEN,
    )
    origin_bytes = _counter(
        "cachd_origin_download_bytes_total",
        "Bytes received, by the origin in the ref: a web server, a bucket or a scheme. The first 20 have"
        " series of their own",
        origin=SEEN,
    )
    origin_receive_seconds = _counter(
        "cachd_origin_receive_seconds_total",
        "Seconds that streams spent receiving, by origin, summed over all streams",
        origin=SEEN,
    )
    origin_answer_seconds = _Declared(
        Summary,
        "cachd_origin_answer_seconds",
        "Seconds from a request for bytes of a file to the head of its answer, by origin",
        {"origin": SEEN},
    )
    origin_failures = _counter(
        "cachd_origin_failures_total",
        "Resolves and requests for bytes of files that failed, by origin and class of the HTTP status;"
        " `broken` without one",
        origin=SEEN,
        code_class=SEEN,
    )
    limited_seconds = _counter(
        "cachd_limited_seconds_total",
        "Seconds that streams waited because of a bandwidth limit, summed over all streams",
        source=SEEN,
    )
    verify_failures = _counter(
        "cachd_verify_failures_total",
        "Files that did not match their digest, or were damaged or missing, by the check that found it",
        stage=("pull", "scrub"),
    )
    view_changes = _counter(
        "cachd_views_changed_total",
        "Checks that ran because files of the views had changed, by cachd or by another process",
    )
    scrub_bytes = _counter("cachd_scrub_bytes_total", "Bytes of published blobs re-read for verification")
    swept_bytes = _counter(
        "cachd_swept_bytes_total",
        "Bytes freed by removing leftovers that no model and no pull needs, by kind",
        kind=SEEN,
    )
    warmed_bytes = _counter("cachd_warmed_bytes_total", "Bytes read into memory to warm models")
    disk_failures = _counter(
        "cachd_disk_failures_total",
        "Pulls that failed because of an error of the node's disk, other than lack of space",
    )
    no_space = _counter(
        "cachd_no_space_total",
        "Pulls that failed because all evictions that are allowed would not make enough space",
    )
    evictions = _counter(
        "cachd_evictions_total",
        "Snapshots evicted, by reason: for a pull, under disk pressure, unused, or on request",
        reason=EVICTION_REASONS,
    )
    evicted_bytes = _counter("cachd_evicted_bytes_total", "Bytes of disk freed by evictions")
    pull_seconds = _seconds(
        "cachd_pull_duration_seconds",
        "Seconds from the start of a pull to its end, by result and size of the model",
        result=SEEN,
        size_class=SEEN,
    )
    streams = _gauge(
        "cachd_streams",
        "Connections that may receive at once now; cachd adapts their number to the throughput",
    )
    pulls_in_progress = _gauge("cachd_pulls_in_progress", "Pulls that run now")
    pull_queue_length = _gauge("cachd_pull_queue_length", "Pulls that wait for a slot")
    last_pull = _gauge(
        "cachd_last_successful_pull_timestamp_seconds", "Unix time of the last successful pull"
    )

    signal_writes = _counter(
        "cachd_node_signal_writes_total",
        "Writes of this node's labels, condition, taint and events that the Kubernetes API accepted",
        signal=tuple(Signal),
    )
    signal_failures = _counter(
        "cachd_node_signal_failures_total",
        "Tries to write this node's signals that failed, by reason",
        reason=SIGNAL_FAILURES,
    )
    hub_requests = _counter(
        "cachd_hub_requests_total",
        "Requests to the Hub endpoint, by call and class of the HTTP status; `none` is no call of the Hub"
        " that it answers",
        call=SEEN,
        result=SEEN,
    )
    hub_sent_bytes = _counter(
        "cachd_hub_sent_bytes_total",
        "Bytes of files that the Hub endpoint sent, by whether the file was ready or still arriving",
        state=("ready", "arriving"),
    )
    hub_waiting = _gauge(
        "cachd_hub_waiting",
        "Requests to the Hub endpoint that wait now, for bytes, a listing or the check of a token",
    )
    hub_in_progress = _gauge(
        "cachd_hub_requests_in_progress", "Threads of the Hub endpoint that answer requests now, of 64"
    )
    hub_connections = _gauge(
        "cachd_hub_connections", "Connections of clients to the Hub endpoint, of at most 1,024"
    )
    hub_refused_connections = _counter(
        "cachd_hub_refused_connections_total",
        "Connections to the Hub endpoint that were refused because their address is not in hub_allow",
    )
    hub_token_checks = _counter(
        "cachd_hub_token_checks_total",
        "Checks whether the token of a client of the Hub endpoint may read a repository, by verdict; `failed`"
        " without an answer of the Hub",
        verdict=VERDICTS,
    )

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations
        self.registry = CollectorRegistry()
        for attribute, declared in _declared().items():
            setattr(self, attribute, declared.create(self.registry))
        self.build_info.labels(__version__).set(1)

    def watch(self, scrape: Callable[[], Scrape]) -> None:
        """Measure the metrics of `MEASURED` at each scrape."""
        self.registry.register(AtScrape(scrape))

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        _, encode = self.exposition("")
        return encode()

    def exposition(self, accept: str) -> tuple[str, Callable[[], bytes]]:
        """The content type that an Accept header asks for, and a function that returns all metrics in it.

        The formats are OpenMetrics and the Prometheus text format.
        """
        encode, content_type = choose_encoder(accept)
        return content_type, lambda: encode(self.registry)


def _declared() -> dict[str, _Declared[Any]]:
    return {name: value for name, value in vars(Metrics).items() if isinstance(value, _Declared)}


def table() -> Iterator[tuple[str, str]]:
    """Yields (name, help) of every metric, for the documentation."""
    for metric in (*_declared().values(), *MEASURED):
        yield metric.name, metric.text
