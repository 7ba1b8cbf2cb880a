"""Fetches models from their sources. No module here reads or writes the cache directory."""
