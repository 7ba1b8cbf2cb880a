"""Defines the timeouts of connections to origins and proxies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long an origin or a proxy may keep a request waiting.

    `connect_seconds`: to look up its name, and again to connect to it. `stall_seconds`: without a byte.
    """

    connect_seconds: float = 10.0
    stall_seconds: float = 30.0
