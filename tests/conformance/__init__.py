"""Clients of models, as they are, on a read-only mount of cachd: `python -m tests.conformance`."""
