"""Builds the sources."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from cachd.config import Config
from cachd.model import HUB_HOSTS
from cachd.policy.proxy import Proxies
from cachd.sources.http import Http
from cachd.sources.schemes import Sources
from cachd.sources.secrets import HubToken, Secret
from cachd.sources.table import Table
from cachd.sources.trust import Authorities


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
        build_table(config),
        s3_authorities=_authorities(config.s3_ca_file) if config.s3_ca_file else authorities,
        stall_seconds=config.stall_seconds,
        hf_endpoint=config.hf_endpoint,
        hf_token=HubToken(config.hf_token_file),
        s3_endpoint_url=config.s3_endpoint_url,
        s3_region=config.s3_region,
    )


def build_table(config: Config) -> Table:
    """The entries of `sources`, with the endpoints that other options set."""
    endpoints = {
        "hf": (config.hf_endpoint, *(f"https://{host}" for host in HUB_HOSTS)),
        "s3": (config.s3_endpoint_url,) if config.s3_endpoint_url else (),
    }
    return Table(config.sources, refuse=config.refuse, endpoints=endpoints)


def _authorities(file: Path | None) -> Authorities:
    return Authorities(str(file) if file else None)
