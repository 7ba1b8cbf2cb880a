"""Decides where the value of an option comes from.

The first of these that sets it wins: a flag, a variable CACHD_*, the file, a variable of another tool.
Otherwise the default applies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from cachd.findings import Place, did_you_mean
from cachd.settings.file import ConfigFile, Value
from cachd.sources.secrets import is_true

PREFIX = "CACHD_"
OF_THE_COMMAND_LINE = ("cache", "server", "url", "token", "api_ca_file", "api_cert_file", "api_key_file")
# Variables that Kubernetes adds to pods for a Service named cachd or cachd-something:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_OF_A_SERVICE = re.compile(r"CACHD_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT(_\w+)?)")


class Giver(StrEnum):
    """The kinds of places that can set an option."""

    flag = "flag"
    environment = "environment"
    file = "file"
    ecosystem = "ecosystem"
    api = "api"
    default = "default"


@dataclass(frozen=True, slots=True)
class Also:
    """Variables of other tools that set an option if cachd's own flag, variable and file do not.

    They are ignored while the variable `unless` is true.
    """

    variables: tuple[str, ...]
    unless: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """An unparsed value, what set it, and where: `--root`, `CACHD_ROOT`, `FILE:LINE`, `HF_ENDPOINT`."""

    value: object
    giver: Giver
    place: Place


@dataclass(frozen=True, slots=True)
class Given:
    """The settings of the options that are set, by name, and the file that some of them come from.

    Unknown keys of the file are among the settings, for the error about them.
    """

    settings: Mapping[str, Setting]
    file: ConfigFile | None

    def values(self) -> dict[str, object]:
        """The unparsed value of each option that is set."""
        return {name: setting.value for name, setting in self.settings.items()}

    def place(self, loc: tuple[str | int, ...]) -> Place:
        """Where a value was set, with an empty name for a default.

        `loc` is the option's name, followed by keys and indexes inside its value.
        """
        setting = self.settings.get(str(loc[0]))
        if setting and setting.giver is Giver.file and self.file:
            return self.file.place(loc)
        return setting.place if setting else Place("")


def given(
    options: Mapping[str, Iterable[object]], flags: Mapping[str, object], file: ConfigFile | None
) -> Given:
    """What sets each option.

    `options`: the names, each with its field's metadata, which may include an `Also`.
    """
    environment = ours()
    found = {}
    for name, facts in options.items():
        if name in flags:
            found[name] = Setting(flags[name], Giver.flag, Place(f"--{name.replace('_', '-')}"))
        elif variable := environment.get(variable_of(name)):
            found[name] = Setting(variable, Giver.environment, Place(variable_of(name)))
        elif file and name in file.keys:
            found[name] = _of_file(file, name)
        elif setting := _of_others(facts):
            found[name] = setting
    unknown = file.keys.keys() - options.keys() if file else ()
    return Given(found | {name: _of_file(file, name) for name in unknown if file}, file)


def variable_of(name: str) -> str:
    """The environment variable that sets the option."""
    return PREFIX + name.upper()


def ours() -> dict[str, str]:
    """The variables that begin with CACHD_ and are not empty."""
    upper = {name.upper(): value.strip() for name, value in os.environ.items()}
    return {name: value for name, value in upper.items() if name.startswith(PREFIX) and value}


def unknown_variables(options: Iterable[str]) -> list[str]:
    """A sentence for each variable that begins with CACHD_ and that cachd does not know."""
    known = [name.upper() for name in (*options, *OF_THE_COMMAND_LINE)]
    found = [name.removeprefix(PREFIX) for name in sorted(ours()) if not _OF_A_SERVICE.fullmatch(name)]
    return [
        f"{PREFIX}{name} is no option{did_you_mean(name, known, PREFIX)}"
        for name in found
        if name not in known
    ]


def _of_file(file: ConfigFile, name: str) -> Setting:
    value: Value = file.keys[name]
    return Setting(value, Giver.file, file.place((name,)))


def _of_others(facts: Iterable[object]) -> Setting | None:
    for also in (fact for fact in facts if isinstance(fact, Also)):
        for variable in also.variables:
            value = os.environ.get(variable, "").strip()
            if value and not (also.unless and is_true(also.unless)):
                return Setting(value, Giver.ecosystem, Place(variable))
    return None
