"""Keeps what is published intact, warm and up to date: scrubs, checks, repairs, sweeps, prewarming."""
