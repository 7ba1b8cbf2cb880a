"""Real clients, on a read-only mount of cachd and on its Hub endpoint: `python -m tests.conformance`."""
