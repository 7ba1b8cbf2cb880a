"""Runs the command line for `python -m cachd`."""

from cachd.cli import main

main()
