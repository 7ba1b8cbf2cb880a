"""The panels of the Grafana dashboard: what each shows, by which queries. docs/dashboard.py makes the file.

Queries name metrics without job and node; docs/dashboard.py adds the selectors of the dashboard's variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["stat", "timeseries", "bargauge", "table"]
Steps = tuple[tuple[float, str], ...]

GREEN, YELLOW, RED = "green", "yellow", "red"
NONE_IS_GOOD: Steps = ((0, GREEN), (1, RED))
SOME_IS_ODD: Steps = ((0, GREEN), (1, YELLOW))
ONE_IS_GOOD: Steps = ((0, RED), (1, GREEN))
_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel. `queries`: by legend, in which {{label}} is the value of a label.

    `unit` is one of Grafana's. `steps`: from which value on which colour. `alert`: the alert whose threshold
    they are. `most`: the end of the scale. `maybe_empty`: why Prometheus may have no data on a healthy node.
    """

    title: str
    text: str
    kind: Kind
    unit: str
    queries: Mapping[str, str]
    width: int = 8
    height: int = 7
    steps: Steps = ()
    alert: str = ""
    is_stacked: bool = False
    most: float | None = None
    maybe_empty: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def _stat(title: str, text: str, unit: str, query: str, steps: Steps = (), alert: str = "") -> Panel:
    """One figure over all nodes that are chosen."""
    return Panel(title, text, "stat", unit, {title: query}, width=4, height=4, steps=steps, alert=alert)


def _per_node(title: str, text: str, unit: str, query: str, steps: Steps, alert: str) -> Panel:
    """One figure of each node."""
    legend = {"{{instance}}": query}
    return Panel(title, text, "stat", unit, legend, width=4, height=5, steps=steps, alert=alert)


def _rate(metric: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) (rate({metric}[$__rate_interval]))"


def _increase(metric: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) (increase({metric}[$__rate_interval]))"


def _quantile(q: float, histogram: str, *by: str) -> str:
    return f"histogram_quantile({q}, {_increase(f'{histogram}_bucket', 'le', *by)})"


def _top(query: str) -> str:
    return f"topk(20, {query})"


FLEET = Row(
    "Fleet",
    (
        _stat("Nodes up", "Nodes whose daemon answers Prometheus.", "short", "sum(up)"),
        _stat(
            "Nodes down",
            "Nodes whose daemon does not answer. Their pods keep reading the models that are there.",
            "short",
            "sum(1 - up)",
            NONE_IS_GOOD,
            "CachdAway",
        ),
        _stat(
            "Required models not ready",
            "Models that a configuration marks `required` and that are not ready, summed over the nodes.",
            "short",
            "sum(cachd_required_models_not_ready)",
            NONE_IS_GOOD,
            "CachdRequiredModelNotReady",
        ),
        _stat(
            "Alerts firing",
            "Alerts of cachd that fire now; the table below lists them.",
            "short",
            'count(ALERTS{alertstate="firing", alertname=~"Cachd.+"}) or vector(0)',
            NONE_IS_GOOD,
        ),
        _stat(
            "Hit ratio",
            "Requests that found their model ready or joined a running pull, out of all requests for models.",
            "percentunit",
            "(sum(increase(cachd_hits_total[$__range])) + sum(increase(cachd_joins_total[$__range])))"
            " / (sum(increase(cachd_hits_total[$__range])) + sum(increase(cachd_joins_total[$__range]))"
            " + sum(increase(cachd_misses_total[$__range])))",
        ),
        Panel(
            "Models by state",
            "Models of all nodes. Failed and damaged ones need somebody; see the runbook.",
            "timeseries",
            "short",
            {"{{state}}": "sum by (state) (cachd_models)"},
            is_stacked=True,
        ),
        Panel(
            "Throughput of all nodes",
            "Bytes received from sources, by kind of source.",
            "timeseries",
            "Bps",
            {"{{source}}": _rate("cachd_download_bytes_total", "source")},
            is_stacked=True,
        ),
        Panel(
            "Fullest disks",
            "Used part of the cache's file system, by whichever process, of the 20 fullest nodes.",
            "bargauge",
            "percentunit",
            {"{{instance}}": _top("1 - cachd_fs_free_bytes / cachd_fs_size_bytes")},
            most=1,
        ),
        Panel(
            "Alerts that fire",
            "docs/runbook.md has a section for each.",
            "table",
            "short",
            {"": 'ALERTS{alertstate="firing", alertname=~"Cachd.+"}'},
            width=16,
            maybe_empty="no alert fires",
        ),
        Panel(
            "Versions",
            "Nodes by version of cachd: more than one during an upgrade.",
            "bargauge",
            "short",
            {"{{version}}": "count by (version) (cachd_build_info)"},
        ),
    ),
)

