"""Defines every option of the daemon once: its name, type, default and help.

Values come from flags, the environment (CACHD_NAME) or a YAML file. Each module of options has one subject:
root, api, models, sources, network, transfer, space, upkeep and logs. All options are fields of Config.
"""

from cachd.config.models import Model
from cachd.config.options import RELOADED_KEYS, Config, table
from cachd.config.reading import LastGood, Loaded, load, path_of_file, read, read_kept

__all__ = [
    "RELOADED_KEYS",
    "Config",
    "LastGood",
    "Loaded",
    "Model",
    "load",
    "path_of_file",
    "read",
    "read_kept",
    "table",
]
