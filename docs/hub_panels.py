"""What the Grafana dashboard shows of the Hub endpoint."""

from __future__ import annotations

from docs.panel import Panel, Row, increase, rate

HUB = Row(
    "Hub endpoint",
    (
        Panel(
            "Requests of clients of the Hub",
            "Requests to the Hub endpoint, by call and class of the HTTP status. 5xx includes clients that"
            " are told to ask again.",
            "timeseries",
            "reqps",
            {"{{call}} {{result}}": rate("cachd_hub_requests_total", "call", "result")},
            width=12,
            maybe_empty="the Hub endpoint is off, or no client asks it",
        ),
        Panel(
            "Bytes to clients of the Hub",
            "Bytes of files that the Hub endpoint sent, from ready models and from models still arriving.",
            "timeseries",
            "Bps",
            {"{{instance}} {{state}}": rate("cachd_hub_sent_bytes_total", "instance", "state")},
            width=12,
            is_stacked=True,
        ),
        Panel(
            "Clients of the Hub",
            "Connections to the Hub endpoint, requests that its 64 threads answer now, and how many of these"
            " wait. Half of the threads may wait.",
            "timeseries",
            "short",
            {
                "{{instance}} connections": "cachd_hub_connections",
                "{{instance}} answered now": "cachd_hub_requests_in_progress",
                "{{instance}} waiting": "cachd_hub_waiting",
            },
            width=12,
        ),
        Panel(
            "Clients of the Hub that are refused",
            "Connections from outside hub_allow, and tokens that the Hub refused or said nothing about.",
            "timeseries",
            "short",
            {
                "{{instance}} not in hub_allow": increase("cachd_hub_refused_connections_total", "instance"),
                "{{instance}} token {{verdict}}": increase(
                    'cachd_hub_token_checks_total{verdict!="accepted"}', "instance", "verdict"
                ),
            },
            width=12,
        ),
    ),
)