PULLS = Row(
    "Pulls",
    (
        Panel(
            "Throughput by source",
            "Bytes received from sources, and the limit of all together where one is set.",
            "timeseries",
            "Bps",
            {
                "{{instance}} {{source}}": _rate("cachd_download_bytes_total", "instance", "source"),
                "{{instance}} limit of {{source}}": "cachd_limit_bytes_per_second",
            },
            alert="CachdPullStalled",
        ),
        Panel(
            "Pulls running and queued",
            "Pulls that have a slot, and pulls that wait for one.",
            "timeseries",
            "short",
            {
                "{{instance}} running": "cachd_pulls_in_progress",
                "{{instance}} queued": "cachd_pull_queue_length",
            },
        ),
        Panel(
            "Connections",
            "Connections that may receive at once; cachd adapts their number to the throughput.",
            "timeseries",
            "short",
            {"{{instance}}": "cachd_streams"},
        ),
        Panel(
            "Duration of pulls",
            "Seconds from the start of a pull to its end, by result: half and 95 % of the pulls took less.",
            "timeseries",
            "s",
            {
                "{{result}} p50": _quantile(0.5, "cachd_pull_duration_seconds", "result"),
                "{{result}} p95": _quantile(0.95, "cachd_pull_duration_seconds", "result"),
            },
        ),
        Panel(
            "Time held back by bandwidth limits",
            "Seconds that streams waited because of a limit, for each second, summed over the streams.",
            "timeseries",
            "none",
            {"{{instance}} {{source}}": _rate("cachd_limited_seconds_total", "instance", "source")},
        ),
        Panel(
            "Bytes that were not fetched twice",
            "Bytes that a resumed download found on disk, and bytes that a faster connection took over.",
            "timeseries",
            "Bps",
            {
                "{{instance}} resumed": _rate("cachd_resumed_bytes_total", "instance"),
                "{{instance}} hedged": _rate("cachd_hedged_bytes_total", "instance"),
            },
        ),
    ),
)

DISK = Row(
    "Disk and memory",
    (
        Panel(
            "Disk",
            "What models take and may take, what is reserved for pulls, and what is free. Deleted files"
            " that a process still has open count as held.",
            "timeseries",
            "decbytes",
            {
                "{{instance}} models": "cachd_cache_size_bytes",
                "{{instance}} held": "cachd_held_bytes",
                "{{instance}} reserved for pulls": "cachd_reserved_bytes",
                "{{instance}} limit": "cachd_cache_limit_bytes",
                "{{instance}} free": "cachd_fs_free_bytes",
                "{{instance}} reserve_free": "cachd_reserve_free_bytes",
            },
            alert="CachdDiskBelowReserve",
        ),
        Panel(
            "Free part of the disk and the kubelet's threshold",
            "Below its threshold the kubelet deletes images and evicts pods.",
            "timeseries",
            "percentunit",
            {
                "{{instance}} free": "cachd_fs_free_bytes / cachd_fs_size_bytes",
                "{{instance}} kubelet ({{from}})": "cachd_kubelet_threshold_ratio",
            },
            alert="CachdDiskBelowKubeletThreshold",
        ),
        Panel(
            "Space for a new pull",
            "Bytes that a pull can reserve without an eviction.",
            "timeseries",
            "decbytes",
            {"{{instance}}": "cachd_available_bytes"},
        ),
        Panel(
            "Models in the page cache",
            "Bytes of a ready model that are in memory, of the 20 models with the most.",
            "bargauge",
            "decbytes",
            {"{{instance}} {{model}}": _top("cachd_model_resident_bytes")},
        ),
        Panel(
            "Evictions",
            "Models evicted: for a pull, under disk pressure, unused, or on request.",
            "timeseries",
            "short",
            {"{{instance}} {{reason}}": _increase("cachd_evictions_total", "instance", "reason")},
        ),
        Panel(
            "Bytes freed",
            "Bytes freed by evictions, and by sweeps of leftovers.",
            "timeseries",
            "decbytes",
            {
                "{{instance}} evicted": _increase("cachd_evicted_bytes_total", "instance"),
                "{{instance}} swept": _increase("cachd_swept_bytes_total", "instance"),
            },
        ),
        Panel(
            "Pulls that failed for the disk",
            "Pulls that found no space although evictions were tried, or that met an error of the disk.",
            "timeseries",
            "short",
            {
                "{{instance}} no space": _increase("cachd_no_space_total", "instance"),
                "{{instance}} disk failed": _increase("cachd_disk_failures_total", "instance"),
            },
            steps=NONE_IS_GOOD,
            alert="CachdNoSpace",
        ),
    ),
)

