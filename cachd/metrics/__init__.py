"""Defines every metric of the daemon: its name, help and labels."""

from cachd.metrics.labels import (
    CODE_CLASSES,
    EVICTION_REASONS,
    MAX_ORIGINS,
    MODEL_STATES,
    OTHER_ORIGINS,
    Signal,
    size_class,
)
from cachd.metrics.measured import MAX_MODELS, Scrape
from cachd.metrics.metrics import Metrics, table

__all__ = [
    "CODE_CLASSES",
    "EVICTION_REASONS",
    "MAX_MODELS",
    "MAX_ORIGINS",
    "MODEL_STATES",
    "OTHER_ORIGINS",
    "Metrics",
    "Scrape",
    "Signal",
    "size_class",
    "table",
]
