"""Keeps published models intact, warm and up to date: scrubs, checks, repairs, sweeps, prewarming."""
