"""Formats the answers of the command line for people."""

from cachd.terminal.output import (
    Cell,
    say,
    show_error,
    show_json,
    show_json_line,
    show_table,
    show_table_or,
    show_yaml,
    show_yaml_part,
    warn,
    warn_json,
)
from cachd.terminal.settings import not_in_force

__all__ = [
    "Cell",
    "not_in_force",
    "say",
    "show_error",
    "show_json",
    "show_json_line",
    "show_table",
    "show_table_or",
    "show_yaml",
    "show_yaml_part",
    "warn",
    "warn_json",
]
