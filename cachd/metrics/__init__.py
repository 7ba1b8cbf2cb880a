"""Defines every metric of the daemon: its name, help and labels."""

from cachd.metrics.labels import EVICTION_REASONS, MODEL_STATES, size_class
from cachd.metrics.measured import MAX_MODELS, Scrape
from cachd.metrics.metrics import CONTENT_TYPE, Metrics, table

__all__ = [
    "CONTENT_TYPE",
    "EVICTION_REASONS",
    "MAX_MODELS",
    "MODEL_STATES",
    "Metrics",
    "Scrape",
    "size_class",
    "table",
]
