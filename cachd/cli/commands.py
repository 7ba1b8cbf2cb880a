"""Which module has each command. It is imported when the command is first asked for.

So `cachd serve` and `cachd wait`, for which pods wait, do not load what the other commands need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

# The panels of `cachd --help`, the modules of each, and the commands of each module.
PANELS = {
    "Models": {
        "pull": ("pull",),
        "resolve": ("resolve",),
        "models": ("ls", "show", "pin", "unpin", "rm", "cancel", "rollback", "verify", "warm"),
        "watching": ("watch",),
        "preflight": ("preflight",),
    },
    "Pods": {"pods": ("wait", "path", "hold"), "env": ("env",), "leases": ("lease",)},
    "The node": {
        "serve": ("serve",),
        "events": ("events",),
        "space": ("capacity", "evict", "gc", "evictions", "sweep"),
        "settings": ("limit", "options", "sources"),
        "check_config": ("check-config",),
        "doctor": ("doctor",),
        "bundle": ("bundle",),
    },
}


class Commands(TyperGroup):
    """A group of commands whose modules are imported one by one."""

    def __init__(self, *, commands: Mapping[str, Any], **attributes: Any) -> None:
        super().__init__(**attributes)
        # typer only reads them
        self.commands = cast("MutableMapping[str, Any]", _Imported(commands))


class _Imported(Mapping[str, Any]):
    """The commands by name. A lookup imports the module of that command alone."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self._commands = dict(own)
        self._places = {
            name: (panel, module)
            for panel, modules in PANELS.items()
            for module, names in modules.items()
            for name in names
        }

    def __getitem__(self, name: str) -> Any:
        """The command. Raises KeyError."""
        if name not in self._commands:
            panel, module = self._places[name]
            group = typer.main.get_group(import_module(f"cachd.cli.{module}").commands)
            for command in group.commands.values():
                cast("TyperCommand", command).rich_help_panel = panel
                _name_arguments(command)
            self._commands |= group.commands
        return self._commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._places, *self._commands)))

    def __len__(self) -> int:
        return len({*self._places, *self._commands})


def _name_arguments(command: Any) -> None:
    """Call the arguments of a command in its help and its errors as the documentation does: NAME."""
    for each in command.params:
        if each.param_type_name == "argument":
            each.metavar = (each.name.removesuffix("s") if each.nargs == -1 else each.name).upper()
