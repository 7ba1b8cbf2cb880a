"""Moves bytes from sources into the store. Read pull.py first."""
