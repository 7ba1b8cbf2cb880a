"""The Grafana dashboard: what its rows about the disk, verification and daemon of each node show."""

from __future__ import annotations

from docs.panel import (
    GREEN,
    NONE_IS_GOOD,
    ONE_IS_GOOD,
    RED,
    SOME_IS_ODD,
    YELLOW,
    Panel,
    Row,
    increase,
    per_node,
    rate,
    top,
)

_DAY = 86400.0

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
            "Largest models",
            "Bytes of a ready model on disk, of the 20 largest. A file that models share counts for each.",
            "bargauge",
            "decbytes",
            {"{{instance}} {{model}}": top("cachd_model_size_bytes")},
        ),
        Panel(
            "Models in the page cache",
            "Part of a ready model that is in memory, of the 20 models with the most bytes there.",
            "bargauge",
            "percentunit",
            {
                "{{instance}} {{model}}": top("cachd_model_resident_bytes")
                + " / on (job, instance, model) cachd_model_size_bytes"
            },
            most=1,
        ),
        Panel(
            "Evictions",
            "Models evicted: for a pull, under disk pressure, unused, or on request.",
            "timeseries",
            "short",
            {"{{instance}} {{reason}}": increase("cachd_evictions_total", "instance", "reason")},
        ),
        Panel(
            "Bytes freed",
            "Bytes freed by evictions, and by sweeps of leftovers.",
            "timeseries",
            "decbytes",
            {
                "{{instance}} evicted": increase("cachd_evicted_bytes_total", "instance"),
                "{{instance}} swept": increase("cachd_swept_bytes_total", "instance"),
            },
        ),
        Panel(
            "Pulls that failed for the disk",
            "Pulls that found no space although evictions were tried, or that met an error of the disk.",
            "timeseries",
            "short",
            {
                "{{instance}} no space": increase("cachd_no_space_total", "instance"),
                "{{instance}} disk failed": increase("cachd_disk_failures_total", "instance"),
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
            {"{{instance}} {{stage}}": increase("cachd_verify_failures_total", "instance", "stage")},
            alert="CachdCorruption",
        ),
        Panel(
            "Bytes fetched again",
            "Because a file did not match its digest: the disk or the source had damaged it.",
            "timeseries",
            "decbytes",
            {"{{instance}} {{reason}}": increase("cachd_refetched_bytes_total", "instance", "reason")},
        ),
        Panel(
            "Scrubbing",
            "Published bytes that were read again and compared with their digests.",
            "timeseries",
            "Bps",
            {"{{instance}}": rate("cachd_scrub_bytes_total", "instance")},
        ),
        per_node(
            "Oldest verification",
            "How long ago the file was verified that was verified least recently.",
            "s",
            "time() - (cachd_scrub_oldest_timestamp_seconds > 0)",
            ((0, GREEN), (28 * _DAY, YELLOW)),
            "CachdScrubBehind",
        ),
        per_node(
            "Damaged models",
            "Models that were withdrawn because of damage, and that are not repaired.",
            "short",
            'cachd_models{state="damaged"}',
            NONE_IS_GOOD,
            "CachdModelDamaged",
        ),
        per_node(
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
                "{{instance}} checks": increase("cachd_views_changed_total", "instance"),
                "{{instance}} not watched": "cachd_view_unwatched",
            },
            width=12,
        ),
    ),
)

DAEMON = Row(
    "Daemon",
    (
        per_node(
            "Configuration in force",
            "1 while the daemon uses the file as it is; 0 while it is wrong or an option needs a restart.",
            "short",
            "cachd_config_in_force",
            ((0, YELLOW), (1, GREEN)),
            "",
        ),
        per_node(
            "Configuration file",
            "1 if the file on disk is valid; else the options from before stay in force.",
            "short",
            "cachd_config_last_reload_successful",
            ONE_IS_GOOD,
            "CachdConfigRefused",
        ),
        per_node(
            "Options waiting",
            "Changed options that only a restart puts in force.",
            "short",
            "cachd_config_waiting_options",
            SOME_IS_ODD,
            "CachdConfigWaiting",
        ),
        per_node(
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
        per_node(
            "Last successful pull",
            "How long ago the daemon last made a model ready.",
            "s",
            "time() - (cachd_last_successful_pull_timestamp_seconds > 0)",
            (),
            "",
        ),
        per_node("Leases", "Leases that have not expired.", "short", "cachd_leases", (), ""),
        Panel(
            "API requests",
            "Requests by class of the HTTP status. 5xx includes probes of models that are not ready.",
            "timeseries",
            "reqps",
            {"{{instance}} {{result}}": rate("cachd_requests_total", "instance", "result")},
            width=10,
        ),
        Panel(
            "Changes by role",
            "API requests to change something, by the role of the caller and the outcome.",
            "timeseries",
            "short",
            {"{{role}} {{verdict}}": f"{increase('cachd_writes_total', 'role', 'verdict')} > 0"},
            width=10,
            maybe_empty="nobody changed anything in the interval",
        ),
    ),
)