TRUST = Row(
    "Verification",
    (
        Panel(
            "Files that did not match their digest",
            "By the check that found them: of a pull, or of a scrub of published files.",
            "timeseries",
            "short",
            {"{{instance}} {{stage}}": _increase("cachd_verify_failures_total", "instance", "stage")},
            alert="CachdCorruption",
        ),
        Panel(
            "Bytes fetched again",
            "Because a file did not match its digest: the disk or the source had damaged it.",
            "timeseries",
            "decbytes",
            {"{{instance}} {{reason}}": _increase("cachd_refetched_bytes_total", "instance", "reason")},
            maybe_empty="no file was damaged since the daemon started",
        ),
        Panel(
            "Scrubbing",
            "Published bytes that were read again and compared with their digests.",
            "timeseries",
            "Bps",
            {"{{instance}}": _rate("cachd_scrub_bytes_total", "instance")},
        ),
        _per_node(
            "Age of the oldest verification",
            "Since the file that was verified least recently was verified.",
            "s",
            "time() - (cachd_scrub_oldest_timestamp_seconds > 0)",
            ((0, GREEN), (28 * _DAY, YELLOW)),
            "CachdScrubBehind",
        ),
        _per_node(
            "Damaged models",
            "Models that were withdrawn because of damage, and that are not repaired.",
            "short",
            'cachd_models{state="damaged"}',
            NONE_IS_GOOD,
            "CachdModelDamaged",
        ),
        _per_node(
            "Failed models",
            "Models whose last pull failed. `cachd ls` says why.",
            "short",
            'cachd_models{state="failed"}',
            SOME_IS_ODD,
            "CachdPullsFailing",
        ),
        Panel(
            "Changes to views",
            "Checks because published files changed, and directories that the kernel does not watch.",
            "timeseries",
            "short",
            {
                "{{instance}} checks": _increase("cachd_views_changed_total", "instance"),
                "{{instance}} not watched": "cachd_view_unwatched",
            },
            width=12,
        ),
    ),
)

DAEMON = Row(
    "Daemon",
    (
        _per_node(
            "Configuration file",
            "1 if the file on disk is valid; else the options from before stay in force.",
            "short",
            "cachd_config_last_reload_successful",
            ONE_IS_GOOD,
            "CachdConfigRefused",
        ),
        _per_node(
            "Options that wait for a restart",
            "Changed options that only a restart puts in force.",
            "short",
            "cachd_config_waiting_options",
            SOME_IS_ODD,
            "CachdConfigWaiting",
        ),
        _per_node(
            "Tokens in force",
            "1 while the API uses the tokens that are on disk.",
            "short",
            "cachd_tokens_in_force",
            ONE_IS_GOOD,
            "CachdTokensRefused",
        ),
        Panel(
            "Certificate expires in",
            "Until the certificate of the API expires.",
            "stat",
            "s",
            {"{{instance}}": "cachd_tls_certificate_expiry_timestamp_seconds - time()"},
            width=4,
            height=5,
            steps=((0, RED), (7 * _DAY, GREEN)),
            alert="CachdCertificateExpires",
            maybe_empty="the API has no certificate",
        ),
        _per_node(
            "Since the last successful pull",
            "How long ago the daemon last made a model ready.",
            "s",
            "time() - (cachd_last_successful_pull_timestamp_seconds > 0)",
            (),
            "",
        ),
        _per_node("Leases", "Leases that have not expired.", "short", "cachd_leases", (), ""),
        Panel(
            "API requests",
            "Requests by class of the HTTP status. 5xx includes probes of models that are not ready.",
            "timeseries",
            "reqps",
            {"{{instance}} {{result}}": _rate("cachd_requests_total", "instance", "result")},
            width=12,
        ),
        Panel(
            "Changes by role",
            "API requests to change something, by the role of the caller and the outcome.",
            "timeseries",
            "short",
            {"{{role}} {{verdict}}": f"{_increase('cachd_writes_total', 'role', 'verdict')} > 0"},
            width=12,
            maybe_empty="nobody changed anything in the interval",
        ),
    ),
)

ORIGINS = Row(
    "Sources",
    (
        Panel(
            "Requests to sources",
            "Requests for bytes of files, by the class of the HTTP status; broken: no HTTP answer.",
            "timeseries",
            "reqps",
            {"{{source}} {{code_class}}": _rate("cachd_origin_requests_total", "source", "code_class")},
        ),
        Panel(
            "Repeated requests",
            "Requests for parts of files that were repeated after a failure, by its code.",
            "timeseries",
            "short",
            {"{{instance}} {{reason}}": _increase("cachd_origin_retries_total", "instance", "reason")},
            alert="CachdRateLimited",
            maybe_empty="no request failed since the daemon started",
        ),
    ),
)

ROWS = (FLEET, PULLS, ORIGINS, DISK, TRUST, DAEMON)
