"""The Grafana dashboard: all its rows, and what those about the fleet, pulls and origins show."""

from __future__ import annotations

from docs.hub_panels import HUB
from docs.node_panels import DAEMON, DISK, TRUST
from docs.panel import NONE_IS_GOOD, Panel, Row, increase, quantile, rate, stat, top

FLEET = Row(
    "Fleet",
    (
        stat("Nodes up", "Nodes whose daemon answers Prometheus.", "short", "sum(up)"),
        stat(
            "Nodes down",
            "Nodes whose daemon does not answer. Their pods keep reading the models that are there.",
            "short",
            "sum(1 - up)",
            NONE_IS_GOOD,
            "CachdAway",
        ),
        stat(
            "Required models not ready",
            "Models that a configuration marks `required` and that are not ready, summed over the nodes.",
            "short",
            "sum(cachd_required_models_not_ready)",
            NONE_IS_GOOD,
            "CachdRequiredModelNotReady",
        ),
        stat(
            "Alerts firing",
            "Alerts of cachd that fire now; the table below lists them.",
            "short",
            'count(ALERTS{alertstate="firing", alertname=~"Cachd.+"}) or vector(0)',
            NONE_IS_GOOD,
        ),
        stat(
            "Hit ratio",
            "Requests that found their model ready or joined a running pull, out of all requests for models.",
            "percentunit",
            "(sum(increase(cachd_hits_total[$__range])) + sum(increase(cachd_joins_total[$__range])))"
            " / (sum(increase(cachd_hits_total[$__range])) + sum(increase(cachd_joins_total[$__range]))"
            " + sum(increase(cachd_misses_total[$__range])))",
        ),
        stat(
            "Bytes saved",
            "Bytes of models that requests found ready, or that the pull they joined made ready.",
            "decbytes",
            "sum(increase(cachd_saved_bytes_total[$__range]))",
        ),
        Panel(
            "Models by state",
            "Models of all nodes. Failed and damaged ones need somebody; see the runbook.",
            "timeseries",
            "short",
            {"{{state}}": "sum by (state) (cachd_models)"},
            is_stacked=True,
        ),
        stat(
            "Models that engines refuse",
            "Ready models in which the preflight found what an engine would refuse; `cachd ls` names them.",
            "short",
            'sum(cachd_preflight_models{level="refused"})',
            NONE_IS_GOOD,
        ),
        Panel(
            "Throughput of all nodes",
            "Bytes received from sources, by kind of source.",
            "timeseries",
            "Bps",
            {"{{source}}": rate("cachd_download_bytes_total", "source")},
            is_stacked=True,
        ),
        Panel(
            "Fullest disks",
            "Used part of the cache's file system, by whichever process, of the 20 fullest nodes.",
            "bargauge",
            "percentunit",
            {"{{instance}}": top("1 - cachd_fs_free_bytes / cachd_fs_size_bytes")},
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
                "{{instance}} {{source}}": rate("cachd_download_bytes_total", "instance", "source"),
                "{{instance}} limit of {{source}}": "cachd_limit_bytes_per_second",
            },
            alert="CachdPullStalled",
        ),
        Panel(
            "Running pulls",
            "How much of each model is here, of the 20 pulls that have the most to do.",
            "bargauge",
            "percentunit",
            {"{{instance}} {{model}}": "bottomk(20, cachd_pull_done_ratio)"},
            most=1,
            maybe_empty="no pull runs",
        ),
        Panel(
            "Time left of running pulls",
            "Until the last byte, at the rate of the last ten seconds.",
            "bargauge",
            "s",
            {"{{instance}} {{model}}": top("cachd_pull_eta_seconds")},
            maybe_empty="no pull receives bytes",
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
                "{{result}} p50": quantile(0.5, "cachd_pull_duration_seconds", "result"),
                "{{result}} p95": quantile(0.95, "cachd_pull_duration_seconds", "result"),
            },
        ),
        Panel(
            "Time until ready",
            "From the first question whether a model is ready, asked during its pull, to the end of the pull,"
            " by result.",
            "timeseries",
            "s",
            {
                "{{result}} p50": quantile(0.5, "cachd_ready_wait_seconds", "result"),
                "{{result}} p95": quantile(0.95, "cachd_ready_wait_seconds", "result"),
            },
        ),
        Panel(
            "Time held back by bandwidth limits",
            "Seconds that streams waited because of a limit, for each second, summed over the streams.",
            "timeseries",
            "none",
            {"{{instance}} {{source}}": rate("cachd_limited_seconds_total", "instance", "source")},
        ),
        Panel(
            "Resumed and hedged",
            "Bytes that a resumed download found on disk, and bytes that another connection took over from"
            " a far slower one.",
            "timeseries",
            "Bps",
            {
                "{{instance}} resumed": rate("cachd_resumed_bytes_total", "instance"),
                "{{instance}} hedged": rate("cachd_hedged_bytes_total", "instance"),
            },
        ),
    ),
)

ORIGINS = Row(
    "Sources",
    (
        Panel(
            "Slowest origins",
            "Bytes for each second that a stream spent receiving, of the 10 slowest origins.",
            "bargauge",
            "Bps",
            {
                "{{origin}}": f"bottomk(10, {increase('cachd_origin_download_bytes_total', 'origin')}"
                f" / {increase('cachd_origin_receive_seconds_total', 'origin')})"
            },
            maybe_empty="nothing is received",
        ),
        Panel(
            "Time to the first byte",
            "Seconds from a request to the head of its answer, on average, by origin.",
            "timeseries",
            "s",
            {
                "{{origin}}": f"{increase('cachd_origin_answer_seconds_sum', 'origin')}"
                f" / {increase('cachd_origin_answer_seconds_count', 'origin')}"
            },
        ),
        Panel(
            "Failing origins",
            "Resolves and requests that failed, by origin and class of the HTTP status; broken: without one.",
            "timeseries",
            "short",
            {"{{origin}} {{code_class}}": increase("cachd_origin_failures_total", "origin", "code_class")},
            maybe_empty="no request failed since the daemon started",
        ),
        Panel(
            "Requests to sources",
            "Requests for bytes of files, by the class of the HTTP status; broken: no HTTP answer.",
            "timeseries",
            "reqps",
            {"{{source}} {{code_class}}": rate("cachd_origin_requests_total", "source", "code_class")},
        ),
        Panel(
            "Repeated requests",
            "Requests for parts of files that were repeated after a failure, by its code.",
            "timeseries",
            "short",
            {"{{instance}} {{reason}}": increase("cachd_origin_retries_total", "instance", "reason")},
            alert="CachdRateLimited",
            maybe_empty="no request failed since the daemon started",
        ),
    ),
)

ROWS = (FLEET, PULLS, ORIGINS, HUB, DISK, TRUST, DAEMON)
