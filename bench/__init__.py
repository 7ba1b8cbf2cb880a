"""Benchmarks, the demonstration, and what writes the lock files."""
