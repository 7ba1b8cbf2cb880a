"""Formats the answers of the command line for people."""

from cachd.terminal.output import (
    say,
    say_beside,
    say_indented,
    show_error,
    show_json,
    show_json_line,
    show_table,
    show_yaml,
    show_yaml_part,
    warn,
    warn_json,
)
from cachd.terminal.settings import not_in_force
from cachd.terminal.table import Cell

__all__ = [
    "Cell",
    "not_in_force",
    "say",
    "say_beside",
    "say_indented",
    "show_error",
    "show_json",
    "show_json_line",
    "show_table",
    "show_yaml",
    "show_yaml_part",
    "warn",
    "warn_json",
]
