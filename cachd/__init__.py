"""cachd: a node-local model cache daemon."""

__version__ = "0.1.0"
