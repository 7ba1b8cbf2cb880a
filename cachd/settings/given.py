"""Who gave an option its value: a flag, the environment, the file, a variable of other tools, or nobody.

The first of them that says anything wins, in this order.
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
# What Kubernetes adds to a pod's environment for a Service named cachd or cachd-something.
_OF_A_SERVICE = re.compile(r"CACHD_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT(_\w+)?)")


class Giver(StrEnum):
    """Where a value came from."""

    flag = "flag"
    environment = "environment"
    file = "file"
    ecosystem = "ecosystem"
    api = "api"
    default = "default"


@dataclass(frozen=True, slots=True)
class Also:
    """Variables of other tools that give an option its value when nobody gave it for cachd.

    None of them counts while `unless` is set to true.
    """

    variables: tuple[str, ...]
    unless: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value as it was given, by whom, and the place: `--root`, `CACHD_ROOT`, `FILE:LINE`, `HF_ENDPOINT`."""

    value: object
    giver: Giver
    place: Place


def given(
    options: Mapping[str, Iterable[object]], flags: Mapping[str, object], file: ConfigFile | None
) -> dict[str, Setting]:
    """The settings of these options, by name; of one that nobody gave there is none.

    `options` are names, each with what is told of it, among which an `Also` may be. Keys of the file that
    are no option are settings, too.
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
        elif told := _of_others(facts):
            found[name] = told
    unknown = file.keys.keys() - options.keys() if file else ()
    return found | {name: _of_file(file, name) for name in unknown if file}


def variable_of(name: str) -> str:
    return PREFIX + name.upper()


def ours() -> dict[str, str]:
    """The variables that begin with CACHD_, but for empty ones."""
    upper = {name.upper(): value.strip() for name, value in os.environ.items()}
    return {name: value for name, value in upper.items() if name.startswith(PREFIX) and value}


def unknown_variables(options: Iterable[str]) -> list[str]:
    """A sentence for each variable that begins with CACHD_ and says nothing to anybody."""
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
