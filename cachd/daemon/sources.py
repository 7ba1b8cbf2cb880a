"""Builds the sources."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cachd.config import Config
from cachd.model import SCHEMES
from cachd.policy.proxy import Proxies
from cachd.sources.http import Http
from cachd.sources.pauses import Pauses
from cachd.sources.schemes import Sources
from cachd.sources.secrets import Secret
from cachd.sources.table import Table
from cachd.sources.timeouts import Timeouts
from cachd.sources.trust import Authorities


def build_sources(config: Config) -> Sources:
    """The sources that the options describe. Raises Invalid or Unavailable."""
    return Sources(
        build_http(config),
        config.allow,
        build_table(config),
        authorities=authorities_of(config),
        stall_seconds=config.stall_seconds,
        options=_of_schemes(config),
    )


def build_http(config: Config) -> Callable[..., Http]:
    """Makes a client for an address policy and the keyword `authorities`. Raises Invalid."""
    return partial(
        Http,
        timeouts=Timeouts(config.connect_seconds, config.stall_seconds),
        proxies=proxies_of(config),
        proxy_credentials=Secret(config.proxy_credentials_file),
        pauses=Pauses(),
    )


def proxies_of(config: Config) -> Proxies:
    """The proxies of the options and of the environment. Raises Invalid."""
    return Proxies.configured(config.proxy, config.no_proxy, os.environ)


def authorities_of(config: Config) -> dict[str, Authorities]:
    """The certificate authorities of each scheme that has its own; under "", those of all others."""
    return {"": _authorities(config.ca_file), **_own_authorities(config)}


def build_table(config: Config) -> Table:
    """The entries of `sources`, with the endpoints that other options set."""
    endpoints = {name: [f"https://{host}" for host in scheme.hosts] for name, scheme in SCHEMES.items()}
    for name, options in _of_schemes(config).items():
        if own := options.get("endpoint"):
            endpoints[name].insert(0, own)
    return Table(config.sources, refuse=config.refuse, endpoints=endpoints)


def _of_schemes(config: Config) -> dict[str, dict[str, Any]]:
    """The values of the options that stand for columns of `sources`, by scheme and column."""
    return {
        name: {column: getattr(config, option) for column, option in scheme.columns.items() if option}
        for name, scheme in SCHEMES.items()
    }


def _own_authorities(config: Config) -> dict[str, Authorities]:
    """The certificate authorities of the schemes that have their own."""
    files = {name: getattr(config, s.ca_file) for name, s in SCHEMES.items() if s.ca_file}
    return {name: _authorities(file) for name, file in files.items() if file}


def _authorities(file: Path | None) -> Authorities:
    return Authorities(str(file) if file else None)
