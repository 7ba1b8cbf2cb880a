"""`python -m cachd` is the same as `cachd`."""

from cachd.cli import main

main()
