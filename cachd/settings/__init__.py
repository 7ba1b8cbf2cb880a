"""Reads options from flags, the environment and the file, with their types and with where each was set."""
